"""What is known of task vectors over some entries: sums, so that parts of a model add up to the whole."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Statistics:
    """Of a base b and the task vectors t_i = expert_i - b, over the entries of one or several tensors."""

    entries: int
    dots: Array
    """[1 + experts, 1 + experts] dot products of b, t_1, t_2 ... in float64."""
    alike: Array
    """[experts, experts] entries where both task vectors have the same sign, and are not zero."""
    both: Array
    """[experts, experts] entries where neither is zero."""
    tops: Array
    """[experts] entries among the largest of each tensor."""
    common: Array
    """[experts, experts] entries that are among the largest of both."""
    expected: Array
    """[experts, experts] what `common` would be if the largest lay where they like: in each tensor the
    product of both numbers over its entries."""

    def __add__(self, other: Statistics) -> Statistics:
        """Of the entries of both."""
        return Statistics(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @cached_property
    def relative(self) -> Array:
        """[experts] |t_i| / |b|; NaN where b is zero."""
        d = self.dots.diagonal()
        return _ratio(np.sqrt(d[1:]), np.sqrt(d[0]))

    @cached_property
    def to_base(self) -> Array:
        """[experts] cosine of each expert's weights and the base's; NaN where either is zero."""
        return _cosines(self._weights)[0, 1:]

    @cached_property
    def between(self) -> Array:
        """[experts, experts] cosines of the experts' weights; NaN where either is zero."""
        return _cosines(self._weights)[1:, 1:]

    @cached_property
    def cosine(self) -> Array:
        """[experts, experts] cosines of the task vectors; NaN where either is zero."""
        return _cosines(self.dots[1:, 1:])

    @cached_property
    def agreement(self) -> Array:
        """[experts, experts] of the entries where neither task vector is zero, the share with the same
        sign; half of them where signs are a matter of chance. NaN where there are none."""
        return _ratio(self.alike, self.both)

    @cached_property
    def overlap(self) -> Array:
        """[experts, experts] |A ∩ B| / sqrt(|A| |B|) of the largest entries A and B of two task vectors
        (Ochiai's coefficient); of as many of either, |A ∩ B| / |A|. NaN where either has none."""
        return _ratio(self.common, self._sizes)

    @cached_property
    def chance(self) -> Array:
        """[experts, experts] what `overlap` comes to by chance; NaN where it is."""
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
