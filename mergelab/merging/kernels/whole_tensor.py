"""A kernel for any method that mergekit can execute: its own function, on whole tensors.

For methods that bring no kernel on chunks. It holds the inputs of a tensor in the dtype of the arithmetic,
and what the function makes of them.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergelab.core.errors import typed_line
from mergelab.core.registry import line_of
from mergelab.merging.kernels import counter_rng
from mergelab.merging.kernels.tensor_group import Group, Kernel, Parameters

if TYPE_CHECKING:
    from mergekit.merge_methods import MergeMethod

_drawing = threading.Lock()
"""Held while a method draws from torch's generators, which all threads of a process share."""


def kernel(method: MergeMethod, *, random: bool) -> Kernel:
    """The kernel of a method of mergekit's registry.

    Args:
        random: whether it draws random numbers. They are then those of the seed and the tensor's name,
            however many workers there are; one tensor is merged at a time.
    """
    spec = method.spec
    names = {p.name for p in spec.parameters}

    def prepare(group: Group, p: Parameters) -> Tensor:
        from mergekit.merge_methods.api import merge_tensors

        device = group.buffers.device if spec.uses_accelerator else torch.device("cpu")
        tensors = [t.to(device) for t in group.experts]
        base_at = None
        if group.base is not None:
            base_at = min(group.base_at, len(tensors))
            tensors.insert(base_at, group.base.to(device))
        versions = _versions(tensors)
        try:
            with _seeded(group, device) if random else torch.no_grad():
                merged: Tensor = merge_tensors(
                    tensors,
                    method,
                    parameters={k: v for k, v in p.items() if k in names},
                    base_index=base_at,
                    name=group.name,
                    dtype=group.dtype,
                )
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # a user's code raises every kind
            raise ValueError(f"{spec.name} failed{_where(method, e)}: {typed_line(e)}") from e
        if _versions(tensors) != versions:
            raise ValueError(
                f"{spec.name} writes into its inputs, which the next merge reads again; "
                "let it work on tensor.clone()"
            )
        return merged.to(group.buffers.device)

    return prepare


@contextmanager
def _seeded(group: Group, device: torch.device) -> Iterator[None]:
    """torch's generators started for this tensor, and afterwards as they were."""
    first, second = counter_rng.key(group.seed, group.name, "")
    devices = [device] if device.type == "cuda" else []
    with _drawing, torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed((first << 31) ^ second)
        yield


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each has been written to."""
    return [t._version for t in tensors if not t.is_inference()]


def _where(method: MergeMethod, e: BaseException) -> str:
    """The line of the method's own file where it was raised."""
    made: Any = getattr(method, "implementation", type(method))
    file = inspect.getsourcefile(made)
    line = line_of(e, file) if file else ""
    return f" in {file}{line}" if line else ""
