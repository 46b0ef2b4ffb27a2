"""Sparsify: which entries of a task vector are kept.

Four ways to choose (magnitude, random, outliers, ranked), one way to make up for what was dropped.
Each function looks at the whole group first and returns a `Prune`, which works on a chunk in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergelab.merging.kernels import counter_rng
from mergelab.merging.kernels.order_statistics import (
    Ranks,
    Scanned,
    Sorted,
    SortedColumn,
    bits,
    largest,
    last_positions,
    magnitudes,
    orders,
    sort_rows,
    split,
    value,
)
from mergelab.merging.kernels.reuse_cache import Reserve
from mergelab.merging.kernels.tensor_group import Chunk, Group, Parameters

TINY = 1e-7
"""A norm below this is none, and nothing is scaled to it; mergekit's bound."""


@dataclass(frozen=True)
class Drop:
    """What a `Prune` does, as numbers for compiled loops; each list has an item an expert, and where it
    is empty nothing is done of that kind."""

    kind: str = "never"
    """`never`, `window` of magnitudes or `random`."""
    low: Sequence[tuple[float, float]] = ()
    """The largest magnitude that is dropped for being small, up to the place `low_last` of the tensor
    and behind it; -1: none is."""
    low_last: Sequence[int] = ()
    top: Sequence[tuple[float, float]] = ()
    """The largest magnitude that is kept, up to the place `top_last` and behind it."""
    top_last: Sequence[int] = ()
    hashes: Sequence[counter_rng.Key] = ()
    bounds: Sequence[int] = ()
    """The number of `noise.bits` from which on an entry is dropped."""
    scales: Sequence[float] = ()
    """What makes up for what was dropped."""


@dataclass(frozen=True)
class Prune:
    """How to drop entries."""

    apply: Callable[[Chunk, Tensor], None]
    """(chunk, its task vectors [experts, n]): set what is dropped to zero."""
    width: int = 1
    """Chunks have to be whole multiples of this many entries."""
    drop: Drop | None = None
    """The same for compiled loops, if they can."""


Sparsifier = Callable[[Group, Parameters], Prune]


def shrink(x: Tensor, bound: float) -> None:
    """Set entries of magnitude up to `bound` to zero, in place."""
    torch.ops.aten.hardshrink.out(x, bound, out=x)


def _scan(group: Group, columns: Sequence[int]) -> Callable[[], Iterator[tuple[int, list[Tensor]]]]:
    """Ways over the magnitudes of some experts' task vectors."""

    def scan() -> Iterator[tuple[int, list[Tensor]]]:
        for chunk in group.chunks():
            deltas = chunk.deltas()
            yield chunk.start, [magnitudes(deltas[q], out=deltas[q]) for q in columns]

    return scan


def _ranks(group: Group, columns: Sequence[int]) -> Ranks:
    """The order of the magnitudes of some experts' task vectors; sorted for all of a search, if it fits."""
    everyone = range(group.count)

    def sort(take: Reserve) -> list[SortedColumn] | None:
        if bits(group.dtype) != 32:
            return None
        return orders(_scan(group, everyone), group.count, take)

    def find(column: int, start: int, key: int, n: int) -> int:
        size, q = min(group.chunk_size, group.numel - start), columns[column]
        if loops := group.loops:
            return int(loops.place_of(group, q, start, start + size, key, n))
        deltas = group.chunk(start, size).deltas()
        return start + int((magnitudes(deltas[q], out=deltas[q]) == key).nonzero()[n, 0])

    found = group.keep("orders", sort)
    if found is None:
        return Scanned(_scan(group, columns), bits(group.dtype))
    return Sorted([found[q] for q in columns], find)


def _pruned(density: Sequence[float]) -> list[int]:
    """The experts of which anything is dropped."""
    return [q for q, d in enumerate(density) if d < 1]


def magnitude(group: Group, p: Parameters) -> Prune:
    """Keep the k entries of largest magnitude, k = density * n rounded down, at least 1; among equal
    ones the earliest.

    Yadav et al. 2023 (https://arxiv.org/abs/2306.01708), tensor by tensor as mergekit does.
    """
    n, columns = group.numel, _pruned(p["density"])
    kept = [max(1, int(p["density"][q] * n)) for q in columns]
    cuts = dict(zip(columns, largest(_ranks(group, columns), kept, n), strict=True))
    low = [(ALL, ALL)] * group.count
    for q, cut in cuts.items():
        if cut.key > 0:  # else only zeros would be dropped
            low[q] = (value(cut.key - 1, group.dtype), value(cut.key, group.dtype))

    def apply(chunk: Chunk, deltas: Tensor) -> None:
        for q, cut in cuts.items():
            _shrink(deltas[q], chunk.start, cut.last, low[q])

    last = [cuts[q].last if q in cuts else 0 for q in range(group.count)]
    return Prune(apply, drop=Drop("window", low, last))


