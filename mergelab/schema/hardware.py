"""Where a run happens: devices, memory, and what a task on a cluster requests."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from mergelab.core.dtypes import MERGEABLE
from mergelab.core.sizes import parse_size
from mergelab.core.slurm_time import parse_minutes
from mergelab.schema.conditions import DECIDED_BY_FILE, WITHOUT_CLUSTER, of_mixture
from mergelab.schema.fields import SIZE, Form, NoEffect, limited, one_of, setting


def _device(value: Any) -> Optional[str]:
    kind, colon, index = str(value).partition(":")
    sound = value == "cpu" or (kind == "cuda" and (index.isdigit() or not colon))
    return None if sound else f"'{value}' is none of {DEVICE.text}"


def _task_memory(value: Any) -> Optional[str]:
    text = str(value).strip()
    if text == "0":
        return None
    return f"'{value}' has no unit" if text.isdigit() else SIZE.wrong(value)


def _task_time(value: Any) -> Optional[str]:
    try:
        parse_minutes(str(value))
    except ValueError as e:
        return str(e)
    return None


DEVICE = Form("cpu, cuda, cuda:N", _device, "device")
TASK_MEMORY = Form(
    "a size such as 200GB, or 0 for all of a node's", _task_memory, "type", "Write it as 200GB."
)
TASK_TIME = Form(
    "90 (minutes), 12:00:00 or 2-00:00:00", _task_time, "type", "Write 90 (minutes), 12:00:00 or 2-00:00:00."
)

MORE_WORKERS_THAN_CANDIDATES = NoEffect(
    "above hardware.candidates_per_task on a cluster, because the processes of a task share out its "
    "candidates",
    lambda run: run.hardware.on_cluster and run.hardware.workers > run.hardware.candidates_per_task >= 1,
    "Raise hardware.candidates_per_task as well.",
)


@dataclass
class Slurm:
    """What a task requests from a Slurm cluster. (-m)"""

    partition: Optional[str] = None
    """Null: the cluster's default."""
    account: Optional[str] = None
    qos: Optional[str] = None
    constraint: Optional[str] = None
    """Features that a node must have, such as `a100`."""
    time: Optional[str] = setting(None, TASK_TIME)
    """The time limit of a task, as Slurm writes it: `90` (minutes), `12:00:00`, `2-00:00:00`; in a file in
    quotes, or YAML reads a number. Null: the partition's."""
    memory: Optional[str] = setting(None, TASK_MEMORY)
    """Main memory of a task, such as `200GB`; `0` is all of a node's. Null: the partition's default."""
    cpus: int = limited(1, at_least=1)
    """Processors of a task; with `hardware.workers` above 1, of each of its processes."""
    gpus: int = limited(0, at_least=0)
    """GPUs of a task."""
    gpu_type: Optional[str] = None
    """The kind of GPU, as the cluster names it in gres: `a100`."""
    exclusive: bool = False
    """The whole node, whatever else is asked for."""
    parallel: Optional[int] = limited(None, at_least=1, note="null: as many as fit")
    """Tasks of an array that may run at once. Null: as many as fit."""
    setup: List[str] = field(default_factory=list)
    """Lines of bash before our own on the node: `module load cuda`, `source ~/venv/bin/activate`."""
    options: Dict[str, Any] = field(default_factory=dict)
    """Any other option of sbatch by its long name, `{exclude: n13, mail-type: END}`; true for one
    without a value."""
    warning: int = limited(90, at_least=0)
    """Seconds before the time limit at which a task gets a signal, so that it can end by itself."""

    @property
    def memory_bytes(self) -> Optional[int]:
        """`memory` in bytes; None for the partition's default and for all of a node's."""
        return None if self.memory is None or str(self.memory).strip() == "0" else parse_size(self.memory)


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

    device: str = setting("cpu", DEVICE)
    """`cpu`, `cuda`, or one device such as `cuda:1`."""
    dtype: Optional[str] = one_of(None, *MERGEABLE, no_effect=[DECIDED_BY_FILE])
    """The written model's dtype: float32, bfloat16 or float16. Null: the base's, of each tensor."""
    compute_dtype: Optional[str] = one_of(*MERGEABLE, no_effect=[DECIDED_BY_FILE])
    """The arithmetic's dtype: float32, float64, bfloat16, float16; null: the files'."""
    engine: str = one_of("auto", "fast", "mergekit", no_effect=[of_mixture("which mergekit builds")])
    """What merges: `fast` (our own kernels, straight to disk), `mergekit` (mergekit's own path, with its
    stream of random numbers), or `auto` (fast wherever possible)."""
    devices: int = limited(1, at_least=0, note="0: all there are")
    """CUDA devices that merge at once, from `device` on; 0: all there are. (engine fast)"""
    threads: Optional[int] = limited(None, at_least=1, note="null: all that the process may use")
    """Processors that take part in a merge. Null: all that the process may use."""
    memory: str = setting("1GB", SIZE)
    """Memory for the buffers of a merge: those of its workers, and on a GPU the inputs being merged. As much
    is read ahead from the disk. (engine fast)"""
    workers: int = limited(1, at_least=1, no_effect=[MORE_WORKERS_THAN_CANDIDATES])
    """Candidates of a search that are merged and measured at once. 1: in this process. More: each in a
    process of its own that keeps what it has loaded, on GPUs one after another of `devices`. On Slurm:
    processes of each task, which share out its candidates."""
    shard_size: str = setting("5GB", SIZE)
    """The largest size of a weight file."""
    quantize: str = one_of("none", "int8", "int4")
    """How models are loaded to be measured or prompted: `none`, `int8` or `int4`, on CUDA by bitsandbytes; on
    a CPU only int8, of the weights. Only linear layers are quantized: not embeddings, the head, or the packed
    experts of a mixture. Merges never are."""
    slurm: Optional[Slurm] = None
    """What a task requests from a Slurm cluster. Null: this machine does the work. (-m)"""
    scheduler: Optional[SchedulerChoice] = None
    """A scheduler other than Slurm that does the work. (-m)"""
    candidates_per_task: int = limited(1, at_least=1, no_effect=[WITHOUT_CLUSTER])
    """Candidates of a search that one Slurm task measures one after another, so that the experts are
    read once for all of them. (slurm)"""
    detach: bool = setting(False, no_effect=[WITHOUT_CLUSTER])
    """Submit and return; the same command again, or job=monitor, picks it up. (slurm)"""
    scratch: Optional[str] = setting(None, no_effect=[WITHOUT_CLUSTER])
    """A folder on the nodes' own disks, such as `/scratch` or `$TMPDIR`: experts are read from a copy
    there, the merged model is written there first. Removed when the task ends. (slurm)"""
    low_memory: bool = False
    """Keep intermediate tensors on the device, and read straight to it. (engine mergekit)"""

    @property
    def on_cluster(self) -> bool:
        """Whether a cluster does the work, and not this machine."""
        return self.slurm is not None or self.scheduler is not None

    @property
    def memory_bytes(self) -> int:
        """`memory` in bytes."""
        return parse_size(self.memory)

    @property
    def shard_bytes(self) -> int:
        """`shard_size` in bytes."""
        return parse_size(self.shard_size)
