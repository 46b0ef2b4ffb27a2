"""The merge methods: pure functions from a group of tensors and parameters to one tensor.

Torch alone, the same code for CPU and CUDA. What each does to the numbers is mergekit's definition,
operation by operation, so that the results are the same bits; how they are computed is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergelab.merging.kernels import pointwise, spherical, task_vectors
from mergelab.merging.kernels.reuse_cache import Budget, Shared
from mergelab.merging.kernels.tensor_group import (
    Buffers,
    Chunk,
    Group,
    Kernel,
    Parameters,
    SecondPass,
    merge,
    merge_into,
)

KERNELS: dict[str, Kernel] = {
    **{name: task_vectors.kernel(row) for name, row in task_vectors.ROWS.items()},
    "linear": pointwise.linear,
    "passthrough": pointwise.passthrough,
    "nearswap": pointwise.nearswap,
    "model_stock": pointwise.model_stock,
    "sce": pointwise.sce,
    "ram": pointwise.ram,
    "ramplus_tl": pointwise.ramplus_tl,
    "arcee_fusion": pointwise.arcee_fusion,
    "slerp": spherical.slerp,
    "nuslerp": spherical.nuslerp,
    "multislerp": spherical.multislerp,
    "karcher": spherical.karcher,
}
"""By the names that mergekit gives them."""

VERSION = 2
"""Raised whenever a kernel's results change: a merge is not continued with other kernels."""

__all__ = [
    "KERNELS",
    "VERSION",
    "Budget",
    "Buffers",
    "Chunk",
    "Group",
    "Kernel",
    "Parameters",
    "SecondPass",
    "Shared",
    "merge",
    "merge_into",
    "merge_tensors",
]  # fmt: skip


def merge_tensors(
    method: str,
    experts: Sequence[Tensor],
    parameters: Mapping[str, Any],
    *,
    base: Tensor | None = None,
    name: str = "",
    keys: Sequence[str] = (),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Tensor:
    """One output tensor, whole.

    Args:
        method: a name in KERNELS.
        experts: the tensors to combine, of one shape; of a method that knows no base, all inputs.
        parameters: all that the method takes; those set for each model as lists in the experts' order.
        base: the tensor from which task vectors are taken.
        name: the output tensor's name; with `seed` and `keys` it decides random masks.
        keys: the experts' names.
        dtype: of the arithmetic.
        out_dtype: of the result; None: the first expert's.
    Raises:
        ValueError: where the method has no answer for these tensors.
    """
    group = Group(name, experts, base, keys, seed, dtype, Buffers(device))
    out = torch.empty(group.numel, dtype=out_dtype or group.inputs[0].dtype, device=device)
    merge_into(out, KERNELS[method], group, dict(parameters))
    return out.view(group.shape)
