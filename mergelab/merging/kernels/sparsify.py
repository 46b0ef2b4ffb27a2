"""Sparsify: which entries of a task vector are kept.

Four ways to choose (magnitude, random, outliers, ranked), one way to make up for what was dropped.
Each function looks at the whole group first and returns a `Prune`, which works on a chunk in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergelab.merging.kernels import noise
from mergelab.merging.kernels.group import Chunk, Group, Parameters
from mergelab.merging.kernels.select import (
    Order,
    Ranks,
    Scanned,
    Sorted,
    bits,
    largest,
    lasts,
    magnitudes,
    orders,
    sort_rows,
    split,
    value,
)
from mergelab.merging.kernels.shared import Take

TINY = 1e-7
"""A norm below this is none, and nothing is scaled to it; mergekit's bound."""


@dataclass(frozen=True)
class Prune:
    """How to drop entries."""

    apply: Callable[[Chunk, Tensor], None]
    """(chunk, its task vectors [experts, n]): set what is dropped to zero."""
    width: int = 1
    """Chunks have to be whole multiples of this many entries."""


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

    def sort(take: Take) -> list[Order] | None:
        if bits(group.dtype) != 32:
            return None
        return orders(_scan(group, everyone), group.count, take)

    def piece(column: int, start: int) -> Tensor:
        deltas = group.chunk(start, min(group.chunk_size, group.numel - start)).deltas()
        return magnitudes(deltas[columns[column]], out=deltas[columns[column]])

    found = group.keep("orders", sort)
    if found is None:
        return Scanned(_scan(group, columns), bits(group.dtype))
    return Sorted([found[q] for q in columns], piece)


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
    cuts = largest(_ranks(group, columns), kept, n)

    def apply(chunk: Chunk, deltas: Tensor) -> None:
        for q, cut in zip(columns, cuts, strict=True):
            early, late = split(deltas[q], chunk.start, cut.last)
            if cut.key > 0:  # else only zeros would be dropped
                shrink(early, value(cut.key - 1, group.dtype))
                shrink(late, value(cut.key, group.dtype))

    return Prune(apply)


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
    cuts_low = lasts(ranks, below, [low - at.before for (low, _), at in zip(windows, below, strict=True)])
    cuts_top = lasts(ranks, top, [high - at.before for (_, high), at in zip(windows, top, strict=True)])

    def apply(chunk: Chunk, deltas: Tensor) -> None:
        for i, q in enumerate(columns):
            low, high = windows[i]
            if high == low or (top[i].key == 0):  # nothing, or nothing but zeros
                deltas[q].zero_()
                continue
            if high < n:
                early, late = split(deltas[q], chunk.start, cuts_top[i])
                _clip(group, early, value(top[i].key, group.dtype))
                _clip(group, late, value(top[i].key - 1, group.dtype))
            if low > 0:
                early, late = split(deltas[q], chunk.start, cuts_low[i])
                shrink(early, value(below[i].key, group.dtype))
                if below[i].key > 0:
                    shrink(late, value(below[i].key - 1, group.dtype))

    return Prune(apply)


def _clip(group: Group, x: Tensor, bound: float) -> None:
    """Set entries of magnitude above `bound` to zero, in place."""
    above = group.buffer("above", x.numel())
    torch.ops.aten.hardshrink.out(x, bound, out=above)
    x.sub_(above)


def random(group: Group, p: Parameters) -> Prune:
    """Keep each entry with probability `density`.

    Yu et al. 2023 (https://arxiv.org/abs/2311.03099); random numbers from `noise`, in a search kept.
    """
    columns = _pruned(p["density"])
    draws = {q: Draws(group, q) for q in columns}
    bounds = {q: noise.below(p["density"][q]) >> 16 for q in columns}

    def apply(chunk: Chunk, deltas: Tensor) -> None:
        mask = group.buffer("mask", chunk.numel)
        for q in columns:
            deltas[q].mul_(torch.lt(draws[q](chunk), bounds[q], out=mask))

    return Prune(apply)


