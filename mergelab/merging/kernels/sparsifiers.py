"""Sparsify: which entries of a task vector are kept.

Four ways to choose (magnitude, random, outliers, ranked), one way to make up for what was dropped.
Each function looks at the whole group first and returns a `Prune`, which works on a chunk in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mergelab.merging.kernels import counter_rng
from mergelab.merging.kernels.drop import ALL, Drop, Prune, pruned
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
from mergelab.merging.kernels.rescale import Masks, l1_scales
from mergelab.merging.kernels.reuse_cache import Reserve
from mergelab.merging.kernels.tensor_group import Chunk, Group, Parameters

NONE = (math.inf, math.inf)
"""Bounds below which everything lies: nothing is kept."""
NO_BOUND = (math.inf, math.inf)
"""Bounds above which nothing lies."""

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


def magnitude(group: Group, p: Parameters) -> Prune:
    """Keep the k entries of largest magnitude, k = density * n rounded down, at least 1 but for a density
    of 0; among equal ones the earliest.

    Yadav et al. 2023 (https://arxiv.org/abs/2306.01708), tensor by tensor as mergekit does.
    """
    n, below_one = group.numel, pruned(p["density"])
    nothing = [q for q in below_one if p["density"][q] <= 0]
    columns = [q for q in below_one if q not in nothing]
    kept = [max(1, int(p["density"][q] * n)) for q in columns]
    cuts = dict(zip(columns, largest(_ranks(group, columns), kept, n), strict=True)) if columns else {}
    low = [(ALL, ALL)] * group.count
    for q in nothing:
        low[q] = NONE
    for q, cut in cuts.items():
        if cut.key > 0:  # else only zeros would be dropped
            low[q] = (value(cut.key - 1, group.dtype), value(cut.key, group.dtype))

    def apply(chunk: Chunk, deltas: Tensor) -> None:
        for q, cut in cuts.items():
            _shrink(deltas[q], chunk.start, cut.last, low[q])
        for q in nothing:
            deltas[q].zero_()

    last = [cuts[q].last if q in cuts else 0 for q in range(group.count)]
    return Prune(apply, drop=Drop("window", low, last))


def outliers(group: Group, p: Parameters) -> Prune:
    """Drop the `gamma` share of largest magnitude, and of the rest keep the largest `density` share
    of all entries; in ascending order, equal entries stand in the order of their places.

    Davari and Belilovsky 2024 (https://arxiv.org/abs/2312.06795), with mergekit's rounding.
    """
    n, columns = group.numel, pruned(p["density"])
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

    dropped, kept_up_to = [(ALL, ALL)] * group.count, [NO_BOUND] * group.count
    last_low, last_top = [0] * group.count, [0] * group.count
    for i, q in enumerate(columns):
        (low, high), last_low[q], last_top[q] = windows[i], cuts_low[i], cuts_top[i]
        if high == low or top[i].key == 0:  # nothing, or nothing but zeros
            dropped[q] = NONE
            continue
        if high < n:
            kept_up_to[q] = (value(top[i].key, group.dtype), value(top[i].key - 1, group.dtype))
        if low > 0:
            key = below[i].key
            dropped[q] = (value(key, group.dtype), value(key - 1, group.dtype) if key > 0 else ALL)

    def apply(chunk: Chunk, deltas: Tensor) -> None:
        for q in columns:
            if dropped[q] == NONE:
                deltas[q].zero_()
                continue
            for part, bound in zip(split(deltas[q], chunk.start, last_top[q]), kept_up_to[q], strict=True):
                if bound < math.inf:
                    _clip(group, part, bound)
            _shrink(deltas[q], chunk.start, last_low[q], dropped[q])

    return Prune(apply, drop=Drop("window", dropped, last_low, kept_up_to, last_top))


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

    Yu et al. 2023 (https://arxiv.org/abs/2311.03099); random numbers from `counter_rng`.
    """
    columns = pruned(p["density"])
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
    columns = pruned(p["density"])
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
            if density <= 0:
                x.zero_()
                continue
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
    if not p["rescale"] or not pruned(p["density"]):
        return SPARSIFIERS[kind](group, p)
    by_share = p["rescale_to"] == "density"
    each = by_share and kind == "ranked"
    prune = SPARSIFIERS[kind](group, {**p, "rescale_by_share": each})
    if each:
        return prune
    masks = Masks(group)
    shares = [1 / d if d > 0 else None for d in p["density"]]
    scales = shares if by_share else l1_scales(group, kind, prune, masks, p["density"])

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
