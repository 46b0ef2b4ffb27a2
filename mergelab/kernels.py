"""The merge methods on plain tensors: `merge_tensors("ties", experts, {"weight": 0.5}, base=base)`.

`KERNELS` has those that work on chunks, by the names that mergekit gives them; `mergelab.merging.kernels`
has what they are made of. Any other method goes through mergekit's function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergelab.core.errors import InputError, none_of
from mergelab.merging import kernels
from mergelab.merging.kernels import KERNELS, VERSION

__all__ = ["KERNELS", "VERSION", "merge_tensors"]


def merge_tensors(
    method: str,
    experts: Sequence[Tensor],
    parameters: Mapping[str, Any] | None = None,
    *,
    base: Tensor | None = None,
    name: str = "",
    keys: Sequence[str] = (),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Tensor:
    """One tensor from several of one shape.

    Args:
        method: its name, one of your own (`mergelab.methods.register`) included.
        experts: the tensors to combine; of a method without a base, all inputs.
        parameters: what the method takes, such as `weight`, `density` or `lambda`; what is left out has
            mergekit's default. Those that are set for each model are a list in the experts' order, or a
            number for all.
        base: the tensor from which task vectors are taken, for methods that have them.
        name: the tensor's name; with `seed` and `keys`, the experts' names, it decides random masks.
        dtype: of the arithmetic.
        out_dtype: of the result; None: the first expert's.
        device: where it is computed.
    Raises:
        InputError: for an unknown method or parameter, and for one that has to be given.
        ValueError: where the method has no answer for these tensors.
    """
    from mergelab.methods import registry

    known = registry.methods()
    if method not in known:
        raise InputError(none_of(method, sorted(known)))
    declared = known[method].parameters
    given: dict[str, Any] = dict(parameters or {})
    if unknown := [p for p in given if p not in declared]:
        raise InputError(f"{method}: {none_of(unknown[0], sorted(declared))}")
    inputs = len(experts) + (base is not None)
    for p in declared.values():
        if p.name not in given and p.required:
            raise InputError(f"{method}: it needs {p.name}")
        value = given.get(p.name, p.default)
        one_for_all = p.per_model and not isinstance(value, (list, tuple))
        given[p.name] = [value] * (inputs if p.on_base else len(experts)) if one_for_all else value
    given["rescale_to"] = "l1"  # as mergekit does
    return kernels.merge_tensors(
        method, experts, given, base=base, name=name, keys=keys, seed=seed, dtype=dtype, out_dtype=out_dtype,
        device=device,
    )  # fmt: skip