def outliers(group: Group, p: Parameters) -> Prune:
    """Drop the `gamma` share of largest magnitude, and of the rest keep the largest `density` share
    of all entries; in ascending order, equal entries stand in the order of their places.

    Davari and Belilovsky 2024 (https://arxiv.org/abs/2312.06795), with mergekit's rounding.
    """
    n, columns = group.numel, _pruned(p["density"])
    windows = []
    for q in columns:
        kept = int(p["density"][q] * n)
        low = max(0, n - kept - int(p["gamma"][q] * n))
        windows.append((low, low + kept))
    ranks = _ranks(group, columns)
    # The last entry below the window, and the last one in it.
    ends = ranks.at([[max(0, low - 1), max(0, high - 1)] for low, high in windows])
    below = [column[0] for column in ends]
    top = [column[1] for column in ends]
    cuts_low = last_positions(
        ranks, below, [low - at.before for (low, _), at in zip(windows, below, strict=True)]
    )
    cuts_top = last_positions(
        ranks, top, [high - at.before for (_, high), at in zip(windows, top, strict=True)]
    )

    dropped, kept_up_to = [(ALL, ALL)] * group.count, [(math.inf, math.inf)] * group.count
    last_low, last_top = [0] * group.count, [0] * group.count
    for i, q in enumerate(columns):
        (low, high), last_low[q], last_top[q] = windows[i], cuts_low[i], cuts_top[i]
        if high == low or top[i].key == 0:  # nothing, or nothing but zeros
            dropped[q] = (math.inf, math.inf)
            continue
        if high < n:
            kept_up_to[q] = (value(top[i].key, group.dtype), value(top[i].key - 1, group.dtype))
        if low > 0:
            key = below[i].key
            dropped[q] = (value(key, group.dtype), value(key - 1, group.dtype) if key > 0 else ALL)

    def apply(chunk: Chunk, deltas: Tensor) -> None:
        for q in columns:
            if dropped[q] == (math.inf, math.inf):
                deltas[q].zero_()
                continue
            for part, bound in zip(split(deltas[q], chunk.start, last_top[q]), kept_up_to[q], strict=True):
                if bound < math.inf:
                    _clip(group, part, bound)
            _shrink(deltas[q], chunk.start, last_low[q], dropped[q])

    return Prune(apply, drop=Drop("window", dropped, last_low, kept_up_to, last_top))


ALL = -1.0
"""The bound below which there is nothing: all entries are kept."""


def _shrink(x: Tensor, start: int, last: int, bounds: tuple[float, float]) -> None:
    """Set to zero, in place, what is no larger than a bound: one up to place `last`, one behind it."""
    for part, bound in zip(split(x, start, last), bounds, strict=True):
        if bound >= 0:
            shrink(part, bound)


def _clip(group: Group, x: Tensor, bound: float) -> None:
    """Set entries of magnitude above `bound` to zero, in place."""
    above = group.buffer("above", x.numel())
    torch.ops.aten.hardshrink.out(x, bound, out=above)
    x.sub_(above)


