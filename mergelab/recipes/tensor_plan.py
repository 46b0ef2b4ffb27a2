"""From a recipe to the list of tensors to make: of which inputs, with which parameters. Pure.

This is mergekit's planner for the plain case: whole models of one architecture, as they are. What
is not plain is recognised from the recipe and the headers, with the reason, and is left to mergekit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergelab.core import dtypes
from mergelab.methods.declared import Parameter
from mergelab.methods.registry import MethodInfo
from mergelab.models import blueprint, ties
from mergelab.models.architecture import Weight
from mergelab.models.checkpoint import ModelMetadata, TensorInfo
from mergelab.recipes import recipe as recipes
from mergelab.recipes import recipe_groups, tensor_list
from mergelab.recipes.parameters import Settings


class UnsupportedByFastEngine(Exception):
    """The recipe asks for what only mergekit's own path can do; the message says for what."""


@dataclass(frozen=True)
class SourceTensor:
    """One input of an output tensor."""

    model: str
    """The model's reference in the recipe."""
    tensor: str
    """What the tensor is called there."""
    header: TensorInfo


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to make."""

    name: str
    dtype: str
    """As safetensors calls it."""
    shape: tuple[int, ...]
    base: SourceTensor | None
    experts: tuple[SourceTensor, ...]
    """In the order of the recipe; all inputs of a method without a base."""
    parameters: Mapping[str, Any]
    """What each parameter comes to; a list in the experts' order where it is set for each model, and in
    that of all inputs of the recipe where the base has one as well."""
    base_at: int = 0
    """The place of the base among the inputs of the recipe."""

    @property
    def inputs(self) -> tuple[SourceTensor, ...]:
        """All sources."""
        return self.experts if self.base is None else (*self.experts, self.base)

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return TensorInfo(self.dtype, self.shape, "").nbytes

    @property
    def traffic(self) -> int:
        """Bytes read and written."""
        return self.nbytes + sum(s.header.nbytes for s in self.inputs)


def why_not(recipe: Mapping[str, Any]) -> str | None:
    """What in a recipe asks for mergekit's own path, or None."""
    for key in ("slices", "modules"):
        if recipe.get(key):
            return f"it has {key}"
    if recipes.builds_tokenizer(recipe):
        return "it has a tokenizer to build"
    if any("+" in m for m in recipes.models(recipe)):
        return "it has LoRA inputs"
    return None


def arithmetic(recipe: Mapping[str, Any], files: str | None) -> str:
    """The dtype that a recipe computes in; `files` is that of its inputs."""
    return dtypes.plain_name(recipe.get("dtype") or files or dtypes.COMPUTABLE[0])


def own_dtypes(base: ModelMetadata) -> dict[str, str]:
    """Tensors that a model holds in another dtype than most of its elements, with safetensors' name of it:
    routers, norms or A_log in float32. By the names of the file, and by the model's own."""
    own = {
        name: t.dtype
        for name, t in base.tensors.items()
        if dtypes.is_mergeable(t.dtype) and dtypes.BY_CODE[t.dtype].name != base.dtype
    }
    found = blueprint.of(base) if own else None
    return {found.own(name): code for name, code in own.items()} | own if found else own


def assemble(
    recipe: Mapping[str, Any], facts: Mapping[str, ModelMetadata], d: MethodInfo, *, keeps: bool = False
) -> list[OutputTensor]:
    """The tensors of the merged model, in the order of the architecture.

    Args:
        recipe: a sound one, with `models`.
        facts: what is known of each model, by its reference; the base's first.
        d: what the method declares.
        keeps: whether tensors that the base holds in a dtype of their own are written in it.
    Raises:
        UnsupportedByFastEngine: where it takes more than merging tensor by tensor.
    """
    if reason := why_not(recipe):
        raise UnsupportedByFastEngine(reason)
    (group,) = recipe_groups.groups(recipe, str)
    config_source = facts[str(recipe.get("base_model") or group.inputs[0])]
    kind = (config_source.config.get("architectures") or ["?"])[0]
    listed = tensor_list.listed(config_source)
    if listed is None:
        raise UnsupportedByFastEngine(f"there is no plain list of the tensors of {kind}")
    found = blueprint.of(config_source)
    if found is not None and found.indices:
        raise UnsupportedByFastEngine(f"{min(found.indices)} holds indices, which are not averaged")
    base = None if d.inputs.base == "ignored" else group.base
    settings = Settings(d, group, str)
    tied = ties.of([config_source, *(facts[m] for m in group.inputs)])
    named = ties.names(config_source)
    (placed,) = recipe_groups.output_tensors(config_source, [group], tied)
    places = dict(placed)
    written = dtypes.plain_name(recipe.get("out_dtype") or recipe.get("dtype") or "")
    own = own_dtypes(next(iter(facts.values()))) if keeps else {}
    out = []
    for weight in listed:
        if weight.name in tied:
            continue
        other = [name for name, first in tied.items() if first == weight.name]
        other += [named[weight.name]] if weight.name in named else []
        sources = _sources(weight, other, group.inputs, facts)
        if not sources:
            continue
        dtype = dtypes.BY_NAME[written].code if written else _widest(sources)
        dtype = next((own[n] for n in (weight.name, *weight.aliases, *other) if n in own), dtype)
        experts = tuple(s for s in sources if s.model != base)
        base_at = next((i for i, s in enumerate(sources) if s.model == base), 0)
        out.append(
            OutputTensor(
                weight.name,
                dtype,
                sources[0].header.shape,
                next((s for s in sources if s.model == base), None),
                experts,
                _parameters(settings, weight.name, places[weight.name], sources, experts),
                base_at,
            )
        )
    return out


def _sources(
    weight: Weight, other: list[str], models: list[str], facts: Mapping[str, ModelMetadata]
) -> list[SourceTensor]:
    """Where each model has a tensor; empty for one that is optional and nowhere.

    Args:
        other: names under which it may be besides, because it is tied.
        models: their references.
        facts: what is known of them.
    """
    there = [facts[m].tensors for m in models]
    if weight.optional and not any(n in t for t in there for n in (weight.name, *weight.aliases)):
        return []
    out: list[SourceTensor] = []
    for model, tensors in zip(models, there, strict=True):
        name = next((n for n in (weight.name, *weight.also, *other) if n in tensors), None)
        if name is None:
            raise UnsupportedByFastEngine(f"{weight.name} is not in every model")
        header = tensors[name]
        if not dtypes.is_mergeable(header.dtype):
            raise UnsupportedByFastEngine(f"{weight.name} does not hold floating-point numbers")
        if out and header.shape != out[0].header.shape:
            raise UnsupportedByFastEngine(f"{weight.name} has not the same shape in every model")
        out.append(SourceTensor(model, name, header))
    return out


def _widest(sources: list[SourceTensor]) -> str:
    """The dtype that holds those of all sources, by torch's rule of promotion."""
    kinds = {s.header.dtype for s in sources}
    for wide in ("F64", "F32"):
        if wide in kinds:
            return wide
    return kinds.pop() if len(kinds) == 1 else "F32"


def _parameters(
    settings: Settings, name: str, t: float, sources: Sequence[SourceTensor], experts: Sequence[SourceTensor]
) -> dict[str, Any]:
    """Every declared parameter at one tensor."""

    def at(model: str | None, p: Parameter) -> Any:
        value, _ = settings.at(model, p.name, (name, t))
        return p.convert(value)

    return {
        p.name: [at(s.model, p) for s in (sources if p.on_base else experts)] if p.per_model else at(None, p)
        for p in settings.d.parameters.values()
    }
