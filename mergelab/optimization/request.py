"""What a search is asked for (`Request`), and what it is made of once that is checked (`Setup`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mergelab.evaluation import Measure
from mergelab.optimization.gene import Gene, Genome
from mergelab.optimization.optimizer import generations
from mergelab.schema import Run

Compose = Callable[[Genome], Run]
"""From a genome to the candidate's run."""


@dataclass(frozen=True)
class Request:
    """A search as the command line or `mergelab.search` asks for it."""

    compose: Callable[[Mapping[str, Any]], Run]
    """Composes the run with other options of groups, such as `{"method": "ties"}`."""
    typed_space: Mapping[str, str]
    """Keys and ranges that were typed on the command line."""
    command: str
    """The command line that repeats it."""
    folder: Path
    """Where a new search begins."""
    folder_named: bool
    """Whether the user named the folder; if not, the same search resumes where it was interrupted."""
    arguments: Sequence[str] = ()
    """The command line as it was typed."""

    @cached_property
    def run(self) -> Run:
        """The composed run, from which the search starts."""
        return self.compose({})

    @cached_property
    def groups(self) -> dict[str, str]:
        """The chosen option of each group; empty for a group that is searched and is not chosen otherwise."""
        chosen = self.run.composition.choices if self.run.composition else {}
        open_groups = {k: "" for k in self.typed_space if "." not in k and not hasattr(self.run, k)}
        return {**open_groups, **chosen}

    def starting_at(self, options: Mapping[str, str]) -> Request:
        """The same request, whose run has these options of groups."""
        return replace(self, compose=lambda more: self.compose({**options, **more}))


@dataclass(frozen=True)
class Setup:
    """What a search is made of."""

    run: Run
    """The composed run, the initial point of the search."""
    genes: Sequence[Gene]
    starts: Genome
    """The genome of the initial point."""
    population: int
    measures: Sequence[Measure]
    compose: Compose

    @property
    def generations(self) -> int:
        """Whole populations that the budget pays for."""
        return generations(self.run.search, self.population)

    @property
    def budget(self) -> int:
        """Candidates in all."""
        return self.generations * self.population
