"""What a search varies, and how."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from mergelab.schema.hardware import Slurm


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
