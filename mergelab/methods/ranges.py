"""The numbers that a parameter may take, and what two of them have to satisfy together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """The numbers that a parameter may take."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, x: float) -> bool:
        above = x > self.low if self.open_low else x >= self.low
        below = x < self.high if self.open_high else x <= self.high
        return math.isfinite(x) and above and below

    def __str__(self) -> str:
        if math.isinf(self.low) and math.isinf(self.high):
            return "a finite number"
        if math.isinf(self.high):
            return f"{'above' if self.open_low else 'at least'} {self.low:g}"
        if math.isinf(self.low):
            return f"{'below' if self.open_high else 'at most'} {self.high:g}"
        left, right = "(["[not self.open_low], ")]"[not self.open_high]
        return f"in {left}{self.low:g}, {self.high:g}{right}"


FINITE = Range()
POSITIVE = Range(0, open_low=True)
NOT_NEGATIVE = Range(0)
FRACTION = Range(0, 1, open_low=True)
"""Of something that must not be empty."""
BELOW_ONE = Range(0, 1, open_high=True)
UNIT = Range(0, 1)


@dataclass(frozen=True)
class Constraint:
    """What two parameters of each model have to satisfy together at every tensor."""

    code: str
    """Of the finding."""
    parameters: tuple[str, str]
    holds: Callable[[float, float], bool]
    message: str
    """With `{0:g}` and `{1:g}` for the values, and `{method}`."""
    remedy: str
    """With `{key}` for the key that sets the second."""


ROOM_FOR_BOTH = Constraint(
    "range",
    ("density", "gamma"),
    lambda density, gamma: density >= 1 or density + gamma <= 1,
    "density {0:g} and gamma {1:g} ask for more than there is; together they must be at most 1",
    "Lower one ({key}).",
)
"""Breadcrumbs: mergekit keeps `density` and removes `gamma` of the largest, which must not overlap."""

PROBABILITIES = Constraint(
    "epsilon",
    ("density", "epsilon"),
    lambda density, epsilon: density >= 1 or density <= 0 or 0 < density - epsilon <= density + epsilon < 1,
    "{method} keeps entries with probabilities from density - epsilon to density + epsilon; "
    "{0:g} ± {1:g} leaves (0, 1)",
    "Lower epsilon ({key}) or move density away from 0 and 1.",
)
"""DELLA: keep probabilities run from density - epsilon to density + epsilon, inside (0, 1)."""
