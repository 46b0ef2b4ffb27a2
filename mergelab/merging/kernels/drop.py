"""What is dropped of a task vector: as a function on chunks, and as numbers for compiled loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from mergelab.merging.kernels import counter_rng
from mergelab.merging.kernels.tensor_group import Chunk

ALL = -1.0
"""The bound below which there is nothing: all entries are kept."""


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
    """The number of `counter_rng.bits` from which on an entry is dropped."""
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


def pruned(density: Sequence[float]) -> list[int]:
    """The experts that have entries to drop."""
    return [q for q, d in enumerate(density) if d < 1]
