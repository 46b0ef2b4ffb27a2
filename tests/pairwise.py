"""A few rows out of a full product: each value of an axis still meets each value of each other axis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

Pair = tuple[tuple[int, int], tuple[int, int]]
"""Two values, each by its axis and its place there; that of the earlier axis first."""


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value of each axis in which each pair of values of two axes occurs.

    Greedy, and the same each time: a row begins with the first pair that is still missing, then each
    axis takes the value that brings most missing pairs; among equals the one that was taken least.
    """
    left: dict[Pair, None] = {
        ((i, a), (j, b)): None
        for i, j in combinations(range(len(axes)), 2)
        for a in range(len(axes[i]))
        for b in range(len(axes[j]))
    }
    taken: Counter[tuple[int, int]] = Counter()
    rows = []
    while left:
        row = dict(next(iter(left)))
        for axis in range(len(axes)):
            if axis not in row:
                others = list(row.items())
                choices = [(axis, value) for value in range(len(axes[axis]))]
                news = [sum(tuple(sorted((c, other))) in left for other in others) for c in choices]
                row[axis] = max(choices, key=lambda c: (news[c[1]], -taken[c], -c[1]))[1]
        cells = sorted(row.items())
        for pair in combinations(cells, 2):
            left.pop(pair, None)
        taken.update(cells)
        rows.append(tuple(axes[axis][value] for axis, value in cells))
    return rows
