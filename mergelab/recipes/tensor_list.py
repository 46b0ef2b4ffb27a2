"""The tensors that a merge writes: by mergekit's list where the checkpoint follows it, else its own."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from mergelab.core.remembered import remembered
from mergelab.models import architecture, blueprint, ties
from mergelab.models.architecture import LAYER, Weight
from mergelab.models.blueprint import Blueprint
from mergelab.models.checkpoint import ModelMetadata

BY_CODE = ("AfmoeForCausalLM", "Glm4MoeForCausalLM")
"""Architectures of which mergekit makes the list of tensors by code, although it has a file."""


@lru_cache(maxsize=32)
def listed(config_source: ModelMetadata, layers: int | None = None) -> list[Weight] | None:
    """The tensors of the merged model, in order.

    A mixture of experts lies on the hub with a tensor for each expert, where mergekit's list has packed
    ones; an older file has buffers that a newer one lacks; for many architectures there is no list at all.
    The checkpoint's own tensors are then the list, so that what comes out has the layout of what went in.

    Args:
        config_source: The model whose config the merged one gets.
        layers: The number of layers, if it differs from the config's own.

    Returns:
        The tensors, or None where they are not known: another number of layers without a list of
        mergekit's, or a class that is not one of transformers' own.
    """
    kind = (config_source.config.get("architectures") or [""])[0]
    by_mergekit = None if kind in BY_CODE else architecture.weights(config_source.config, layers)
    if by_mergekit is not None and any("${" in w.name for w in by_mergekit):
        by_mergekit = None
    found = blueprint.of(config_source)
    if layers not in (None, architecture.layer_count(config_source.config)) or found is None or found.problem:
        return by_mergekit
    own = {n for n in config_source.tensors if n not in found.left_out and n not in found.unexpected}
    if by_mergekit is not None and _follows(own, by_mergekit, found):
        return by_mergekit
    second = ties.names(config_source)
    names = {n for n in own if n not in second} | {first for n, first in second.items() if n in own}
    weights = [_weight(n) for n in sorted(names, key=_natural)]
    return weights + [Weight(n, None, optional=True, tied=(first,)) for n, first in second.items()]


def why_not_mergekit(config_source: ModelMetadata) -> str | None:
    """What in mergekit's own list does not fit a checkpoint, so that it fails or drops weights; or None.

    mergekit converts a checkpoint to transformers' names before it looks up those of its list.
    """
    kind = (config_source.config.get("architectures") or [""])[0]
    weights = _by_code(config_source) if kind in BY_CODE else architecture.weights(config_source.config)
    found = blueprint.of(config_source)
    if weights is None or found is None or found.problem or any("${" in w.name for w in weights):
        return None
    there = {*config_source.tensors, *found.parameters}
    lacking = [w.name for w in weights if not w.optional and not {w.name, *w.also} & there]
    if lacking:
        return f"mergekit's list of a {kind} has {lacking[0]}, which the checkpoint has not"
    known = {n for w in weights for n in (w.name, *w.also)}
    known |= {found.own(n) for n in config_source.tensors if n in known}
    wanted = set(found.parameters)
    if found.packed <= known:  # the list has the file's names of what is converted
        wanted = {found.own(n) for n in config_source.tensors} & wanted
    dropped = sorted(n for n in wanted if not {n, found.ties.get(n, n)} & known)
    return f"mergekit's list of a {kind} lacks {dropped[0]}" if dropped else None


def _by_code(config_source: ModelMetadata) -> list[Weight]:
    """The list that mergekit makes of a config by code; imports mergekit the first time."""

    def answer() -> dict[str, Any]:
        from mergekit.architecture import arch_info_for_config
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(config_source.folder, trust_remote_code=False)
        info = arch_info_for_config(config)
        return {"weights": [[w.name, w.optional] for w in info.all_weights(config)] if info else []}

    found = remembered("mergekit's list", config_source.config, answer)
    return [Weight(name, None, optional) for name, optional in found["weights"]]


def _follows(own: set[str], weights: list[Weight], found: Blueprint) -> bool:
    """Whether a list has each weight of a checkpoint, and asks for no more."""
    known = {n for w in weights for n in (w.name, *w.also)}
    known |= {n for n in own if found.canonical(n) in known}
    asked = [w for w in weights if not w.optional]
    return own <= known and all({w.name, *w.also} & own for w in asked)


def _weight(name: str) -> Weight:
    layer = LAYER.search(name)
    return Weight(name, int(layer[1]) if layer else None, optional=False)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
