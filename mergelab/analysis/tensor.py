"""Statistics of one tensor of every model, read a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mergelab.analysis.statistics import Array, Statistics
from mergelab.merging import streaming_engine
from mergelab.merging.kernels import order_statistics
from mergelab.merging.kernels.buffers import Buffers
from mergelab.merging.kernels.tensor_group import Chunk, Group
from mergelab.recipes.tensor_plan import SourceTensor

BLOCK = 1 << 23
"""The number of entries after which a file is mapped again, so that pages already read leave the
process, whatever the tensor's size."""


class Tensors:
    """One tensor of the base and of every expert.

    Args:
        base: The base's tensor, of any floating dtype.
        experts: The experts' tensors.
        numel: The number of leading entries to compare; every model has at least as many.
    """

    def __init__(self, base: SourceTensor, experts: Sequence[SourceTensor], numel: int):
        self.sources, self.count, self.numel = (*experts, base), len(experts), numel
        wide = any(s.header.dtype == "F64" for s in self.sources)
        self.dtype = torch.float64 if wide else torch.float32
        self._buffers = Buffers()

    def sums(self, top: float | None) -> Statistics:
        """Compute the statistics, see `streaming.compare`.

        Raises:
            MergeError: A file has changed since its header was read.
        """
        count = self.count
        dots = np.zeros((1 + count, 1 + count))
        same_sign, both_nonzero, common = (np.zeros((count, count), np.int64) for _ in range(3))
        threshold = self._threshold(top) if top is not None and self.numel else None
        for chunk in self._chunks():
            rows = self._buffers("rows", (1 + count, chunk.numel), torch.float64)
            rows[0].copy_(chunk.base)
            deltas = chunk.deltas()
            rows[1:].copy_(deltas)
            dots += _products(rows)
            if threshold is None:
                continue
            # Counts are sums of ones, exact in float32 because a chunk has fewer than 2^24 entries.
            marks = torch.sign(deltas, out=self._buffers("marks", deltas.shape, self.dtype))
            balance = _products(marks).astype(np.int64)
            nonzero = _products(marks.abs_()).astype(np.int64)
            same_sign += (nonzero + balance) // 2
            both_nonzero += nonzero
            marks.copy_(order_statistics.magnitudes(deltas, deltas) >= threshold)
            common += _products(marks).astype(np.int64)
        tops = common.diagonal().copy()
        expected = np.outer(tops, tops) / max(self.numel, 1)
        return Statistics(self.numel, dots, same_sign, both_nonzero, tops, common, expected)

    def _threshold(self, top: float) -> Tensor:
        """[experts, 1] the key of the smallest nonzero magnitude that is among the largest."""

        def scan() -> Iterator[tuple[int, Sequence[Tensor]]]:
            for chunk in self._chunks():
                deltas = chunk.deltas()
                yield chunk.start, list(order_statistics.magnitudes(deltas, deltas))

        rank = self.numel - max(1, round(top * self.numel))
        found = order_statistics.locate(scan, [[rank]] * self.count, order_statistics.bits(self.dtype))
        return torch.tensor([[max(threshold.key, 1)] for (threshold,) in found])

    def _chunks(self) -> Iterator[Chunk]:
        for start in range(0, self.numel, BLOCK):
            yield from self._block(start, min(start + BLOCK, self.numel))

    def _block(self, start: int, stop: int) -> Iterator[Chunk]:
        with streaming_engine.Inputs() as inputs:
            *experts, base = [inputs.tensor(s).reshape(-1)[start:stop] for s in self.sources]
            yield from Group("", experts, base, dtype=self.dtype, buffers=self._buffers).chunks()


def _products(rows: Tensor) -> Array:
    """[n, n] dot products of all rows, in float64."""
    return np.asarray((rows @ rows.T).double().numpy())
