"""A search as its report sees it, read from its journal and result."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergelab import search_history
from mergelab.search_history import INITIAL, number, objective, objectives, pareto_front


@dataclass(frozen=True)
class Gene:
    """One parameter of the search."""

    key: str
    label: str
    space: str
    """The values that it may have, as configured; empty where that is unknown."""
    categories: tuple[str, ...]
    """Of a choice, in alphabetical order; none for a number."""
    low: float
    high: float
    logarithmic: bool

    def position(self, genome: Mapping[str, Any]) -> float:
        """Its value in a genome as a number, a choice as its index among the categories; NaN where it has
        none."""
        value = genome.get(self.key)
        if self.categories:
            return float(self.categories.index(str(value))) if str(value) in self.categories else math.nan
        return _known(number(value))

    def height(self, genome: Mapping[str, Any]) -> float:
        """Its value in a genome on the scale from its lowest, 0, to its highest, 1."""
        low, high, at = self.low, self.high, self.position(genome)
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(at) if at > 0 else math.nan
        return (at - low) / (high - low)


@dataclass(frozen=True)
class Candidate:
    """One genome that the search evaluated."""

    number: int
    generation: int
    status: str
    fitness: float | None
    merit: float
    """What candidates are compared by, higher is better, or NaN: see `Evolution.merit`."""
    scores: Mapping[str, Any]
    genome: Mapping[str, Any]
    reason: str
    of: int | None
    """The candidate that this one repeats."""


@dataclass(frozen=True)
class Evolution:
    """A search as the report sees it."""

    genes: list[Gene]
    candidates: list[Candidate]
    merit: str
    """The name of what candidates are compared by: the fitness, or the first objective without one."""
    objectives: list[str]
    winner: Candidate | None
    """The best so far while the search runs; None where several objectives leave no single one."""
    finished: bool
    initial: Mapping[str, Any]
    """The genome of the initial point."""
    baselines: dict[str, float]
    """What the search has to beat: their fitness by name."""
    front: list[int]
    initial_scores: Mapping[str, Any]

    @property
    def several(self) -> bool:
        """Whether there is more than one objective, hence a front in the place of a winner."""
        return len(self.objectives) > 1

    @property
    def generations(self) -> list[search_history.Generation]:
        """The statistics of every generation, by merit."""
        merits = ((c.generation, None if math.isnan(c.merit) else c.merit, c.status) for c in self.candidates)
        return search_history.generations(merits)

    @property
    def merit_name(self) -> str:
        """The merit as an axis is labelled."""
        negated = self.merit in self.objectives and not self.higher_is_better(self.merit)
        return f"− {self.merit}" if negated else self.merit

    @property
    def winner_name(self) -> str:
        """What the winner is called, which a running search does not have yet."""
        return "winner" if self.finished else "best so far"

    @property
    def measured(self) -> list[Candidate]:
        """The candidates that can be compared."""
        return [c for c in self.candidates if not math.isnan(c.merit)]

    def higher_is_better(self, objective: str) -> bool:
        """Of an objective; so it is where nothing has been measured."""
        found = [c.scores[objective] for c in self.candidates if objective in c.scores]
        return all(s.get("higher_is_better", True) for s in found)


def read(journal: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> Evolution:
    """The search behind a journal and a result. Of two lines of one candidate the last counts."""
    search = result.get("search") or {}
    names = [str(o) for o in search.get("objectives") or []]
    events = {int(e["number"]): e for e in journal if e.get("event") == "candidate"}
    by_fitness = len(names) < 2 or any(number(e.get("fitness")) is not None for e in events.values())
    candidates = [_candidate(events[n], None if by_fitness else names[0]) for n in sorted(events)]
    initial = result.get(INITIAL) or {}
    named = {INITIAL: initial, "random search": result.get("random") or {}}
    fitnesses = {n: number(of.get("fitness")) for n, of in named.items()}
    genomes = [c.genome for c in candidates]
    on_front = result.get("pareto")
    return Evolution(
        genes=_genes(search.get("space") or {}, [*genomes, initial.get("genome") or {}]),
        candidates=candidates,
        merit="fitness" if by_fitness else names[0],
        objectives=names,
        winner=_winner(candidates, result, len(names) > 1),
        finished=result.get("status") == "done",
        initial=initial.get("genome") or {},
        baselines={n: f for n, f in fitnesses.items() if f is not None and by_fitness},
        front=[int(n) for n in on_front] if on_front is not None else _front(candidates, names),
        initial_scores=_initial_scores(initial, result, candidates),
    )


def _known(value: float | None) -> float:
    """NaN in the place of None."""
    return math.nan if value is None else value


def _candidate(event: Mapping[str, Any], merit: str | None) -> Candidate:
    fitness, found = number(event.get("fitness")), event.get("scores") or {}
    return Candidate(
        number=int(event["number"]),
        generation=int(event.get("generation") or 0),
        status=str(event.get("status", "")),
        fitness=fitness,
        merit=_known(fitness if merit is None else objective(found, merit)),
        scores=found,
        genome=event.get("genome") or {},
        reason=str(event.get("reason") or ""),
        of=event.get("of"),
    )


def _front(candidates: Sequence[Candidate], names: Sequence[str]) -> list[int]:
    """The numbers of the candidates on the Pareto front."""
    if len(names) < 2:
        return []
    points = {c.number: v for c in candidates if c.status == "done" and (v := objectives(c.scores, names))}
    return pareto_front(points)


def _winner(candidates: Sequence[Candidate], result: Mapping[str, Any], several: bool) -> Candidate | None:
    found = result.get("winner")
    if found:
        index = found["number"] if isinstance(found.get("number"), int) else -1
        same = next((c for c in candidates if c.number == index), None)
        if same:
            return same
        fitness = number(found.get("fitness"))
        generation, genome = int(found.get("generation") or 0), found.get("genome") or {}
        return Candidate(index, generation, "done", fitness, _known(fitness), {}, genome, "", None)
    known = [c for c in candidates if not math.isnan(c.merit)]
    return max(known, key=lambda c: c.merit) if known and not several else None


def _initial_scores(
    initial: Mapping[str, Any], result: Mapping[str, Any], candidates: Sequence[Candidate]
) -> Mapping[str, Any]:
    """What the initial point scored on what the search measured: on its own split, if it had one."""
    splits = (result.get("metrics") or {}).get(INITIAL) or {}
    same = (c.scores for c in candidates if c.genome and c.genome == initial.get("genome"))
    found = (initial.get("scores"), next(same, None), splits.get("search"), splits.get("validation"))
    return next((scores for scores in found if scores), {})


def _genes(space: Mapping[str, Any], genomes: Sequence[Mapping[str, Any]]) -> list[Gene]:
    """The genes in the order of the space, then as they appear."""
    used = dict.fromkeys(k for genome in genomes for k in genome)
    keys = [k for k in space if k in used or not used] + [k for k in used if k not in space]
    labels = _labels(keys)
    return [
        _gene(key, labels[key], str(space.get(key, "")), [g[key] for g in genomes if g.get(key) is not None])
        for key in keys
    ]


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """Short names: `math weight` for `experts.math.weight`; the keys themselves where two would be one."""
    labels = {k: k.removeprefix("experts.").replace(".", " ") for k in keys}
    return labels if len(set(labels.values())) == len(labels) else {k: k for k in keys}


def _gene(key: str, label: str, space: str, values: Sequence[Any]) -> Gene:
    numbers = [n for v in values if (n := number(v)) is not None]
    if len(numbers) < len(values):
        categories = tuple(sorted({str(v) for v in values}))
        return Gene(key, label, space, categories, *_apart(0.0, len(categories) - 1.0), False)
    bounds = re.search(r"interval\(([^,()]+),([^,()]+)\)", space)
    ends = numbers
    if bounds:
        with contextlib.suppress(ValueError):
            ends = [*numbers, *(float(b) for b in bounds.groups())]
    ends = ends or [0.0, 1.0]
    low, high = _apart(min(ends), max(ends))
    return Gene(key, label, space, (), low, high, bool(re.search(r"\blog\b", space)) and low > 0)


def _apart(low: float, high: float) -> tuple[float, float]:
    """Two ends that differ, also around a single value."""
    return (low, high) if low < high else (low - 0.5, high + 0.5)
