"""Statistics of task vectors, kept as sums so that those of a model's parts add up to those of the whole."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Statistics:
    """Sums over the entries of one or several tensors, for a base b and task vectors t_i = expert_i - b."""

    entries: int
    dots: Array
    """[1 + experts, 1 + experts] dot products of b, t_1, t_2 ... in float64."""
    same_sign: Array
    """[experts, experts] number of entries where both task vectors are nonzero with the same sign."""
    both_nonzero: Array
    """[experts, experts] number of entries where neither is zero."""
    tops: Array
    """[experts] number of entries that are among the largest of their tensor."""
    common: Array
    """[experts, experts] number of entries that are among the largest of both."""
    expected: Array
    """[experts, experts] the expected `common` for independent positions: in each tensor the product of both
    numbers divided by the number of entries."""

    def __add__(self, other: Statistics) -> Statistics:
        """The statistics of the entries of both."""
        return Statistics(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @cached_property
    def relative_norm(self) -> Array:
        """[experts] |t_i| / |b|; NaN if b is zero."""
        d = self.dots.diagonal()
        return _ratio(np.sqrt(d[1:]), np.sqrt(d[0]))

    @cached_property
    def cosine_to_base(self) -> Array:
        """[experts] cosine of each expert's weights and the base's; NaN if either is zero."""
        return _cosines(self._weights)[0, 1:]

    @cached_property
    def cosine_between(self) -> Array:
        """[experts, experts] cosines of the experts' weights; NaN if either is zero."""
        return _cosines(self._weights)[1:, 1:]

    @cached_property
    def cosine(self) -> Array:
        """[experts, experts] cosines of the task vectors; NaN if either is zero."""
        return _cosines(self.dots[1:, 1:])

    @cached_property
    def agreement(self) -> Array:
        """[experts, experts] share of entries with the same sign, among those where neither task vector is
        zero. One half for random signs, NaN if there are no such entries."""
        return _ratio(self.same_sign, self.both_nonzero)

    @cached_property
    def overlap(self) -> Array:
        """[experts, experts] |A ∩ B| / sqrt(|A| |B|) for the largest entries A and B of two task vectors
        (Ochiai's coefficient). |A ∩ B| / |A| for equal sizes, NaN if either is empty."""
        return _ratio(self.common, self._sizes)

    @cached_property
    def overlap_by_chance(self) -> Array:
        """[experts, experts] expected `overlap` for independent positions; NaN where `overlap` is."""
        return _ratio(self.expected, self._sizes)

    @property
    def _weights(self) -> Array:
        """[1 + experts, 1 + experts] dot products of the weights: b, b + t_1, b + t_2 ..."""
        change = np.eye(len(self.dots))
        change[1:, 0] = 1.0
        return np.asarray(change @ self.dots @ change.T)

    @property
    def _sizes(self) -> Array:
        tops = self.tops.astype(np.float64)
        return np.sqrt(np.outer(tops, tops))


def _ratio(above: Array, below: Array) -> Array:
    """The quotient in float64, NaN where it divides by zero."""
    above, below = np.broadcast_arrays(np.asarray(above, np.float64), np.asarray(below, np.float64))
    out = np.full(above.shape, np.nan)
    np.divide(above, below, out=out, where=below > 0)
    return out


def _cosines(dots: Array) -> Array:
    """Cosines from dot products, within [-1, 1] whatever the last bits say."""
    norms = np.sqrt(np.maximum(dots.diagonal(), 0.0))
    return _ratio(dots, np.outer(norms, norms)).clip(-1.0, 1.0)
