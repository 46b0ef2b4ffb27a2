"""The line through two models or the plane through three: its points and its geometry. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from mergelab.analysis.statistics import Array

BASE = "base"

DIGITS = 3
"""Decimals of coordinates, so that a displayed weight is exactly the evaluated one."""

Coordinates = tuple[float, ...]
"""A point by its affine coordinates, one or two. The first model is at 0, the second at 1 of the first
axis, the third at 1 of the second axis."""


@dataclass(frozen=True)
class Span:
    """Two or three models, `base` or experts. The first one is the origin."""

    models: tuple[str, ...]

    @property
    def axes(self) -> int:
        """1 for a line, 2 for a plane."""
        return len(self.models) - 1

    def corners(self) -> list[Coordinates]:
        """The coordinates of the models."""
        return [tuple(float(i == axis) for axis in range(1, self.axes + 1)) for i in range(self.axes + 1)]

    def ticks(self, points: int, margin: float) -> list[float]:
        """The coordinates of a grid along each axis: `points` from -margin to 1 + margin."""
        step = (1 + 2 * margin) / (points - 1)
        return [round(-margin + i * step, DIGITS) + 0.0 for i in range(points)]

    def grid(self, points: int, margin: float) -> list[Coordinates]:
        """Every point to evaluate: a grid and the models, each once."""
        return sorted({*product(self.ticks(points, margin), repeat=self.axes), *self.corners()})

    def weights(self, at: Coordinates) -> dict[str, float]:
        """The weight of each expert's task vector at a point. The base has the rest to 1.

        theta = theta_0 + a (theta_1 - theta_0) + b (theta_2 - theta_0)
              = (1 - a - b) theta_0 + a theta_1 + b theta_2
        """
        shares = (round(1 - math.fsum(at), DIGITS) + 0.0, *at)
        return {m: share for m, share in zip(self.models, shares, strict=True) if m != BASE}

    def positions(self, dots: Array, experts: Sequence[str]) -> list[tuple[float, float]]:
        """The positions of the models in their plane, at their true angles and distances.

        Args:
            dots: [1 + experts, 1 + experts] dot products of base and task vectors, see `Statistics`.
            experts: The names of the experts.

        Returns:
            (x, y) of each model in units of the base's norm: the origin at (0, 0), the second model on the
            x axis, the third one above it.

        Raises:
            ValueError: The models do not span a line or plane.
        """
        rows = [experts.index(m) + 1 if m != BASE else None for m in self.models]

        def dot(i: int, j: int) -> float:
            a, b = rows[i], rows[j]
            return 0.0 if a is None or b is None else float(dots[a, b] / dots[0, 0])

        def from_origin(i: int, j: int) -> float:
            return dot(i, j) - dot(i, 0) - dot(0, j) + dot(0, 0)

        first = math.sqrt(max(from_origin(1, 1), 0.0))
        if first <= FLAT:
            raise ValueError(f"{self.models[0]} and {self.models[1]} are the same weights")
        positions = [(0.0, 0.0), (first, 0.0)]
        if self.axes > 1:
            x = from_origin(1, 2) / first
            y = math.sqrt(max(from_origin(2, 2) - x * x, 0.0))
            if y <= FLAT:
                raise ValueError(f"{', '.join(self.models)} lie on one line")
            positions.append((x, y))
        return positions


FLAT = 1e-7
"""The distance, in units of the base's norm, below which models count as equal."""


def position(at: Coordinates, positions: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The position of affine coordinates in the plane of `Span.positions`."""
    (x0, y0), *others = positions
    x = x0 + sum(a * (px - x0) for a, (px, _) in zip(at, others, strict=True))
    y = y0 + sum(a * (py - y0) for a, (_, py) in zip(at, others, strict=True))
    return x, y