def random(group: Group, p: Parameters) -> Prune:
    """Keep each entry with probability `density`.

    Yu et al. 2023 (https://arxiv.org/abs/2311.03099); random numbers from `noise`.
    """
    columns = _pruned(p["density"])
    keys = counter_rng.keys(group)
    bounds = [counter_rng.below(d) if d < 1 else counter_rng.SPAN // 2 for d in p["density"]]

    def apply(chunk: Chunk, deltas: Tensor) -> None:
        mask = group.buffer("mask", chunk.numel)
        for q in columns:
            drawn = counter_rng.bits(keys[q], chunk.start, chunk.numel, group.buffers)
            deltas[q].mul_(torch.lt(drawn, bounds[q], out=mask))

    return Prune(apply, drop=Drop("random", hashes=keys, bounds=bounds))


def ranked(group: Group, p: Parameters) -> Prune:
    """Keep an entry with a probability that grows with the rank of its magnitude in its row, along the
    last axis (mergekit ranks tensors of three axes and more along the second).

    Deep et al. 2024 (https://arxiv.org/abs/2406.11617), with mergekit's range: rank 0 of n is kept
    with density - epsilon, rank n - 1 with density + epsilon. Equal entries share the middle of
    their ranks. With `rescale_by_share` in the parameters, what is kept is divided by its
    probability, as in the paper.

    Ranks are not made. An entry of rank k is kept if a random rank t is no larger, t uniform over
    the real numbers such that this has the wanted probability; and that the entry at place t of the
    sorted row is smaller says the same.
    """
    columns = _pruned(p["density"])
    keys = counter_rng.keys(group)
    last, by_share = group.row - 1, p.get("rescale_by_share")

    def apply(chunk: Chunk, deltas: Tensor) -> None:
        shape = (chunk.numel // group.row, group.row)
        size, ordered = group.buffer("size", *shape), group.buffer("ordered", *shape)
        t, nearest = (group.buffer(name, *shape, dtype=torch.float32) for name in ("t", "nearest"))
        place = group.buffer("place", *shape, dtype=torch.int64)
        at, same, mask = (group.buffer(name, *shape) for name in ("at", "same", "mask"))
        for q in columns:
            density, epsilon, x = p["density"][q], p["epsilon"][q], deltas[q].view(shape)
            drawn = counter_rng.bits(keys[q], chunk.start, chunk.numel, group.buffers).view(shape)
            if epsilon == 0 or last == 0:  # there are no ranks to tell apart
                x.mul_(mask.copy_(drawn.lt_(counter_rng.below(density))))
                if by_share:
                    x.mul_(1 / density)
                continue
            torch.abs(x, out=size)
            sort_rows(ordered.copy_(size))
            steps = last / (2 * epsilon)
            t.copy_(drawn).mul_(steps / counter_rng.SPAN).add_((0.5 - density + epsilon) * steps)
            place.copy_(torch.round(t, out=nearest).clamp_(0, last))
            torch.gather(ordered, 1, place, out=at)
            torch.eq(size, at, out=same).mul_(torch.le(t, nearest, out=nearest))
            torch.gt(size, at, out=mask).add_(same)
            x.mul_(mask)
            if by_share:
                ranks = torch.searchsorted(ordered, size) + torch.searchsorted(ordered, size, right=True) - 1
                x.div_(ranks.to(group.dtype) * (epsilon / last) + (density - epsilon))

    return Prune(apply, group.row)


SPARSIFIERS: dict[str, Sparsifier] = {
    "magnitude": magnitude, "random": random, "outliers": outliers, "ranked": ranked,
}  # fmt: skip


def sparsifier(kind: str, group: Group, p: Parameters) -> Prune:
    """A way to drop entries, with what makes up for them where `rescale` is on.

    Args:
        kind: a name in SPARSIFIERS.
        p: `density` of each expert, what the kind takes (`gamma`, `epsilon`), `rescale`, and
            `rescale_to`: `l1` gives each task vector the sum of magnitudes that it had before (as
            mergekit does), `density` divides what is kept by the probability of being kept (as the
            papers do).
    """
    if not p["rescale"] or not _pruned(p["density"]):
        return SPARSIFIERS[kind](group, p)
    by_share = p["rescale_to"] == "density"
    each = by_share and kind == "ranked"
    prune = SPARSIFIERS[kind](group, {**p, "rescale_by_share": each})
    if each:
        return prune
    masks = _Masks(group)
    scales = [1 / d for d in p["density"]] if by_share else _l1(group, kind, prune, masks, p["density"])

    def apply(chunk: Chunk, deltas: Tensor) -> None:
        if not masks.apply(chunk, deltas):
            prune.apply(chunk, deltas)
        for x, scale in zip(deltas, scales, strict=True):
            if scale is not None:
                x.mul_(scale)

    drop = (
        replace(prune.drop, scales=[1.0 if s is None else float(s) for s in scales]) if prune.drop else None
    )
    return Prune(apply, prune.width, drop)


class _Masks:
    """What was kept, a bit an entry, where the group has memory to spare for it: numpy packs bits, so
    on the CPU only, where ranks and random numbers cost more than there."""

    def __init__(self, group: Group):
        self._group = group
        self._fits = group.buffers.device.type == "cpu" and group.numel * group.count // 8 <= group.spare
        self._bits: dict[int, np.ndarray[Any, Any]] = {}

    def remember(self, chunk: Chunk, pruned: Tensor) -> None:
        """Note which entries of the pruned task vectors are not zero."""
        if self._fits:
            self._bits[chunk.start] = np.packbits(pruned.ne(0).numpy(), axis=1)

    def apply(self, chunk: Chunk, deltas: Tensor) -> bool:
        """Prune as before, if it is remembered how."""
        if chunk.start not in self._bits:
            return False
        kept = np.unpackbits(self._bits[chunk.start], axis=1, count=chunk.numel)
        deltas.mul_(self._group.buffer("kept", *deltas.shape).copy_(torch.from_numpy(kept)))
        return True


def _l1(
    group: Group, kind: str, prune: Prune, masks: _Masks, density: Sequence[float]
) -> list[Tensor | None]:
    """What gives each expert's task vector its L1 norm back; None where nothing does."""
    found = _known_norms(group, density) if kind == "random" else None
    before, after = found if found is not None else _norms(group, prune, masks, kind in RANDOM)
    return [
        b / a if d < 1 and float(b) >= TINY and float(a) >= TINY else None
        for b, a, d in zip(before, after, density, strict=True)
    ]


RANDOM = ("random", "ranked")
"""Whose norms after the drop are summed in float64: the order of the summands then hardly ever decides
how the sum rounds, and it can be looked up (`_known_norms`). Those of the other kinds are mergekit's."""


def _norms(group: Group, prune: Prune, masks: _Masks, wide: bool) -> Tensor:
    """The L1 norms of the task vectors before the drop and after it: [2, experts].

    Args:
        wide: whether those after it are summed in float64.
    """

    def of(chunk: Chunk) -> Tensor:
        deltas, size = chunk.deltas(), group.buffer("sizes", chunk.numel)
        before = torch.stack([torch.abs(x, out=size).sum() for x in deltas])
        prune.apply(chunk, deltas)
        masks.remember(chunk, deltas)
        sizes = group.buffer("wide sizes", chunk.numel, dtype=torch.float64) if wide else size
        after = torch.stack([sizes.copy_(torch.abs(x, out=size)).sum() for x in deltas])
        return torch.cat([before.to(after.dtype), after])

    return group.sums(of, prune.width).view(2, -1)


@dataclass(frozen=True)
class _Norms:
    """The L1 norms of the task vectors of a group, whatever share of them is dropped at random."""

    whole: Tensor
    """[experts]"""
    up_to: Tensor
    """[experts, 2**16], float64: of the entries whose random number is below -2**15 + 1, + 2, ..."""
    error: float
    """How far `up_to` and a sum in any other order may be apart, relative to it."""


def _known_norms(group: Group, density: Sequence[float]) -> Tensor | None:
    """What `_norms` gives for random masks, without a way over the tensor: [2, experts].

    None where nothing may be kept, where the tensor is too small to gain by it, and where one of the
    sums is so close to the middle of two float32 numbers that another order of summands could round
    to the other one.
    """
    known = group.keep(("norms", *counter_rng.keys(group)), lambda take: _all_norms(group, take))
    if known is None:
        return None
    after = known.whole.clone()
    for q in _pruned(density):
        steps = (counter_rng.below(density[q]) >> 16) + counter_rng.HALF // 2
        sums = known.up_to[q, steps - 1] * torch.tensor([1 - known.error, 1.0, 1 + known.error])
        low, after[q], high = sums.to(group.dtype)
        if low != high:
            return None
    return torch.stack([known.whole, after])


def _all_norms(group: Group, take: Reserve) -> _Norms | None:
    """One way over the chunks: magnitudes are summed by their random numbers."""
    if (
        group.dtype != torch.float32
        or group.numel < counter_rng.HALF
        or not take(8 * counter_rng.HALF * group.count)
    ):
        return None
    keys = counter_rng.keys(group)
    sums = torch.zeros(group.count, counter_rng.HALF, dtype=torch.float64, device=group.buffers.device)

    def by_draw(q: int, sizes: Tensor, start: int) -> Tensor:
        n = sizes.numel()
        if loops := group.loops:
            found: Tensor = loops.sums_by_draw(group, q, keys[q], start, start + n)
            return found
        number = group.buffer("number", n, dtype=torch.int64)
        number.copy_(counter_rng.high(counter_rng.bits(keys[q], start, n, group.buffers))).add_(
            counter_rng.HALF // 2
        )
        wide = group.buffer("wide sizes", n, dtype=torch.float64)
        return torch.bincount(number, wide.copy_(sizes), counter_rng.HALF)

    def of(chunk: Chunk) -> Tensor:
        sizes = chunk.deltas().abs_()
        for q, size in enumerate(sizes):
            sums[q] += by_draw(q, size, chunk.start)
        return torch.stack([size.sum() for size in sizes])

    whole = group.sums(of).cpu()
    # A sum of m numbers that are not negative is off by less than m * 2**-53, whatever their order:
    # here within a chunk and over chunks and numbers, there within a chunk and over chunks.
    summands = 2 * (group.chunk_size + group.numel // group.chunk_size) + counter_rng.HALF + 16
    return _Norms(whole, sums.cumsum_(1).cpu(), summands * 2.0**-52)
