"""What a search varies, and how."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from mergelab.schema.fields import limited, one_of
from mergelab.schema.hardware import Slurm


@dataclass
class Fidelity:
    """Measure each candidate on few prompts first, and only the promising ones on all."""

    share: float = limited(1.0, above=0, at_most=1)
    """The share of the search prompts, the same ones for all, that every candidate is measured on.
    1: all of them."""
    promote: float = limited(0.5, above=0, at_most=1)
    """The share of a population, its best, that is then measured on all."""


@dataclass
class Search:
    """What a search varies, and how. (-m)"""

    name: str = "none"
    optimizer: str = "CMA"
    """The name of any optimizer of Nevergrad."""
    space: Dict[str, Any] = field(default_factory=dict)
    """From keys to ranges, in the grammar of Hydra's Nevergrad sweeper: `interval(0, 1.5)`,
    `choice(a, b)`, `range(1, 5)`, `tag(log, interval(1e-4, 1))`, or a mapping with lower, upper, log,
    integer. `experts.*.weight` stands for every expert's, `{a,b}` for both; what follows a weight or
    density picks a filter and a point of the gradient: `experts.math.weight.mlp.0`. Null: that one not."""
    budget: int = limited(100, at_least=1)
    """Candidates in all, rounded down to whole populations."""
    population: Optional[int] = limited(None, at_least=2, note="null: CMA's own number")
    """Candidates of a generation. Null: CMA's own number for the dimension, 4 + 3 ln(d)."""
    seed: int = limited(0, at_least=0, at_most=2**32 - 1)
    """The optimizer's seed."""
    sigma: float = limited(0.2, above=0, at_most=1)
    """The size of the first steps, as a share of each range."""
    resolution: float = limited(0.001, above=0, below=1)
    """Values are rounded to multiples of this (on a logarithmic range: to four digits); a genome that
    was measured is not measured again."""
    finalists: int = limited(3, at_least=1)
    """How many of the best are measured on the validation split."""
    max_failure_rate: float = limited(0.5, at_least=0, at_most=1)
    """The share of a population that may fail."""
    timeout: Optional[float] = limited(None, above=0, note="null: no limit")
    """Seconds after which a candidate has failed. Null: none."""
    fidelity: Fidelity = field(default_factory=Fidelity)
    objectives: List[str] = field(default_factory=list)
    """Two or more measures to trade off against each other. Empty: only the fitness."""
    controller: str = one_of("here", "job")
    """Where the search is controlled from: `here`, this process; `job`, a small job on the cluster,
    which submits its successor first. A lost controller does not end the search."""
    controller_job: Slurm = field(default_factory=lambda: Slurm(time="24:00:00", memory="4GB"))
    """controller=job: what that job requests. Partition, account, qos and setup default to those of
    `hardware.slurm`."""
    against: Optional[str] = None
    """The folder of another search, such as a random one, whose result is shown beside this one's."""
