"""`Run`: the one typed object that a command line composes to, and its parts.

Plain dataclasses. OmegaConf validates every file under `conf/` and every override against them,
so a field documented here is the whole documentation of that key. Values that may be a number,
a gradient or a mapping are `Any` here and checked in `mergelab.recipes.recipe`.

(No `from __future__ import annotations`: OmegaConf reads the types at run time.)
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Dict, Iterable, List, Optional, Tuple

from omegaconf import MISSING

# ---------------------------------------------------------------- model


@dataclass
class Checkpoint:
    """Where one model lies."""

    path: str = MISSING
    """A local folder, a hub id (`org/name`), either with `+adapter` for a LoRA, or `zoo:ROLE`
    for a member of the built-in tiny family."""
    revision: Optional[str] = None
    """The hub commit, tag or branch. A 40-digit commit is what makes a run repeatable."""


@dataclass
class Skill:
    """How one skill of a family is measured."""

    validation: str = MISSING
    """The lm_eval task whose score is reported."""
    search: Optional[str] = None
    """The lm_eval task over *other* data that a search may use as fitness."""
    metric: Optional[str] = None
    """The task's metric, as lm_eval names it (`exact_match`, or `exact_match,strict-match` with
    its filter). Null: the first that the task declares."""
    share: float = 1.0
    """How much this skill counts in the fitness."""


@dataclass
class Model:
    """A base model and the checkpoints of its family, by role."""

    name: str = MISSING
    base: Checkpoint = field(default_factory=Checkpoint)
    """The common ancestor of the experts."""
    roles: Dict[str, Checkpoint] = field(default_factory=dict)
    """The fine-tunes of the base, by what they are good at."""
    skills: Dict[str, Skill] = field(default_factory=dict)
    """What `eval=skills` measures."""
    tasks: Optional[str] = None
    """A folder of the family's own lm_eval task files; `zoo:tasks` for the tiny family's."""
    architecture: Dict[str, Any] = field(default_factory=dict)
    """The part of config.json from which a plan is made when the files are not here."""
    gated: bool = False
    """The hub asks for an accepted licence before it lets anyone download."""
    allow: List[str] = field(default_factory=list)
    """Findings of preflight that are known of this family and harmless, by their code."""
    tokenizer: Optional[str] = None
    """Null keeps the base's tokenizer files as they are. `base` or `union` let mergekit build one
    and fit the embeddings to it, for experts whose vocabularies differ."""
    chat_template: Optional[str] = None
    """Null keeps the base's. Otherwise `auto`, one of mergekit's names, or a Jinja template."""
    prompts: Dict[str, List[str]] = field(default_factory=dict)
    """Typical prompts of each role, by which the gate of a mixture of experts knows its expert where
    `experts.ROLE.prompts` names none."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model, where its architecture is not transformers' own. It can do
    whatever you can do: read it first, and name the revision that you have read."""
    zoo_seed: int = 0
    """The seed from which the tiny family is trained (only where paths begin with `zoo:`)."""


# ---------------------------------------------------------------- experts and method


@dataclass
class Expert:
    """One fine-tuned model that takes part, and how much of it.

    A weight or density is a number, a list (a gradient over the layers, first to last), or a
    mapping from a part of a tensor's name to either, with "*" for all the rest.
    """

    path: Optional[str] = None
    """Instead of the family's checkpoint of this role: a folder or hub id, `+adapter` allowed."""
    revision: Optional[str] = None
    weight: Any = 1.0
    """The merge coefficient."""
    density: Any = None
    """The fraction of the task vector that is kept, in (0, 1]; null: the method's default, 1."""
    parameters: Dict[str, Any] = field(default_factory=dict)
    """Any other parameter that the method takes for each model, such as epsilon or gamma."""
    prompts: List[str] = field(default_factory=list)
    """Prompts that shall be routed to this expert. Empty: those of the family for this role. (method=moe)"""
    negative_prompts: List[str] = field(default_factory=list)
    """Prompts that shall not. (method=moe)"""


