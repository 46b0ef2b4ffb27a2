"""Make up for what was dropped of a task vector: give it back the sum of magnitudes that it had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergelab.merging.kernels import counter_rng
from mergelab.merging.kernels.drop import Prune, pruned
from mergelab.merging.kernels.reuse_cache import Reserve
from mergelab.merging.kernels.tensor_group import Chunk, Group

TINY = 1e-7
"""A norm below this is none, and nothing is scaled to it; mergekit's bound."""


class Masks:
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


def l1_scales(
    group: Group, kind: str, prune: Prune, masks: Masks, density: Sequence[float]
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


def _norms(group: Group, prune: Prune, masks: Masks, wide: bool) -> Tensor:
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
    for q in pruned(density):
        steps = (counter_rng.below(density[q]) >> 16) + counter_rng.HALF // 2
        if steps == 0:
            after[q] = 0
            continue
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
