"""mergekit's merges of single tensors, with what is left to chance in them decided by a rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mergekit.merge_methods import registered_methods
from mergekit.merge_methods.api import merge_tensors
from torch import Tensor

METHODS = {m.spec.name: m for m in registered_methods()}
"""mergekit's own, by name."""


@contextmanager
def stable_sorts() -> Iterator[None]:
    """torch sorts stably, the earlier of equal entries first, and in one thread.

    Task vectors of bfloat16 models are full of equal magnitudes: which of them mergekit keeps is an
    accident of an unstable sort. Its sums depend on the number of threads.
    """
    argsort, sort, topk, threads = torch.argsort, torch.sort, torch.topk, torch.get_num_threads()

    def stable_topk(x: Tensor, k: int, largest: bool = True) -> tuple[None, Tensor]:
        return None, argsort(x, descending=largest, stable=True)[:k]

    torch.argsort = lambda *a, **k: argsort(*a, **{**k, "stable": True})
    torch.sort = lambda *a, **k: sort(*a, **{**k, "stable": True})
    torch.topk = stable_topk
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.argsort, torch.sort, torch.topk = argsort, sort, topk
        torch.set_num_threads(threads)


def merge(
    method: str,
    experts: Sequence[Tensor],
    parameters: Mapping[str, Any],
    *,
    base: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """What `mergelab.merging.kernels.merge_tensors` does, by mergekit; with `stable_sorts` around it."""
    first = 0 if base is None else 1
    known = {p.name for p in METHODS[method].spec.parameters}
    theirs = {
        name: dict(enumerate(value, first)) if isinstance(value, list) else value
        for name, value in parameters.items()
        if name in known
    }
    merged: Tensor = merge_tensors(
        [*([] if base is None else [base]), *experts],
        METHODS[method],
        parameters=theirs,
        base_index=None if base is None else 0,
        dtype=dtype,
        out_dtype=out_dtype or experts[0].dtype,
    )
    return merged
