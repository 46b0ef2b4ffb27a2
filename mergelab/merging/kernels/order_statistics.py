"""Exact selection without sorting: which entry of a huge tensor is the k-th in order.

The bits of a float, read as an integer, are in the order of the floats. Entries are counted by
their high 16 bits, then those that share the wanted ones by the next 16: two ways over a float32
tensor give the exact k-th value, at the cost of a histogram instead of a sort.

Equal values are in the order of their places in the tensor, everywhere: the earlier comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mergelab.merging.kernels.reuse_cache import Reserve

DIGIT = 16
"""Bits that are counted at a time."""

Scan = Callable[[], Iterable[tuple[int, Sequence[Tensor]]]]
"""One way over several columns of keys: (place of the first entry, [n] keys of each column), piece
after piece. Keys are int32 or int64; those of one piece are used before the next is asked for."""


@dataclass(frozen=True)
class Position:
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


def locate(
    scan: Scan, ranks: Sequence[Sequence[int]], width: int, signed: bool = False
) -> list[list[Position]]:
    """The entries that stand at given places in ascending order.

    Args:
        scan: the columns.
        ranks: for each column, the places in ascending order, 0 for the smallest.
        width: bits of a key, 32 or 64.
        signed: whether keys may be negative.
    Returns:
        for each column, an entry a rank.
    """
    found = [[Position(0, 0, 0) for _ in column] for column in ranks]
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
                column[i] = Position(
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


class Ranks(Protocol):
    """Several columns of keys in ascending order, equal ones in the order of their places."""

    def at(self, ranks: Sequence[Sequence[int]]) -> list[list[Position]]:
        """The entries at given places of the order: for each column, one for each of its ranks."""

    def positions(self, wanted: Sequence[Sequence[tuple[int, int]]]) -> list[list[int]]:
        """Where in the tensor the n-th entry of a key stands, as `positions` says."""


@dataclass(frozen=True)
class Scanned:
    """Unsorted columns: every query costs full passes over the data."""

    scan: Scan
    width: int
    """Bits of a key."""

    def at(self, ranks: Sequence[Sequence[int]]) -> list[list[Position]]:
        """As `Ranks` says."""
        return locate(self.scan, ranks, self.width)

    def positions(self, wanted: Sequence[Sequence[tuple[int, int]]]) -> list[list[int]]:
        """As `Ranks` says."""
        return positions(self.scan, wanted)


@dataclass(frozen=True)
class SortedColumn:
    """A column, sorted once: every place of its order is a look-up.

    Tensors have far fewer keys than entries where their files have 16 bits. What is kept is not the
    entries but their runs: how many of a piece of the tensor have one key, in ascending order of keys
    and then of pieces.
    """

    keys: Tensor
    """[runs]"""
    pieces: Tensor
    """[runs], the place of the piece's first entry"""
    ends: Tensor
    """[runs], entries in this run and all before it"""

    def at(self, rank: int) -> Position:
        """The entry at this place of the order."""
        key = int(self.keys[self._run(rank)])
        first, behind = (int(torch.searchsorted(self.keys, key, right=r)) for r in (False, True))
        before = self._before(first)
        return Position(key, before, self._before(behind) - before)

    def piece(self, key: int, n: int) -> tuple[int, int]:
        """The piece in which the n-th entry of a key stands, and how many of its key are before it there."""
        rank = self._before(int(torch.searchsorted(self.keys, key))) + n
        run = self._run(rank)
        return int(self.pieces[run]), rank - self._before(run)

    def _run(self, rank: int) -> int:
        return int(torch.searchsorted(self.ends, rank, right=True))

    def _before(self, run: int) -> int:
        return int(self.ends[run - 1]) if run else 0


RUN = 3 * 8
"""Bytes of a run, at most."""


