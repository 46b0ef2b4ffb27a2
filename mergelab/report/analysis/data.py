"""What the tables and pictures of an analysis show, and the same as CSV. Nothing here draws or measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

Rows = list[list[Any]]
"""A table: its heads, then its lines."""

Numbers = Any
"""An array of floats, NaN where there is no value."""


class Part(Protocol):
    """What is known of a part of a model. Matrices are [experts, experts]."""

    @property
    def entries(self) -> int:
        """Parameters."""

    @property
    def relative_norm(self) -> Numbers:
        """[experts] norm of the task vector as a share of the base's."""

    @property
    def cosine_to_base(self) -> Numbers:
        """[experts] cosine of the weights and the base's."""

    @property
    def cosine(self) -> Numbers:
        """Of task vectors."""

    @property
    def agreement(self) -> Numbers:
        """Share of entries with the same sign, where neither is zero."""

    @property
    def overlap(self) -> Numbers:
        """Share of the largest entries that two task vectors have in common."""

    @property
    def overlap_by_chance(self) -> Numbers:
        """What the overlap would be by chance."""


class Compared(Protocol):
    """A base and experts, whole and in parts."""

    @property
    def experts(self) -> tuple[str, ...]:
        """Their names, in the order of all rows and columns."""

    @property
    def top(self) -> float | None:
        """The share of a tensor's entries that counts as its largest."""

    @property
    def whole(self) -> Part:
        """All of it."""

    @property
    def matrices(self) -> Compared:
        """The same without norms and biases."""

    @property
    def groups(self) -> Mapping[str, Part]:
        """Embeddings, thirds of the layers, head."""

    @property
    def layers(self) -> Mapping[int, Part]:
        """By layer."""

    @property
    def kinds(self) -> Mapping[str, Part]:
        """By kind of tensor."""

    @property
    def tensors(self) -> Mapping[str, Part]:
        """Each by its name."""


class Score(Protocol):
    """What one measure gave."""

    @property
    def value(self) -> float: ...

    @property
    def stderr(self) -> float | None: ...


class Point(Protocol):
    """A model of a landscape."""

    @property
    def at(self) -> tuple[float, ...]:
        """Its affine coordinates."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Of the task vectors."""

    @property
    def scores(self) -> Mapping[str, Score]:
        """By measure."""

    @property
    def fitness(self) -> float | None:
        """None where it gave no usable numbers."""


@dataclass(frozen=True)
class Land:
    """A line between two models or the plane through three, measured."""

    models: Sequence[str]
    corners: Sequence[tuple[float, ...]]
    """Their affine coordinates."""
    ticks: Sequence[float]
    """The grid's coordinates, along each axis."""
    points: Sequence[Point]
    place: Callable[[tuple[float, ...]], tuple[float, float]]
    """Where affine coordinates lie, at true angles and distances, in units of the base's norm."""
    best: Point
    measures: Mapping[str, bool]
    """What was measured, and whether higher is better."""
    shares: Mapping[str, float]
    """How much each measure counts in the fitness."""
    split: str

    @property
    def shown(self) -> dict[str, bool]:
        """What a picture has a panel for, and whether higher is better: the fitness, and its measures."""
        return {"fitness": True, **self.measures} if len(self.measures) > 1 else dict(self.measures)

    def value(self, point: Point, name: str) -> tuple[float, float]:
        """Of a panel at a point, with its standard error; NaN where there is none.

        That of the fitness is of a mean of measures on different prompts, see `report.scores.mean`.
        """
        if name in point.scores:
            score = point.scores[name]
            return score.value, math.nan if score.stderr is None else score.stderr
        if point.fitness is None:
            return math.nan, math.nan
        errors = [self.value(point, m)[1] * self.shares[m] for m in self.measures]
        return point.fitness, math.hypot(*errors) / sum(self.shares.values())


def pairs(experts: Sequence[str]) -> list[tuple[int, int]]:
    """Each pair of experts once, by their places."""
    return list(combinations(range(len(experts)), 2))


def _parts(compared: Compared) -> Iterator[tuple[str, Any, Part]]:
    yield "whole", "", compared.whole
    for level, parts in (("group", compared.groups), ("layer", compared.layers), ("kind", compared.kinds),
                         ("tensor", compared.tensors)):  # fmt: skip
        for name, part in parts.items():
            yield level, name, part


def similarity_rows(compared: Compared) -> Rows:
    """similarity.csv: a line for each part and pair of experts."""
    heads = [
        "level",
        "part",
        "entries",
        "one",
        "other",
        "cosine",
        "sign agreement",
        "overlap",
        "chance overlap",
    ]
    names = compared.experts
    return [
        heads,
        *(
            [level, name, part.entries, names[i], names[j],
             *(cell(m[i, j]) for m in (part.cosine, part.agreement, part.overlap, part.overlap_by_chance))]
            for level, name, part in _parts(compared)
            for i, j in pairs(names)
        ),
    ]  # fmt: skip


def distance_rows(compared: Compared) -> Rows:
    """distance.csv: a line for each part and expert."""
    heads = ["level", "part", "entries", "expert", "relative norm", "cosine with base"]
    found = [*_parts(compared), ("matrices", "", compared.matrices.whole)]
    return [
        heads,
        *(
            [level, name, part.entries, expert, cell(part.relative_norm[i]), cell(part.cosine_to_base[i])]
            for level, name, part in found
            for i, expert in enumerate(compared.experts)
        ),
    ]


def landscape_rows(land: Land) -> Rows:
    """landscape.csv: a line for each model that was measured."""
    names = list(land.best.weights)
    measures = list(land.measures)
    heads = [*(f"at.{m}" for m in land.models[1:]), "x", "y", *(f"weight.{n}" for n in names), "fitness",
             *(f"score.{m}" for m in measures), *(f"stderr.{m}" for m in measures)]  # fmt: skip

    def line(p: Point) -> list[Any]:
        scores = [(p.scores[m].value, p.scores[m].stderr) for m in measures]
        return [*p.at, *land.place(p.at), *(p.weights[n] for n in names), p.fitness,
                *(cell(v) for v, _ in scores), *(cell(e) for _, e in scores)]  # fmt: skip

    return [heads, *(line(p) for p in land.points)]


def cell(value: Any) -> float | None:
    """A number as CSV has it: nothing where it is none."""
    return None if value is None or not math.isfinite(value) else float(value)