@dataclass
class Method:
    """How the experts are combined."""

    name: str = MISSING
    """A merge method of mergekit; `moe` for a mixture of experts; `mergekit` or `mergekit_moe` for a plain
    YAML file of either kind."""
    base: str = "model"
    """Which model mergekit is given as base_model: `model` (the family's base), `first` (the
    first expert), or `none` (only for methods that can do without)."""
    parameters: Dict[str, Any] = field(default_factory=dict)
    """The method's own parameters; numbers, gradients and filters as for a weight."""
    rescale: str = "l1"
    """Where the method makes up for entries that it drops at random or by size: `l1` gives each task
    vector its sum of magnitudes back, as mergekit does; `density` divides what is kept by the
    probability of being kept, as the papers do."""
    path: Optional[str] = None
    """The YAML file that `method=mergekit` or `method=mergekit_moe` runs; model, experts and parameters
    then come from that file."""


# ---------------------------------------------------------------- where and how it runs


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


@dataclass
class Evaluation:
    """How a model is judged. Everything is measured by lm_eval, in process."""

    kind: str = "skills"
    """`skills` (the family's own), `tasks` (named lm_eval tasks), `perplexity` (of a text file),
    or `none`."""
    tasks: List[str] = field(default_factory=list)
    """kind=tasks: names of lm_eval tasks or groups."""
    search_tasks: List[str] = field(default_factory=list)
    """kind=tasks: tasks over *other* data, which a search may use as fitness."""
    allow_test_split: bool = False
    """Let a search climb the very prompts that its result is reported on, where there are no others.
    What it reports is then too good, and says so."""
    shares: Dict[str, float] = field(default_factory=dict)
    """How much a task or skill counts in the fitness; 1 where it is not named."""
    metrics: Dict[str, str] = field(default_factory=dict)
    """The metric of a task, where it should not be the first that the task declares."""
    include_path: Optional[str] = None
    """A folder of your own lm_eval task files."""
    text: Optional[str] = None
    """kind=perplexity: the UTF-8 text file. Blank lines separate documents."""
    num_fewshot: Optional[int] = None
    """Null: what each task says."""
    limit: Optional[float] = None
    """The first N prompts of each task (or, below 1, that share of them). Null: all."""
    batch_size: int = 16
    backend: str = "hf"
    """What answers the prompts: `hf` (transformers) or `vllm`, on as many CUDA devices at once as
    `hardware.devices` says (tensor parallel), in batches of its own."""
    chat_template: bool = False
    """Put prompts through the model's chat template."""
    max_length: Optional[int] = None
    """Tokens of context. Null: the model's own."""
    baselines: bool = True
    """Also measure the base and every expert."""
    cache: bool = True
    """Reuse scores of models, tasks and settings that have not changed."""


@dataclass
class Job:
    """Which steps run, in this order."""

    name: str = MISSING
    steps: List[str] = field(default_factory=list)


@dataclass
class Tracking:
    """Where runs are recorded besides their own folder."""

    name: str = "none"
    """`none` or `wandb`."""
    project: str = "mergelab"
    """WANDB_PROJECT stands in for this default."""
    entity: Optional[str] = None
    group: Optional[str] = None
    tags: List[str] = field(default_factory=list)
    mode: str = "auto"
    """`online`, `offline`, or `auto`: online where there is a key and the server answers."""
    timeout: float = 5.0
    """Seconds to wait for the server before going offline."""
    sync: bool = False
    """When all is done, upload what nodes without internet have recorded offline. (slurm)"""


# ---------------------------------------------------------------- settings of single steps


@dataclass
class Check:
    """Settings of the check step."""

    path: Optional[str] = None
    """job=check: a finished model's folder; null checks the composed inputs."""
    prompt: Optional[str] = None
    """What a finished model is asked to continue. Null: a few of its own tokens."""
    distance: bool = True
    """Of composed inputs: also read all weights, for how far each expert is from the base."""
    text: Optional[str] = None
    """A UTF-8 text file on which a finished model's perplexity is compared with that of its parents. Null:
    the family's typical prompts, `model.prompts`."""


