"""Where a run happens: devices, memory, and what a task on a cluster asks for."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional


@dataclass
class Slurm:
    """What a task asks of a Slurm cluster. (-m)"""

    partition: Optional[str] = None
    """Null: the cluster's default."""
    account: Optional[str] = None
    qos: Optional[str] = None
    constraint: Optional[str] = None
    """Features that a node must have, such as `a100`."""
    time: Optional[str] = None
    """The time limit of a task, as Slurm writes it: `90` (minutes), `12:00:00`, `2-00:00:00`; in a file in
    quotes, or YAML reads a number. Null: the partition's."""
    memory: Optional[str] = None
    """Main memory of a task, such as `200GB`; `0` is all of a node's. Null: the partition's default."""
    cpus: int = 1
    """Processors of a task; with `hardware.workers` above 1, of each of its processes."""
    gpus: int = 0
    """GPUs of a task."""
    gpu_type: Optional[str] = None
    """The kind of GPU, as the cluster names it in gres: `a100`."""
    exclusive: bool = False
    """The whole node, whatever else is asked for."""
    parallel: Optional[int] = None
    """Tasks of an array that may run at once. Null: as many as fit."""
    setup: List[str] = field(default_factory=list)
    """Lines of bash before our own on the node: `module load cuda`, `source ~/venv/bin/activate`."""
    options: Dict[str, Any] = field(default_factory=dict)
    """Any other option of sbatch by its long name, `{exclude: n13, mail-type: END}`; true for one
    without a value."""
    warning: int = 90
    """Seconds before the time limit at which a task is told, so that it ends by itself."""


@dataclass
class SchedulerChoice:
    """A scheduler other than Slurm; see docs/howto/add-a-scheduler.md. (-m)"""

    name: str = ""
    """The name by which it is registered, by an installed package or by a file in `my_conf/schedulers/`."""
    options: Dict[str, Any] = field(default_factory=dict)
    """Its own settings; it checks them itself."""


@dataclass
class Hardware:
    """Where it runs."""

    device: str = "cpu"
    """`cpu`, `cuda`, or one device such as `cuda:1`."""
    dtype: Optional[str] = None
    """The written model's dtype: float32, bfloat16 or float16. Null: the base's."""
    compute_dtype: Optional[str] = "float32"
    """The arithmetic's dtype: float32, float64, bfloat16, float16; null: the files'."""
    engine: str = "auto"
    """What merges: `fast` (our own kernels, straight to disk), `mergekit` (mergekit's own path, its
    stream of random numbers included), or `auto`: fast wherever it can."""
    devices: int = 1
    """CUDA devices that merge at once, from `device` on; 0: all there are. (engine fast)"""
    threads: Optional[int] = None
    """Processors that take part in a merge. Null: all that the process may use."""
    memory: str = "1GB"
    """What a merge may hold besides the programs: the buffers of its workers, and on a GPU the
    inputs in work. As much is asked of the disk ahead. (engine fast)"""
    workers: int = 1
    """Candidates of a search that are made and measured at once. 1: in this process; more: each in a
    process of its own that keeps what it has loaded, on GPUs one after another of `devices`. On Slurm:
    processes of each task, which share out its candidates."""
    shard_size: str = "5GB"
    """The largest size of a weight file."""
    quantize: str = "none"
    """How models are loaded to be measured or asked: `none`, `int8` or `int4`, on CUDA by bitsandbytes; on a
    CPU int8 alone, of the weights. Only linear layers: not embeddings, the head, or the packed experts of a
    mixture. Merges are never quantised."""
    slurm: Optional[Slurm] = None
    """What a task asks of a Slurm cluster, where one does the work; null: this machine does. (-m)"""
    scheduler: Optional[SchedulerChoice] = None
    """A scheduler other than Slurm that does the work. (-m)"""
    candidates_per_task: int = 1
    """Candidates of a search that one Slurm task measures one after another, so that the experts are
    read once for all of them. (slurm)"""
    detach: bool = False
    """Submit and return; the same command again, or job=monitor, picks it up. (slurm)"""
    scratch: Optional[str] = None
    """A folder on the nodes' own disks, such as `/scratch` or `$TMPDIR`: experts are read from a copy
    there, the merged model is written there first. Removed when the task ends. (slurm)"""
    low_memory: bool = False
    """Keep intermediate tensors on the device, and read straight to it. (engine mergekit)"""

    @property
    def on_cluster(self) -> bool:
        """Whether a cluster does the work, and not this machine."""
        return self.slurm is not None or self.scheduler is not None
