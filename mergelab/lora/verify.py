"""Verification of an adapter: peft loads it onto its base, and the result is compared with the expert."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.core.errors import StepError
from mergelab.core.findings import first_few
from mergelab.core.model_class import model_class
from mergelab.models.checkpoint import ModelMetadata
from mergelab.models.quantization import leftovers_ignored

Progress = Callable[[str, int, int], None]
"""(what, done, total)"""

BLOCK = 1 << 24
"""The number of elements that are compared at once."""


@dataclass(frozen=True)
class Part:
    """A tensor that differs between two models, and how much of the difference an adapter holds."""

    tensor: str
    norm: float
    """The Frobenius norm of the difference, greater than 0."""
    residual: float
    """The Frobenius norm of the difference that remains with the adapter."""
    rank: int = 0
    """The rank of the two factors; 0 if there are none."""
    whole: bool = False
    """Whether the adapter holds the expert's tensor itself."""

    @property
    def kind(self) -> str:
        """The name of such modules in every layer: `q_proj`, or `q_proj bias`."""
        module, _, leaf = self.tensor.rpartition(".")
        last = module.rpartition(".")[2]
        return last if leaf == "weight" else f"{last} {leaf}"


def relative_error(parts: Iterable[Part]) -> float:
    """The relative error of several tensors together: ‖ΔW − adapter‖ / ‖ΔW‖ in the Frobenius norm."""
    listed = list(parts)
    return math.hypot(*(p.residual for p in listed)) / math.hypot(*(p.norm for p in listed))


def load(base: ModelMetadata, adapter: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the base with an adapter.

    On the CPU transformers maps the base's files into memory, so this needs little of it.

    Args:
        base: The model that is adapted.
        adapter: The folder of the adapter.
        trust_remote_code: Whether code that comes with the base may run.

    Raises:
        StepError: A tensor of the adapter belongs to no module, or a module's tensor is missing.
    """
    from peft import PeftConfig, PeftModel
    from transformers import AutoConfig

    code = {"trust_remote_code": trust_remote_code}
    kind = model_class(AutoConfig.from_pretrained(base.folder, **code))
    with leftovers_ignored(base.folder):
        model = kind.from_pretrained(base.folder, dtype="auto", **code)
    adapted = PeftModel(model, PeftConfig.from_pretrained(str(adapter)))
    found = adapted.load_adapter(str(adapter), "default", torch_device="cpu")
    if odd := [*found.missing_keys, *found.unexpected_keys]:
        raise StepError(f"peft has no module for, or misses, {first_few(odd)}")
    return adapted.get_base_model()


def read_back(
    adapted: Any,
    expert: ModelMetadata,
    norms: Mapping[str, float],
    biases: Collection[str],
    progress: Progress = lambda what, done, total: None,
) -> Iterator[Part]:
    """Compare the adapted base with the expert, one tensor after another.

    Args:
        adapted: The base with the adapter, from `load`.
        expert: The model that the adapter was extracted from.
        norms: The norm of the difference of expert and base, by tensor.
        biases: The biases of linear modules that the adapter holds.
        progress: Called with the number of modules.

    Yields:
        Each tensor that the adapter holds.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    kinds = (LoraLayer, ModulesToSaveWrapper)
    wrappers: dict[str, Any] = {n: m for n, m in adapted.named_modules() if isinstance(m, kinds)}
    parameters = dict(adapted.named_parameters())
    for i, (name, module) in enumerate(wrappers.items()):
        progress("read back", i, len(wrappers))
        if isinstance(module, ModulesToSaveWrapper):
            for leaf, held in module.modules_to_save["default"].named_parameters(recurse=False):
                tensor = f"{name}.{leaf}"
                if tensor in norms:  # a tied head is counted with its embedding
                    yield Part(tensor, norms[tensor], distance(tensor_of(expert, tensor), held), whole=True)
        else:
            tensor = f"{name}.weight"
            weight, delta = module.get_base_layer().weight, module.get_delta_weight("default")
            residual = distance(tensor_of(expert, tensor), weight, delta)
            yield Part(tensor, norms[tensor], residual, rank=module.r["default"])
    for tensor in biases:
        held = parameters[bias_in(tensor, wrappers)]
        yield Part(tensor, norms[tensor], distance(tensor_of(expert, tensor), held), whole=True)


def tensor_of(facts: ModelMetadata, name: str) -> Any:
    """Read one tensor of a model from its file."""
    from safetensors import safe_open

    with safe_open(facts.tensors[name].file, framework="pt") as f:
        return f.get_tensor(name)


def distance(one: Any, other: Any, shift: Any = None) -> float:
    """The Frobenius norm of one - other - shift: in float32, summed in float64, some rows at a time."""
    import torch

    rows = max(1, BLOCK // max(1, one[0].numel())) if one.ndim else 1
    squares = 0.0
    for start in range(0, one.shape[0] if one.ndim else 1, rows):
        part = slice(start, start + rows) if one.ndim else ...
        difference = one[part].float() - other[part].float()
        if shift is not None:
            difference -= shift[part].float()
        squares += float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
    return math.sqrt(squares)


def bias_in(tensor: str, factors: Iterable[str]) -> str:
    """The name of a bias in the adapted model, in which modules with factors are wrapped."""
    module = tensor.removesuffix(".bias")
    return f"{module}.base_layer.bias" if module in factors else tensor
