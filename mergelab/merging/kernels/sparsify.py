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
from mergelab.merging.kernels.select import bits, largest, lasts, locate, magnitudes, split, value

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
    scan = _scan(group, columns)
    cuts = largest(scan, kept, n, bits(group.dtype))

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
    scan = _scan(group, columns)
    # The last entry below the window, and the last one in it.
    ends = locate(scan, [[max(0, low - 1), max(0, high - 1)] for low, high in windows], bits(group.dtype))
    below = [column[0] for column in ends]
    top = [column[1] for column in ends]
    cuts_low = lasts(scan, below, [low - at.before for (low, _), at in zip(windows, below, strict=True)])
    cuts_top = lasts(scan, top, [high - at.before for (_, high), at in zip(windows, top, strict=True)])

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

    Yu et al. 2023 (https://arxiv.org/abs/2311.03099); random numbers from `noise`.
    """
    columns = _pruned(p["density"])
    keys = {q: noise.key(group.seed, group.name, group.keys[q]) for q in columns}

    def apply(chunk: Chunk, deltas: Tensor) -> None:
        mask = group.buffer("mask", chunk.numel)
        for q in columns:
            drawn = noise.bits(keys[q], chunk.start, chunk.numel, group.buffers)
            deltas[q].mul_(mask.copy_(drawn.lt_(noise.below(p["density"][q]))))

    return Prune(apply)


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


def sort_rows(x: Tensor) -> Tensor:
    """Sort each row of [rows, n] in place.

    On the CPU by numpy, whose sort uses vector instructions: 4 to 10 times as fast as torch's there.
    """
    if x.device.type == "cpu":
        x.numpy().sort(axis=1)
        return x
    return x.copy_(torch.sort(x, dim=1).values)


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
    scales = [1 / d for d in p["density"]] if by_share else _l1(group, prune, masks, p["density"])

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


def _l1(group: Group, prune: Prune, masks: _Masks, density: Sequence[float]) -> list[Tensor | None]:
    """What gives each expert's task vector its L1 norm back; None where nothing does."""

    def norms(chunk: Chunk) -> Tensor:
        deltas, size = chunk.deltas(), group.buffer("sizes", chunk.numel)
        before = [torch.abs(x, out=size).sum() for x in deltas]
        prune.apply(chunk, deltas)
        masks.remember(chunk, deltas)
        return torch.stack([*before, *(torch.abs(x, out=size).sum() for x in deltas)])

    before, after = group.sums(norms, prune.width).view(2, -1)
    return [
        b / a if d < 1 and float(b) >= TINY and float(a) >= TINY else None
        for b, a, d in zip(before, after, density, strict=True)
    ]