@dataclass
class Generate:
    """Settings of job=generate."""

    path: Optional[str] = None
    """A finished model's folder, or that of the run that made it: what `merged` stands for."""
    models: List[str] = field(default_factory=list)
    """Who answers, side by side: `merged`, `base`, experts by name. Empty: `merged` where there is a
    path, else the base and every expert."""
    prompts: List[str] = field(default_factory=list)
    """What is asked. Without prompts and file: what is typed, a conversation where that is a terminal."""
    file: Optional[str] = None
    """A UTF-8 text file with a prompt a line, or JSON lines with the key `prompt`."""
    system: Optional[str] = None
    """What stands before a conversation, for models with a chat template."""
    chat_template: Optional[bool] = None
    """Put prompts through the chat template. Null: where the model has one."""
    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: always the likeliest token. Above: sampled, by `seed`."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that make up this probability."""
    top_k: int = 0
    """Sample from this many tokens at most. 0: from all."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that have occurred become less likely."""


@dataclass
class Fetch:
    """Settings of job=fetch."""

    dry_run: bool = False
    """Only say what is here, what is missing, and how much that is."""
    data: bool = True
    """Also the data sets that the evaluation reads."""
    workers: int = 8
    """Files that are downloaded at once."""


@dataclass
class Publish:
    """Settings of job=publish."""

    path: Optional[str] = None
    """The finished model's folder, or that of the run that made it."""
    repo: Optional[str] = None
    """Where it goes: `owner/name`."""
    private: bool = True
    """Of a repository that is made for it."""
    revision: Optional[str] = None
    """A branch, made where it is not there. Null: main."""
    message: Optional[str] = None
    """Of the commit."""
    dry_run: bool = False
    """Only list exactly what would go."""


@dataclass
class Extract:
    """Settings of job=extract: a LoRA from the difference to the base."""

    model: Optional[str] = None
    """The expert, by name."""
    path: Optional[str] = None
    """Instead: a finished model's folder, or that of the run that made it."""
    rank: int = 32
    """The largest rank of a module's two factors."""
    epsilon: float = 0.0
    """Singular values up to this are left out."""
    embeddings: bool = False
    """Also of the embeddings, which else are saved whole where they have changed."""
    include: List[str] = field(default_factory=list)
    """Regular expressions: only modules whose names match one. Empty: all."""
    exclude: List[str] = field(default_factory=list)
    """Regular expressions: not those modules."""


@dataclass
class Analyze:
    """Settings of job=analyze."""

    top: float = 0.1
    """The share of a task vector's entries, the largest, whose overlap is counted."""
    landscape: bool = True
    """Also measure models along the line between two experts, or on the plane through three models."""
    models: List[str] = field(default_factory=list)
    """Who spans it, of `base` and the experts: two for a line, three for a plane. Empty: the two experts
    there are, else the base and the first two of them."""
    points: int = 7
    """Grid points along each axis of it."""
    margin: float = 0.25
    """How far the grid reaches beyond the models, as a share of their distance."""


@dataclass
class Monitor:
    """Settings of job=monitor."""

    folder: Optional[str] = None
    """What to look at: a run, a sweep, or any folder above them. Null: outputs/ and multirun/ here."""
    once: bool = False
    """Print what there is and return. Always so where the output is no terminal."""
    interval: float = 2.0
    """Seconds between two looks."""
    hours: float = 24.0
    """What ended longer ago is not shown, unless its folder was named."""


@dataclass
class Evaluate:
    """Settings of job=evaluate."""

    path: Optional[str] = None
    """A finished model's folder, measured beside the base and the experts."""


# ---------------------------------------------------------------- search


@dataclass
class Fidelity:
    """Measure each candidate on few prompts first, and only the promising ones on all."""

    share: float = 1.0
    """The share of the search prompts, the same ones for all, that every candidate is measured on.
    1: all of them."""
    promote: float = 0.5
    """The share of a population, its best, that is then measured on all."""


