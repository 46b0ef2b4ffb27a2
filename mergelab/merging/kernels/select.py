"""Exact selection without sorting: which entry of a huge tensor is the k-th in order.

The bits of a float, read as an integer, are in the order of the floats. Entries are counted by
their high 16 bits, then those that share the wanted ones by the next 16: two ways over a float32
tensor give the exact k-th value, at the cost of a histogram instead of a sort.

Equal values are in the order of their places in the tensor, everywhere: the earlier comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DIGIT = 16
"""Bits that are counted at a time."""

Scan = Callable[[], Iterable[tuple[int, Sequence[Tensor]]]]
"""One way over several columns of keys: (place of the first entry, [n] keys of each column), piece
after piece. Keys are int32 or int64; those of one piece are used before the next is asked for."""


@dataclass(frozen=True)
class Place:
    """An entry in the order of a column."""

    key: int
    before: int
    """Entries of a smaller key."""
    equal: int
    """Entries of this key."""


@dataclass(frozen=True)
class Cut:
    """Where the order of a column is cut in two."""

    key: int
    last: int
    """Entries of this key up to this place in the tensor are on the near side, later ones on the far."""


def magnitudes(x: Tensor, out: Tensor) -> Tensor:
    """Keys in the order of |x|, not negative: [n] ints in the memory of `out`, a float tensor."""
    return torch.abs(x, out=out).view(_integer(x.dtype))


def ordered(x: Tensor) -> Tensor:
    """Keys in the order of x, negative for negative ones: a new tensor [n] of ints."""
    k = x.view(_integer(x.dtype))
    width = 8 * k.element_size() - 1
    return k ^ ((k >> width) & ((1 << width) - 1))


def value(key: int, dtype: torch.dtype) -> float:
    """The float of a key of `magnitudes`."""
    return float(torch.tensor(key, dtype=_integer(dtype)).view(dtype))


def signed_value(key: int, dtype: torch.dtype) -> Tensor:
    """The float, [], of a key of `ordered`."""
    width = bits(dtype) - 1
    return torch.tensor(key if key >= 0 else key ^ ((1 << width) - 1), dtype=_integer(dtype)).view(dtype)


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32


def bits(dtype: torch.dtype) -> int:
    """Bits of a key of floats of this dtype."""
    return 64 if dtype == torch.float64 else 32


def locate(scan: Scan, ranks: Sequence[Sequence[int]], width: int, signed: bool = False) -> list[list[Place]]:
    """The entries that stand at given places in ascending order.

    Args:
        scan: the columns.
        ranks: for each column, the places in ascending order, 0 for the smallest.
        width: bits of a key, 32 or 64.
        signed: whether keys may be negative.
    Returns:
        for each column, an entry a rank.
    """
    found = [[Place(0, 0, 0) for _ in column] for column in ranks]
    for shift in range(width - DIGIT, -1, -DIGIT):
        top = shift == width - DIGIT
        counts: list[dict[int, Tensor]] = [{p.key: torch.zeros(1 << DIGIT, dtype=torch.int64) for p in column}
                                           for column in found]  # fmt: skip
        for _, keys in scan():
            for key, histograms in zip(keys, counts, strict=True):
                for prefix, histogram in histograms.items():
                    histogram += _count(key, prefix, shift, top, signed).to("cpu")
        offset = 1 << (DIGIT - 1) if top and signed else 0
        for column, wanted, histograms in zip(found, ranks, counts, strict=True):
            sums = {prefix: h.cumsum(0) for prefix, h in histograms.items()}
            for i, (p, rank) in enumerate(zip(column, wanted, strict=True)):
                total, histogram = sums[p.key], histograms[p.key]
                digit = int(torch.searchsorted(total, rank - p.before, right=True))
                equal = int(histogram[digit])
                column[i] = Place(
                    (p.key << DIGIT) + digit - offset, p.before + int(total[digit]) - equal, equal
                )
    return found


def _count(key: Tensor, prefix: int, shift: int, top: bool, signed: bool) -> Tensor:
    """How many of the keys whose higher digits are `prefix` have which digit at `shift`: [65536].

    Below the top, the other keys fall into a bin at either end. That is one way over the keys;
    to pick out the right ones first takes longer.
    """
    if top:
        digits = key >> shift
        if signed:
            digits += 1 << (DIGIT - 1)
        return torch.bincount(digits, minlength=1 << DIGIT)
    digits = (key >> shift if shift else key) - (prefix << DIGIT)
    return torch.bincount(digits.clamp_(-1, 1 << DIGIT).add_(1), minlength=(1 << DIGIT) + 2)[1:-1]


def positions(scan: Scan, wanted: Sequence[Sequence[tuple[int, int]]]) -> list[list[int]]:
    """Where in the tensor the n-th entry of a key stands.

    Args:
        scan: the columns.
        wanted: for each column, pairs (key, n), n from 0.
    Returns:
        for each column, a place a pair.
    """
    out = [[-1] * len(column) for column in wanted]
    left = [[n for _, n in column] for column in wanted]
    missing = sum(map(len, wanted))
    if not missing:
        return out
    for start, keys in scan():
        for c, column in enumerate(wanted):
            for i, (key, _) in enumerate(column):
                if out[c][i] >= 0:
                    continue
                equal = keys[c] == key
                count = int(torch.count_nonzero(equal))
                if left[c][i] < count:
                    out[c][i] = start + int(equal.nonzero()[left[c][i], 0])
                    missing -= 1
                left[c][i] -= count
        if not missing:
            break
    return out


def lasts(scan: Scan, at: Sequence[Place], counts: Sequence[int]) -> list[int]:
    """For each column, the place in the tensor of the last of the first `counts` entries of a key; a
    place behind all others where that is all of them."""
    wanted = [[(a.key, m - 1)] if 0 < m < a.equal else [] for a, m in zip(at, counts, strict=True)]
    found = positions(scan, wanted)
    return [f[0] if f else (1 << 62) if m > 0 else -1 for f, m in zip(found, counts, strict=True)]


def largest(scan: Scan, kept: Sequence[int], n: int, width: int) -> list[Cut]:
    """For each column, where its k largest entries begin: at the smallest key among them, of which
    the earliest entries are taken.

    Args:
        scan: the columns, of keys that are not negative.
        kept: k of each column, at least 1.
        n: entries of a column.
        width: bits of a key.
    """
    smallest = [column[0] for column in locate(scan, [[n - k] for k in kept], width)]
    room = [k - (n - at.before - at.equal) for k, at in zip(kept, smallest, strict=True)]
    return [Cut(at.key, last) for at, last in zip(smallest, lasts(scan, smallest, room), strict=True)]


def split(x: Tensor, start: int, last: int) -> tuple[Tensor, Tensor]:
    """The entries of a piece that starts at place `start` of the tensor: up to place `last`, and behind."""
    at = min(max(last + 1 - start, 0), x.numel())
    return x[:at], x[at:]
