"""The last way over the tensors of a method on task vectors, compiled for the processor by numba.

torch goes over memory once for every operation. Here all of them are one loop over blocks that stay in
the innermost cache, read and merged at once. Operation by operation it is what `task_vectors` does with
torch, in float32 and in the same order, so that the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numba import float32, int32, int64, njit, uint16, uint32
from torch import Tensor

from mergelab.merging.kernels import counter_rng
from mergelab.merging.kernels.drop import ALL, Drop
from mergelab.merging.kernels.tensor_group import Chunk, Group

BLOCK = 1024
"""Entries that are merged at a time."""

STEPS = np.arange(BLOCK, dtype=np.uint32) * np.uint32(counter_rng.WEYL)
"""What the entries of a block add to a counter of `counter_rng.bits`: a table is faster than the product."""

PIECE = 1 << 20
"""Entries of a call: between two of them a merge can be stopped."""

NEVER, WINDOW, RANDOM = range(3)
KINDS = {"never": NEVER, "window": WINDOW, "random": RANDOM}
"""By the names of `drop.Drop`."""

ROWS = 16
"""So many rows torch adds one after another, more of them in another order."""
FEW_ROWS, ALIGNED = 4, 64
"""Of more than a few rows it adds in another order, too, what follows the last whole run of entries."""

READ = {torch.bfloat16: (torch.int16, np.uint16), torch.float32: (torch.int32, np.uint32)}
"""dtypes that can be read: as integers of torch and of numpy."""

options: dict[str, Any] = {"nogil": True, "cache": True, "boundscheck": False, "error_model": "numpy"}


def readable(group: Group) -> bool:
    """Whether a group can be merged here: in float32, of tensors of one dtype on the CPU."""
    first = group.inputs[0].dtype
    return (
        group.dtype == torch.float32
        and first in READ
        and group.base is not None
        and 0 < group.count <= ROWS
        and all(t.dtype == first and t.device.type == "cpu" and t.is_contiguous() for t in group.inputs)
    )


def writable(out: Tensor) -> bool:
    """Whether a merged tensor can be written here."""
    return out.dtype in READ and out.device.type == "cpu" and out.is_contiguous()


def words(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The entries of a tensor as unsigned integers: the same memory."""
    signed, unsigned = READ[tensor.dtype]
    return tensor.view(signed).numpy().view(unsigned)


def finish(
    group: Group, drop: Drop, weights: Tensor, by_torch: Callable[[Chunk], Tensor], *, consensus: bool,
    normalize: bool, total: float, scale: float,
) -> Callable[[Tensor], None]:  # fmt: skip
    """What writes the merged tensor, flat, in the dtype of what it is given: see `combine`.

    Args:
        by_torch: the same of a chunk, for a last one that torch adds in an order of its own.
    """
    count, end = group.count, group.numel
    if count > FEW_ROWS and end % ALIGNED:
        end = (end - 1) // group.chunk_size * group.chunk_size
    *experts, base = (words(t) for t in group.inputs)

    def floats(values: Sequence[Any]) -> np.ndarray[Any, Any]:
        return np.array(values, np.float32)

    def integers(values: Sequence[Any]) -> np.ndarray[Any, Any]:
        return np.array(values, np.int64)

    arguments = (
        base, tuple(experts), KINDS[drop.kind], floats(drop.low or [(ALL, ALL)] * count),
        floats(drop.top or [(np.inf, np.inf)] * count), integers(drop.low_last or [0] * count),
        integers(drop.top_last or [0] * count), integers(drop.hashes or [(0, 0)] * count),
        integers(drop.bounds or [0] * count), floats(drop.scales or [1] * count),
        weights.numpy(), consensus, normalize, np.float32(total), np.float32(scale),
    )  # fmt: skip

    def into(out: Tensor) -> None:
        target = words(out)
        for start in range(0, end, PIECE):
            combine(target[start : min(start + PIECE, end)], start, *arguments)
        if end < group.numel:
            out[end:].copy_(by_torch(group.chunk(end, group.numel - end)))

    return into