@dataclass
class Search:
    """What evolves, and how (with -m)."""

    name: str = "none"
    optimizer: str = "CMA"
    """Any of Nevergrad's, by its name."""
    space: Dict[str, Any] = field(default_factory=dict)
    """From keys to ranges, in the grammar of Hydra's Nevergrad sweeper: `interval(0, 1.5)`,
    `choice(a, b)`, `range(1, 5)`, `tag(log, interval(1e-4, 1))`, or a mapping with lower, upper, log,
    integer. `experts.*.weight` stands for every expert's, `{a,b}` for both; what follows a weight or
    density picks a filter and a point of the gradient: `experts.math.weight.mlp.0`. Null: that one not."""
    budget: int = 100
    """Candidates in all, rounded down to whole populations."""
    population: Optional[int] = None
    """Candidates of a generation. Null: CMA's own number for the dimension, 4 + 3 ln(d)."""
    seed: int = 0
    """Of the optimizer."""
    sigma: float = 0.2
    """The first steps' size, as a share of each range."""
    resolution: float = 0.001
    """Values are rounded to multiples of this (on a logarithmic range: to four digits); a genome that
    was measured is not measured again."""
    finalists: int = 3
    """How many of the best are measured on the validation split."""
    max_failure_rate: float = 0.5
    """The share of a population that may fail."""
    timeout: Optional[float] = None
    """Seconds after which a candidate has failed. Null: none."""
    fidelity: Fidelity = field(default_factory=Fidelity)
    objectives: List[str] = field(default_factory=list)
    """Two or more measures to be traded off against each other; empty: the fitness alone."""
    controller: str = "here"
    """Where the sweep is steered from: `here`, this process; `job`, a small Slurm job of its own, which
    is followed by the next before its time is over."""
    controller_job: Slurm = field(default_factory=lambda: Slurm(time="24:00:00", memory="4GB"))
    """controller=job: what that job asks for. Partition, account, qos and setup are those of
    `hardware.slurm` where it does not say otherwise."""
    against: Optional[str] = None
    """The folder of another search's result, such as a random one's, to be shown beside this one."""


# ---------------------------------------------------------------- the whole


@dataclass(frozen=True)
class Composition:
    """What a Run was composed from."""

    overrides: Tuple[str, ...] = ()
    """As they were typed."""
    choices: Dict[str, str] = field(default_factory=dict)
    """The chosen option of each group."""
    config_dir: Optional[str] = None
    """The user's own folder of groups."""


@dataclass
class Run:
    """One composed experiment."""

    model: Model = field(default_factory=Model)
    experts: Dict[str, Expert] = field(default_factory=dict)
    """Who takes part, by role."""
    method: Method = field(default_factory=Method)
    hardware: Hardware = field(default_factory=Hardware)
    eval: Evaluation = field(default_factory=Evaluation)
    job: Job = field(default_factory=Job)
    tracking: Tracking = field(default_factory=Tracking)
    search: Search = field(default_factory=Search)
    check: Check = field(default_factory=Check)
    evaluate: Evaluate = field(default_factory=Evaluate)
    generate: Generate = field(default_factory=Generate)
    fetch: Fetch = field(default_factory=Fetch)
    publish: Publish = field(default_factory=Publish)
    extract: Extract = field(default_factory=Extract)
    analyze: Analyze = field(default_factory=Analyze)
    monitor: Monitor = field(default_factory=Monitor)
    seed: int = 0
    """Of everything random: the masks of DARE and DELLA, few-shot choices."""
    output: Optional[str] = None
    """Where the merged model goes. Null: `model/` in the run's folder."""
    allow: List[str] = field(default_factory=list)
    """Findings to let pass, by the code shown in brackets, when you know better."""
    composition: Optional[Composition] = field(
        default=None, compare=False, repr=False, metadata={"omegaconf_ignore": True}
    )
    """What it was composed from: no setting, and not a part of what decides a result."""

    @property
    def overrides(self) -> List[str]:
        """What was typed to compose it."""
        return list(self.composition.overrides) if self.composition else []


def settings_of(run: Run) -> Dict[str, Any]:
    """Every setting of a run, as nested mappings: all that decides what comes of it."""
    out = asdict(run)
    del out["composition"]
    return out


def with_overrides(run: Run, overrides: Iterable[str]) -> Run:
    """The run with other arguments as those that it was composed from."""
    return replace(run, composition=replace(run.composition or Composition(), overrides=tuple(overrides)))
