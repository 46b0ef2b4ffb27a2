"""The merge methods: pure functions from a group of tensors and parameters to one tensor.

Torch alone, the same code for CPU and CUDA. What each does to the numbers is mergekit's definition,
operation by operation, so that the results are the same bits; how they are computed is not. A method
without a kernel of its own goes through mergekit's function, on whole tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mergelab.merging.kernels import whole_tensor
from mergelab.merging.kernels.buffers import Buffers
from mergelab.merging.kernels.reuse_cache import Budget, Shared
from mergelab.merging.kernels.tensor_group import (
    Chunk,
    Group,
    Kernel,
    Parameters,
    SecondPass,
    merge,
    merge_into,
)
from mergelab.methods import registry
from mergelab.methods.traits import TRAITS

KERNELS: dict[str, Kernel] = {
    name: getattr(import_module(f"{__name__}.{traits.kernel}"), name)
    for name, traits in TRAITS.items()
    if traits.kernel
}
"""Those that work on chunks, by the names that mergekit gives their methods."""

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
    "kernel_of",
    "merge",
    "merge_into",
    "merge_tensors",
]  # fmt: skip


def kernel_of(method: str) -> Kernel:
    """The kernel of a method: ours, the user's own, or mergekit's function on whole tensors.

    Raises:
        LookupError: for an unknown method.
    """
    if method in KERNELS:
        return KERNELS[method]
    traits = registry.get(method).traits
    if traits.kernel is None:
        return whole_tensor.kernel(registry.function(method), random=traits.random)
    assert callable(traits.kernel)
    kernel: Kernel = traits.kernel
    return kernel


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
        method: its name.
        experts: the tensors to combine, of one shape; of a method without a base, all inputs.
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
    merge_into(out, kernel_of(method), group, dict(parameters))
    return out.view(group.shape)