def place_of(group: Group, expert: int, start: int, stop: int, key: int, n: int) -> int:
    """Where the n-th entry from `start` on stands, n from 0, whose task vector has this key of
    `order_statistics.magnitudes`; -1: nowhere before `stop`."""
    return int(nth(words(group.inputs[-1]), words(group.inputs[expert]), start, stop, key, n))


def sums_by_draw(group: Group, expert: int, hashed: tuple[int, int], start: int, stop: int) -> Tensor:
    """Magnitudes of a task vector summed by the high half of their random numbers: [2**16] float64."""
    out = np.zeros(counter_rng.HALF)
    by_draw(words(group.inputs[-1]), words(group.inputs[expert]), start, stop, *hashed, out)
    return torch.from_numpy(out)


@njit(inline="always", **options)
def _load(source: Any, start: int, n: int, out: Any) -> None:
    """Entries start to start + n as the bits of float32."""
    part = source[start : start + n]
    if part.itemsize == 2:
        for j in range(n):
            out[j] = uint32(part[j]) << uint32(16)
    else:
        for j in range(n):
            out[j] = part[j]


@njit(inline="always", **options)
def _store(x: Any, out: Any) -> None:
    """The entries of x as the words of the dtype that `out` has: rounded to the nearest, ties to even."""
    u = x.view(np.uint32)
    if out.itemsize == 2:
        for j in range(x.shape[0]):
            word = uint32(uint32(u[j] + uint32(uint32(u[j] >> uint32(16)) & uint32(1))) + uint32(0x7FFF))
            out[j] = uint16(word >> uint32(16)) if x[j] == x[j] else uint16(0x7FC0)
    else:
        for j in range(x.shape[0]):
            out[j] = u[j]


@njit(inline="always", **options)
def _drop_up_to(x: Any, bound: float) -> None:
    """Set what is no larger than a bound to zero, as torch's hardshrink; nothing is below 0."""
    if bound >= 0:
        for j in range(x.shape[0]):
            x[j] = float32(0) if abs(x[j]) <= bound else x[j]


@njit(inline="always", **options)
def _drop_above(x: Any, bound: float) -> None:
    """Take what is larger than a bound from itself: 0, and what is not finite becomes no number. Nothing
    is above infinity."""
    if bound < np.inf:
        for j in range(x.shape[0]):
            x[j] -= float32(0) if abs(x[j]) <= bound else x[j]


@njit(inline="always", **options)
def _hashed(counter: Any, fold: Any) -> Any:
    """`counter_rng.bits` of a counter that has the first half of the key in it."""
    h = uint32(uint32(counter ^ uint32(counter >> uint32(16))) * uint32(counter_rng.FIRST))
    h = uint32(uint32(uint32(h ^ uint32(h >> uint32(15))) ^ fold) * uint32(counter_rng.SECOND))
    return int32(uint32(h ^ uint32(h >> uint32(15))))


@njit(inline="always", **options)
def _draw(x: Any, start: int, first: int, second: int, bound: int) -> None:
    """Multiply by 1 where the random number of `counter_rng.bits` is below the bound, by 0 elsewhere."""
    begin, fold, last = uint32(start * counter_rng.WEYL + first), uint32(second), int32(bound - 1)
    for j in range(x.shape[0]):
        x[j] = x[j] if _hashed(uint32(begin + STEPS[j]), fold) <= last else x[j] * float32(0)


