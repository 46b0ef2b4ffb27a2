"""The tensors that make one tensor of the output, a piece at a time.

A merge is memory traffic. A kernel therefore never holds a whole tensor: it goes over *chunks* that
stay in the processor's cache, in buffers that are used again, and where it needs a number that all
entries decide (a norm, a threshold), over all chunks once more. Reading a chunk again costs little
beside writing an intermediate tensor to memory and back.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from mergelab.merging.kernels.buffers import Buffers
from mergelab.merging.kernels.reuse_cache import Reserve, Shared

T = TypeVar("T")

CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Entries of a chunk, by the kind of device. On a CPU the buffers of a chunk fit the cache, and an
operation takes long enough that several threads do not wait for Python's lock; a GPU wants large
pieces. Sums over several chunks round differently with another value, so it is not a setting."""


ALIGNED = 16
"""Entries to whose multiples the rows of a chunk are padded, 64 bytes in float32."""


@dataclass(frozen=True)
class Chunk:
    """A run of entries of every tensor of a group, in the dtype of the arithmetic.

    Its tensors are buffers: a kernel may write into them, and finds the inputs there again on its
    next way over the chunks.
    """

    start: int
    """Place of the first entry in the flattened tensor."""
    base: Tensor
    """[n]; of a group without a base it has no entries."""
    experts: Tensor
    """[experts, n]"""

    @property
    def numel(self) -> int:
        """Entries of one tensor in it."""
        return self.experts.shape[1]

    def deltas(self) -> Tensor:
        """The task vectors, [experts, n], in the place of the experts."""
        return self.experts.sub_(self.base)


