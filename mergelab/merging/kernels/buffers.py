"""Memory that is used again from chunk to chunk and from tensor to tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Buffers:
    """Memory that the chunks of a worker share, by name. Not for two threads at once."""

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor with arbitrary content, valid until the same name is asked for again."""
        size = 1
        for n in shape:
            size *= n
        held = self._held.get((name, dtype))
        if held is None or held.numel() < size:
            held = torch.empty(size, dtype=dtype, device=self.device)
            self._held[name, dtype] = held
        return held[:size].view(*shape)

    def once(self, name: str, size: int, dtype: torch.dtype, make: Callable[[int], Tensor]) -> Tensor:
        """The first `size` entries of a constant; `make(n)` gives n of them."""
        held = self._held.get((name, dtype))
        if held is None or held.numel() < size:
            held = self._held[name, dtype] = make(size)
        return held[:size]
