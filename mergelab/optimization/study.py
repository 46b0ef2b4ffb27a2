"""`Study`: a search and its result, read from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.core.errors import InputError
from mergelab.optimization import journal
from mergelab.result import Result, Score, score_of

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Candidate:
    """One genome that a search has evaluated."""

    number: int
    """In the order in which they were asked for; -1: the composed run, from which the search started."""
    generation: int
    genome: Mapping[str, Any]
    """From keys to values, such as `experts.math.weight` to 0.4."""
    status: str
    """`done`, `repeated` (an equal genome was known), `screened` (on few prompts only) or `failed`."""
    fitness: float | None
    scores: Mapping[str, Score] = field(default_factory=dict)
    """By measure, on the search split."""
    reason: str | None = None
    """Why it failed."""


@dataclass(frozen=True)
class Study:
    """A search: its candidates, the best of them, and the result.

    `mergelab.search` returns one; `Study.load` reads that of any sweep's folder, also one in progress.
    """

    folder: Path
    candidates: list[Candidate] = field(repr=False)
    """In the order of their numbers."""
    start: Candidate | None = field(default=None, repr=False)
    """The composed run, from which the search started, with its fitness."""
    result: Result | None = field(default=None, repr=False)
    """result.json, once the search has ended."""

    @classmethod
    def load(cls, folder: str | Path) -> Study:
        """The search in a sweep's folder.

        Raises:
            InputError: where there is none.
        """
        path = Path(folder).expanduser().absolute()
        lines = journal.read(path / journal.NAME) if (path / journal.NAME).is_file() else []
        if not lines:
            raise InputError(f"{path} is not the folder of a search: it has no {journal.NAME}")
        candidates = [_candidate(line) for line in lines if line["event"] == "candidate"]
        start = next((_candidate(line) for line in lines if line["event"] == "preset"), None)
        there = (path / "result.json").is_file()
        result = Result.load(path) if there else None
        return cls(path, candidates, start, result if result and result.status == "done" else None)

    @property
    def best(self) -> Candidate | None:
        """The fittest of all, the start included where nothing was better; None of several objectives,
        and before anything was measured."""
        if self.result is not None:
            winner = self.result.data.get("winner")
            if winner is None:
                return None
            number = winner.get("number")
            return self.start if number is None else next(c for c in self.candidates if c.number == number)
        known = [c for c in (self.start, *self.candidates) if c is not None and c.fitness is not None]
        return max(known, key=lambda c: c.fitness or 0.0, default=None)

    @property
    def front(self) -> list[Candidate]:
        """Of several objectives: the candidates that no other beats in everything."""
        numbers = self.result.data.get("pareto", []) if self.result else []
        return [c for c in self.candidates if c.number in numbers]

    @property
    def overrides(self) -> list[str]:
        """The arguments that compose the winner, for `mergelab.compose`."""
        return self.result.overrides if self.result else []

    @property
    def model(self) -> Path | None:
        """The folder of the winner's model."""
        return self.result.model if self.result else None

    @property
    def verdict(self) -> str | None:
        """In plain words, what the search gained on data that it did not see."""
        return self.result.data.get("verdict") if self.result else None

    def rows(self) -> list[dict[str, Any]]:
        """The candidates as a table: `number`, `generation`, `status`, `fitness`, a column a gene, and a
        column a measure."""
        return [
            {"number": c.number, "generation": c.generation, "status": c.status, "fitness": c.fitness}
            | dict(c.genome)
            | {name: score.value for name, score in c.scores.items()}
            for c in self.candidates
        ]

    def dataframe(self) -> pd.DataFrame:
        """`rows` as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.rows())


def _candidate(line: Mapping[str, Any]) -> Candidate:
    scores = {name: score_of(s) for name, s in (line.get("scores") or {}).items()}
    fitness = line.get("fitness")
    return Candidate(
        line.get("number", -1), line.get("generation", -1), line["genome"], line.get("status", "done"),
        None if fitness is None else float(fitness), scores, line.get("reason"),
    )  # fmt: skip
