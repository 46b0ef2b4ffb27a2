"""A recipe whose tensors are planned: our kernels write it to disk, or merge it into a live model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.core import dtypes
from mergelab.merging import streaming_engine
from mergelab.merging.in_memory import Resident
from mergelab.methods import registry
from mergelab.models.checkpoint import ModelMetadata
from mergelab.preflight.resolve_inputs import keeps_dtypes
from mergelab.recipes import tensor_plan
from mergelab.recipes.tensor_plan import OutputTensor
from mergelab.schema import Hardware, Run


@dataclass(frozen=True)
class PreparedMerge:
    """Everything that our kernels need of a recipe."""

    recipe: Mapping[str, Any]
    outputs: Sequence[OutputTensor]
    names: Mapping[str, str]
    """The name of each model by its reference; random masks are keyed by it."""
    seed: int
    rescale: str
    dtype: str
    """Of the arithmetic, as torch calls it."""
    hardware: Hardware

    @property
    def method(self) -> str:
        """Its name."""
        return str(self.recipe["merge_method"])

    def to_disk(self) -> streaming_engine.Merge:
        """The merge as the streaming engine writes it."""
        return streaming_engine.plan(
            self.method, self.outputs, self.names,
            seed=self.seed, rescale=self.rescale, dtype=self.dtype, hardware=self.hardware,
        )  # fmt: skip

    def live_model(self, config_source: Path) -> Resident:
        """A live model that this merge, and others of the same tensors, can be merged into.

        Args:
            config_source: the folder of the model whose configuration and tokenizer it gets.
        """
        return Resident(
            config_source, self.outputs, self.names,
            hardware=self.hardware, template=chat_template(self.recipe),
        )  # fmt: skip

    def merge_into(self, live: Resident) -> tuple[Any, Any]:
        """Merge into a live model; the model, which is valid until the next merge, and its tokenizer."""
        model = live.merge(self.method, self.outputs, seed=self.seed, rescale=self.rescale, dtype=self.dtype)
        return model, live.tokenizer


def prepare(
    run: Run, recipe: Mapping[str, Any], facts: Mapping[str, ModelMetadata], names: Mapping[str, str]
) -> PreparedMerge:
    """Plan the tensors of a recipe.

    Args:
        run: its seed, its hardware and how its method rescales.
        recipe: as preflight makes it.
        facts: of each model by its reference, the first one's dtype being that of the inputs.
        names: of each model by its reference.
    """
    d = registry.get(recipe["merge_method"])
    outputs = tensor_plan.assemble(recipe, facts, d, keeps=keeps_dtypes(run))
    dtype = arithmetic(recipe, next(iter(facts.values())).dtype)
    return PreparedMerge(recipe, outputs, names, run.seed, run.method.rescale, dtype, run.hardware)


def arithmetic(recipe: Mapping[str, Any], files: str | None) -> str:
    """The dtype that our kernels compute a recipe in, as torch calls it.

    Args:
        recipe: as preflight makes it.
        files: dtype of its inputs.
    """
    computed = tensor_plan.arithmetic(recipe, files)
    return computed if computed in dtypes.COMPUTABLE else dtypes.COMPUTABLE[0]


def chat_template(recipe: Mapping[str, Any]) -> str | None:
    """The chat template that a recipe asks for, as mergekit finds it; None to keep the config_source's."""
    if not recipe.get("chat_template"):
        return None
    from mergelab.merging import mergekit_backend

    return mergekit_backend.chat_template(mergekit_backend.ordered(recipe))
