"""Nevergrad's optimizers, a whole population at a time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from mergelab.core.errors import InputError, did_you_mean
from mergelab.optimization.gene import Gene, Genome
from mergelab.optimization.space_grammar import parameter
from mergelab.schema import Search

FAMILY = ("CMA", "DiagonalCMA", "FCMA")
"""Optimizers that are CMA-ES, whose populations have to be their generations."""

SPARE = "(spare)"
"""A second dimension for CMA-ES, which needs two; nothing reads its value."""

NARROW = (18, 0.3, 0.15)
"""Nevergrad multiplies CMA's first steps in a bounded space by 0.3 below 18 dimensions, and by 0.15 from
there on. It is undone here, so that `search.sigma` means the same everywhere."""


def default_population(dimension: int) -> int:
    """CMA-ES's own number, 4 + floor(3 ln d) (Hansen 2016, https://arxiv.org/abs/1604.00772)."""
    return 4 + int(3 * math.log(max(dimension, 1)))


class Optimizer:
    """Asks and tells whole populations. The same settings and fitness values give the same genomes, which is
    what makes a search resumable.

    Args:
        settings: of the search.
        genes: what is searched.
        starts: the genome of the initial point.
        population: candidates of a generation.
    """

    def __init__(self, settings: Search, genes: Sequence[Gene], starts: Genome, population: int):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._build(settings, genes, starts, population)

    def _build(self, settings: Search, genes: Sequence[Gene], starts: Genome, population: int) -> None:
        import nevergrad as ng

        self.genes, self.population, self.resolution = genes, population, settings.resolution
        parameters = {g.key: parameter(g, starts[g.key], settings.sigma) for g in genes}
        cma = settings.optimizer in FAMILY
        if cma and sum(p.dimension for p in parameters.values()) == 1:
            parameters[SPARE] = ng.p.Scalar(lower=0, upper=1)
        space = ng.p.Dict(**parameters)
        space.function.deterministic = True
        space.random_state.seed(settings.seed)
        if cma:
            bound = 1 / (NARROW[1] if space.dimension < NARROW[0] else NARROW[2])
            scale = bound if ng.p.helpers.Normalizer(space).fully_bounded else 1.0
            kind: Any = ng.optimizers.ParametrizedCMA(
                scale=scale, popsize=population, diagonal=settings.optimizer == "DiagonalCMA"
            )
        else:
            kind = ng.optimizers.registry[settings.optimizer]
        budget = generations(settings, population) * population
        self._ng = kind(parametrization=space, budget=budget, num_workers=population)
        self._asked: list[Any] = []
        self._worst = 0.0

    def ask(self) -> list[Genome]:
        """The next population, rounded."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._asked = [self._ng.ask() for _ in range(self.population)]
        return [{g.key: g.rounded(c.value[g.key], self.resolution) for g in self.genes} for c in self._asked]

    def tell(self, values: Sequence[Sequence[float] | None]) -> None:
        """Take in the results of the population that was asked for.

        Args:
            values: of each candidate the fitness or the objectives, higher is better; None: it failed.
        """
        count = max((len(v) for v in values if v is not None), default=1)
        for v in values:
            if v is not None:
                self._worst = max(self._worst, *(-x for x in v))
        for candidate, v in zip(self._asked, values, strict=True):
            # A failure is worse than everything so far, by a finite number that optimizers can compute with.
            losses = [-x for x in v] if v is not None else [self._worst + 1.0] * count
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._ng.tell(candidate, losses if count > 1 else losses[0])


def check(settings: Search) -> None:
    """Check the name of the optimizer.

    Raises:
        InputError: for one that Nevergrad does not have.
    """
    import nevergrad as ng

    names = sorted(ng.optimizers.registry)
    if settings.optimizer not in names:
        some = "Among them are CMA, DiagonalCMA, TwoPointsDE, PSO, OnePlusOne, RandomSearch."
        near = did_you_mean(settings.optimizer, names)
        raise InputError(f"search.optimizer: Nevergrad has no '{settings.optimizer}'.{near}\n{some}")


def generations(settings: Search, population: int) -> int:
    """Number of whole populations that the budget pays for, at least one."""
    return max(1, settings.budget // population)