@njit(**options)
def combine(
    out: Any, start: int, base: Any, experts: Any, drop: int, low: Any, top: Any, low_last: Any,
    top_last: Any, hashes: Any, bounds: Any, scales: Any, weights: Any, consensus: bool, normalize: bool,
    total: float, scale: float,
) -> None:  # fmt: skip
    """Entries start to start + len(out) of the merged tensor, in float32.

    Args:
        base, experts: all entries, as `words`; the experts as a tuple.
        drop: what is dropped, NEVER, WINDOW or RANDOM.
        low, top: [experts, 2] float32, the largest magnitude that is dropped for being small, and that
            is kept: up to the place `low_last`, `top_last` [experts] of the tensor, and behind it.
            `ALL` and infinity: none is dropped.
        hashes: [experts, 2], keys of the random numbers.
        bounds: [experts], the number from which on an entry is dropped.
        scales: [experts] float32, what a pruned task vector is multiplied with.
        weights: [experts] float32
        consensus: whether signs vote.
        normalize: whether the sum of weights divides.
        total: float32, that sum where signs do not vote.
        scale: float32, the last factor, lambda.
    """
    count = len(experts)
    base_block, sum_block = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    mixed_block, divisor_block = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    blocks = np.empty((count, BLOCK), np.float32)
    for at in range(0, out.shape[0], BLOCK):
        n = min(BLOCK, out.shape[0] - at)
        place = start + at
        y, sums, mixed, divisor = base_block[:n], sum_block[:n], mixed_block[:n], divisor_block[:n]
        _load(base, place, n, y.view(np.uint32))
        sums[:] = float32(0)
        for q in range(count):
            x = blocks[q, :n]
            _load(experts[q], place, n, x.view(np.uint32))
            for j in range(n):
                x[j] -= y[j]
            if drop == WINDOW:
                split = min(max(top_last[q] + 1 - place, 0), n)
                _drop_above(x[:split], top[q, 0])
                _drop_above(x[split:], top[q, 1])
                split = min(max(low_last[q] + 1 - place, 0), n)
                _drop_up_to(x[:split], low[q, 0])
                _drop_up_to(x[split:], low[q, 1])
            elif drop == RANDOM:
                _draw(x, place, hashes[q, 0], hashes[q, 1], bounds[q])
            factor, weight = scales[q], weights[q]
            for j in range(n):
                x[j] = x[j] * factor * weight
            for j in range(n):
                sums[j] += x[j]
        if consensus:
            mixed[:] = float32(0)
            divisor[:] = float32(0)
            for q in range(count):
                x, weight = blocks[q, :n], weights[q]
                for j in range(n):
                    size = x[j] * (float32(1) if sums[j] >= float32(0) else float32(-1))
                    # What is no number stays none, as with torch's relu.
                    mixed[j] += float32(0) if size <= float32(0) else size
                    divisor[j] += weight if size > float32(0) else float32(0)
            for j in range(n):
                sums[j] = mixed[j] * (float32(1) if sums[j] >= float32(0) else float32(-1))
            if normalize:
                for j in range(n):
                    sums[j] /= divisor[j] + (float32(1) if divisor[j] == float32(0) else float32(0))
        elif normalize:
            for j in range(n):
                sums[j] /= total
        if scale != 1:
            for j in range(n):
                sums[j] *= scale
        for j in range(n):
            sums[j] += y[j]
        _store(sums, out[at : at + n])


@njit(**options)
def nth(base: Any, expert: Any, start: int, stop: int, key: int, n: int) -> int:
    """See `place_of`."""
    expert_block, base_block = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    left = int64(n)
    for place in range(start, stop, BLOCK):
        m = min(BLOCK, stop - place)
        x, y = expert_block[:m], base_block[:m]
        keys = x.view(np.uint32)
        _load(expert, place, m, keys)
        _load(base, place, m, y.view(np.uint32))
        for j in range(m):
            x[j] = abs(x[j] - y[j])
        found = int64(0)
        for j in range(m):
            found += keys[j] == uint32(key)
        if left >= found:
            left -= found
            continue
        for j in range(m):
            if keys[j] == uint32(key):
                if left == 0:
                    return place + j
                left -= 1
    return -1


@njit(**options)
def by_draw(base: Any, expert: Any, start: int, stop: int, first: int, second: int, out: Any) -> None:
    """Add to `out`, [2**16], see `sums_by_draw`."""
    expert_block, base_block = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    drawn, fold = np.empty(BLOCK, np.int32), uint32(second)
    for place in range(start, stop, BLOCK):
        m = min(BLOCK, stop - place)
        x, y = expert_block[:m], base_block[:m]
        _load(expert, place, m, x.view(np.uint32))
        _load(base, place, m, y.view(np.uint32))
        begin = uint32(place * counter_rng.WEYL + first)
        for j in range(m):
            x[j] = abs(x[j] - y[j])
        for j in range(m):
            drawn[j] = (_hashed(uint32(begin + STEPS[j]), fold) >> 16) + counter_rng.HALF // 2
        for j in range(m):
            out[drawn[j]] += x[j]