@dataclass
class Group:
    """The inputs of one output tensor, all of one shape.

    Args:
        name: of the output tensor; random masks are keyed by it.
        experts: the tensors that are combined, in the dtypes of their files.
        base: the tensor from which task vectors are taken, None for a method without one.
        keys: names of the experts, by which random masks are keyed; by default their numbers.
        seed: of the random masks.
        dtype: of the arithmetic.
        spare: bytes that a kernel may keep from one way over the chunks to the next, to save work.
        shared: what is known from earlier merges of the same inputs.
        compiled: the module of loops compiled for the processor (`numba_kernels`), which then do what they
            can; the bits are the same. None: torch does everything.
        base_at: the place of the base among all inputs of the recipe, for methods that look at it.
    """

    name: str
    experts: Sequence[Tensor]
    base: Tensor | None = None
    keys: Sequence[str] = ()
    seed: int = 0
    dtype: torch.dtype = torch.float32
    buffers: Buffers = field(default_factory=Buffers)
    spare: int = 1 << 28
    shared: Shared | None = None
    compiled: Any = None
    base_at: int = 0

    def __post_init__(self) -> None:
        self.keys = tuple(self.keys) or tuple(str(i) for i in range(len(self.experts)))
        self.inputs = [t.reshape(-1) for t in (*self.experts, *([] if self.base is None else [self.base]))]
        self.shape = next(t.shape for t in (*self.experts, self.base) if t is not None)
        self.numel = self.inputs[0].numel()

    @property
    def row(self) -> int:
        """Entries along the last axis; all of a vector."""
        return self.shape[-1] if len(self.shape) > 1 else self.numel

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(self.experts)

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer in the dtype of the arithmetic."""
        return self.buffers(name, shape, dtype or self.dtype)

    def scalar(self, value: float | Tensor) -> Tensor:
        """A number as a tensor [] in the dtype of the arithmetic."""
        return torch.as_tensor(value, dtype=self.dtype, device=self.buffers.device)

    @cached_property
    def loops(self) -> Any:
        """The compiled loops where they can merge this group, else None."""
        return self.compiled if self.compiled and self.compiled.readable(self) else None

    def keep(self, key: Hashable, make: Callable[[Reserve], T | None]) -> T | None:
        """What earlier merges know under this key (`Shared.get`); None where nothing may be kept."""
        return None if self.shared is None else self.shared.get(key, make)

    @property
    def chunk_size(self) -> int:
        """Entries of a chunk of width 1, at most."""
        return CHUNK["cpu" if self.buffers.device.type == "cpu" else "cuda"]

    def chunks(self, width: int = 1) -> Iterator[Chunk]:
        """All entries in order, in pieces of whole multiples of `width`."""
        step = max(1, self.chunk_size // width) * width
        for start in range(0, self.numel, step):
            yield self.chunk(start, min(step, self.numel - start))

    def chunk(self, start: int, n: int) -> Chunk:
        """A run of n entries."""
        # Rows start where memory is aligned: sums of unaligned ones have another order.
        experts = self.buffer("experts", self.count, -(-n // ALIGNED) * ALIGNED)[:, :n]
        for out, source in zip(experts, self.inputs, strict=False):
            out.copy_(source[start : start + n])
        base = self.buffer("base", n if self.base is not None else 0)
        if self.base is not None:
            base.copy_(self.inputs[-1][start : start + n])
        return Chunk(start, base, experts)

    def sums(self, of: Callable[[Chunk], Tensor], width: int = 1) -> Tensor:
        """`of(chunk)` added up over all chunks.

        Each chunk's part is rounded to the arithmetic's dtype, and the parts are added in float64 in
        the order of the entries: the same numbers however many workers there are, and of a tensor
        that is one chunk the very bits that the operation gives.
        """
        return self.total(of, width).to(self.dtype)

    def norms(self, of: Callable[[Chunk], Tensor], width: int = 1) -> Tensor:
        """The Euclidean norm of a vector, from those of its pieces (`sums` of the squares)."""
        return self.total(lambda chunk: of(chunk).double().square(), width).sqrt().to(self.dtype)

    def total(self, of: Callable[[Chunk], Tensor], width: int = 1) -> Tensor:
        """`sums` before they are rounded, in float64: counts are exact. Of a group with entries."""
        total: Tensor | None = None
        for chunk in self.chunks(width):
            part = of(chunk).double()
            total = part if total is None else total + part
        assert total is not None, "a group without entries is never prepared"
        return total


Parameters = dict[str, Any]
"""What a method's parameters come to for one tensor; those set for each model are lists in the
order of the experts."""


@dataclass(frozen=True)
class SecondPass:
    """The last way over the chunks: what a kernel returns when it knows all that it needs to."""

    combine: Callable[[Chunk], Tensor]
    """From a chunk to the merged entries, [n] (or any shape of n entries)."""
    width: int = 1
    """Chunks have to be whole multiples of this many entries."""
    into: Callable[[Tensor], None] | None = None
    """The same in one go, compiled: writes the whole tensor, flat, where `numba_kernels.writable`."""


Kernel = Callable[[Group, Parameters], SecondPass | Tensor]
"""A merge method. Pure: all that it leaves behind is in the buffers. One that cannot work on chunks returns
the whole merged tensor, of any shape with as many entries."""


def merge(kernel: Kernel, group: Group, parameters: Parameters) -> Iterator[tuple[int, Tensor]]:
    """The output tensor, a piece at a time: (place of the first entry, [n] entries). The entries
    are a buffer, to be used before the next piece is asked for.

    Raises:
        ValueError: where the method has no answer for these tensors.
    """
    if group.numel == 0:
        return
    yield from _pieces(kernel(group, parameters), group)


def _pieces(finish: SecondPass | Tensor, group: Group) -> Iterator[tuple[int, Tensor]]:
    if isinstance(finish, Tensor):
        whole = finish.reshape(-1)
        for start in range(0, whole.numel(), group.chunk_size):
            yield start, whole[start : start + group.chunk_size]
        return
    for chunk in group.chunks(finish.width):
        yield chunk.start, finish.combine(chunk).reshape(-1)


def merge_into(
    out: Tensor, kernel: Kernel, group: Group, parameters: Parameters, rounded: torch.dtype | None = None
) -> None:
    """Write the output tensor into `out`, flat.

    Args:
        rounded: a dtype to which entries are rounded before they get that of `out`.
    Raises:
        ValueError: where the method has no answer for these tensors.
    """
    if group.numel == 0:
        return
    finish = kernel(group, parameters)
    if (
        isinstance(finish, SecondPass)
        and finish.into
        and rounded in (None, out.dtype)
        and group.loops.writable(out)
    ):
        finish.into(out)
        return
    for start, piece in _pieces(finish, group):
        if rounded is not None:
            piece = piece.to(rounded)
        out[start : start + piece.numel()].copy_(piece)