class Draws:
    """The random numbers of an expert, kept in 16 bits where there is memory for all."""

    def __init__(self, group: Group, column: int):
        self._group = group
        self._key = noise.key(group.seed, group.name, group.keys[column])
        self._kept = group.keep(("draws", self._key), self._make)

    def __call__(self, chunk: Chunk) -> Tensor:
        """Those of a chunk: [n] ints from -2**15 to 2**15 - 1."""
        if self._kept is not None:
            return self._kept[chunk.start : chunk.start + chunk.numel]
        return self._draw(chunk.start, chunk.numel)

    def _draw(self, start: int, n: int) -> Tensor:
        return noise.high(noise.bits(self._key, start, n, self._group.buffers))

    def _make(self, take: Take) -> Tensor | None:
        n, step = self._group.numel, self._group.chunk_size
        if not take(2 * n):
            return None
        kept = torch.empty(n, dtype=torch.int16, device=self._group.buffers.device)
        for start in range(0, n, step):
            part = kept[start : start + step]
            part.copy_(self._draw(start, part.numel()))
        return kept


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
    keys = {q: noise.key(group.seed, group.name, group.keys[q]) for q in columns}
    last, by_share = group.row - 1, p.get("rescale_by_share")

    def apply(chunk: Chunk, deltas: Tensor) -> None:
        shape = (chunk.numel // group.row, group.row)
        size, ordered = group.buffer("size", *shape), group.buffer("ordered", *shape)
        t, nearest = (group.buffer(name, *shape, dtype=torch.float32) for name in ("t", "nearest"))
        place = group.buffer("place", *shape, dtype=torch.int64)
        at, same, mask = (group.buffer(name, *shape) for name in ("at", "same", "mask"))
        for q in columns:
            density, epsilon, x = p["density"][q], p["epsilon"][q], deltas[q].view(shape)
            drawn = noise.bits(keys[q], chunk.start, chunk.numel, group.buffers).view(shape)
            if epsilon == 0 or last == 0:  # there are no ranks to tell apart
                x.mul_(mask.copy_(drawn.lt_(noise.below(density))))
                if by_share:
                    x.mul_(1 / density)
                continue
            torch.abs(x, out=size)
            sort_rows(ordered.copy_(size))
            steps = last / (2 * epsilon)
            t.copy_(drawn).mul_(steps / noise.SPAN).add_((0.5 - density + epsilon) * steps)
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

    return Prune(apply, prune.width)


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
    keys = tuple(noise.key(group.seed, group.name, k) for k in group.keys)
    known = group.keep(("norms", keys), lambda take: _all_norms(group, take))
    if known is None:
        return None
    after = known.whole.clone()
    for q in _pruned(density):
        steps = (noise.below(density[q]) >> 16) + noise.HALF // 2
        sums = known.up_to[q, steps - 1] * torch.tensor([1 - known.error, 1.0, 1 + known.error])
        low, after[q], high = sums.to(group.dtype)
        if low != high:
            return None
    return torch.stack([known.whole, after])


def _all_norms(group: Group, take: Take) -> _Norms | None:
    """One way over the chunks: magnitudes are summed by their random numbers."""
    device = group.buffers.device
    if group.dtype != torch.float32 or group.numel < noise.HALF or not take(8 * noise.HALF * group.count):
        return None
    draws = [Draws(group, q) for q in range(group.count)]
    sums = torch.zeros(group.count, noise.HALF, dtype=torch.float64, device=device)

    def of(chunk: Chunk) -> Tensor:
        sizes = chunk.deltas().abs_()
        number = group.buffer("number", chunk.numel, dtype=torch.int64)
        wide = group.buffer("wide sizes", chunk.numel, dtype=torch.float64)
        for total, size, drawn in zip(sums, sizes, draws, strict=True):
            number.copy_(drawn(chunk)).add_(noise.HALF // 2)
            total += torch.bincount(number, wide.copy_(size), noise.HALF)
        return torch.stack([size.sum() for size in sizes])

    whole = group.sums(of).cpu()
    # A sum of m numbers that are not negative is off by less than m * 2**-53, whatever their order:
    # here within a chunk and over chunks and numbers, there within a chunk and over chunks.
    summands = 2 * (group.chunk_size + group.numel // group.chunk_size) + noise.HALF + 16
    return _Norms(whole, sums.cumsum_(1).cpu(), summands * 2.0**-52)