def orders(scan: Scan, columns: int, take: Reserve) -> list[SortedColumn] | None:
    """Every column sorted, in one way over them; None where the memory does not do.

    Args:
        scan: of keys of 32 bits that are not negative; they are overwritten.
        columns: their number.
        take: asks for memory, see `shared`.
    """
    runs: list[list[tuple[Tensor, Tensor, int]]] = [[] for _ in range(columns)]
    for start, keys in scan():
        for found, column in zip(runs, keys, strict=True):
            distinct, counts = torch.unique_consecutive(sort_rows(column[None])[0], return_counts=True)
            if not take(distinct.numel() * RUN):
                return None
            found.append((distinct, counts.int(), start))
    return [_in_order(found) for found in runs]


def _in_order(runs: list[tuple[Tensor, Tensor, int]]) -> SortedColumn:
    """The runs of all pieces, in the order of their keys."""
    keys, counts = (torch.cat([r[i] for r in runs]) for i in (0, 1))  # type: ignore[misc]
    starts = torch.tensor([start for *_, start in runs], device=keys.device)
    sizes = torch.tensor([distinct.numel() for distinct, *_ in runs], device=keys.device)
    # Pieces come in their order, so a run's number decides among those of one key.
    numbered = (keys.long() << 32).add_(torch.arange(keys.numel(), device=keys.device))
    sort_rows(numbered[None])
    number = numbered & 0xFFFFFFFF
    pieces = torch.repeat_interleave(starts, sizes)[number]
    return SortedColumn((numbered >> 32).int().cpu(), pieces.cpu(), counts[number].cumsum(0).cpu())


class Sorted:
    """Columns that are sorted: a question is a look-up, and at most one piece is read.

    Args:
        orders: of each column.
        find: (column, place, key, n): where the n-th entry of a key stands in the piece that begins
            at the place.
    """

    def __init__(self, orders: Sequence[SortedColumn], find: Callable[[int, int, int, int], int]):
        self._orders, self._find = orders, find

    def at(self, ranks: Sequence[Sequence[int]]) -> list[list[Position]]:
        """As `Ranks` says."""
        return [[o.at(r) for r in column] for o, column in zip(self._orders, ranks, strict=True)]

    def positions(self, wanted: Sequence[Sequence[tuple[int, int]]]) -> list[list[int]]:
        """As `Ranks` says."""
        return [[self._position(c, *pair) for pair in column] for c, column in enumerate(wanted)]

    def _position(self, column: int, key: int, n: int) -> int:
        start, before = self._orders[column].piece(key, n)
        return self._find(column, start, key, before)


def sort_rows(x: Tensor) -> Tensor:
    """Sort each row of [rows, n] in place.

    On the CPU by numpy, whose sort uses vector instructions: 4 to 10 times as fast as torch's there.
    """
    if x.device.type == "cpu":
        x.numpy().sort(axis=1)
        return x
    return x.copy_(torch.sort(x, dim=1).values)


def last_positions(columns: Ranks, at: Sequence[Position], counts: Sequence[int]) -> list[int]:
    """For each column, the place in the tensor of the last of the first `counts` entries of a key; a
    place behind all others where that is all of them."""
    wanted = [[(a.key, m - 1)] if 0 < m < a.equal else [] for a, m in zip(at, counts, strict=True)]
    found = columns.positions(wanted)
    return [f[0] if f else (1 << 62) if m > 0 else -1 for f, m in zip(found, counts, strict=True)]


def largest(columns: Ranks, kept: Sequence[int], n: int) -> list[Cut]:
    """For each column, where its k largest entries begin: at the smallest key among them. Of equal
    keys the earliest entries are taken.

    Args:
        columns: keys that are not negative.
        kept: k of each column, at least 1.
        n: entries of a column.
    """
    smallest = [column[0] for column in columns.at([[n - k] for k in kept])]
    room = [k - (n - at.before - at.equal) for k, at in zip(kept, smallest, strict=True)]
    return [
        Cut(at.key, last) for at, last in zip(smallest, last_positions(columns, smallest, room), strict=True)
    ]


def split(x: Tensor, start: int, last: int) -> tuple[Tensor, Tensor]:
    """The entries of a piece that starts at place `start` of the tensor: up to place `last`, and behind."""
    at = min(max(last + 1 - start, 0), x.numel())
    return x[:at], x[at:]
