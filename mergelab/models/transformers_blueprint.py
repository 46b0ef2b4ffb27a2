"""`blueprint`, asked of transformers. Import it late: it takes seconds."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import LoadStateDictConfig

from mergelab.core.dtypes import is_mergeable
from mergelab.core.errors import summary
from mergelab.core.library_output import silence_libraries
from mergelab.core.model_class import model_class

MORE_TOKENS = 8
"""By how much the vocabulary is enlarged to see which axes grow with it."""

OPTIONAL_POOLER = "add_pooling_layer"
"""transformers' argument of encoders that need no pooling layer."""


def blueprint(folder: Path, headers: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """The fields of a `Blueprint`, as JSON can write them.

    Args:
        folder: that of config.json.
        headers: safetensors' dtype and the shape of each tensor, by name.

    Returns:
        `{"unknown": True}` for a class that is not one of transformers' own.
    """
    with silence_libraries():
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except Exception as e:  # transformers raises exceptions of every type for what it cannot read
            return _unknown_or(e, folder)
        kind = model_class(config)
        if not issubclass(kind, transformers.PreTrainedModel):  # an auto class: code of its own
            return {"unknown": True}
        try:
            model = empty(kind, config)
        except Exception as e:
            return _problem(f"transformers cannot make a {kind.__name__} of it: {summary(e)}")
        return _beside(model, config, headers)


def empty(kind: Any, config: Any, **parts: bool) -> Any:
    """A model of a config on the meta device, without values."""
    with torch.device("meta"), no_init_weights():
        return kind(copy.deepcopy(config), **parts)


def _unknown_or(e: Exception, folder: Path) -> dict[str, Any]:
    """Nothing is known of a model type of the future, or one with code of its own; all else is a problem."""
    text = str(e)
    if "trust_remote_code" in text or "model type" in text or "model_type" in text:
        return {"unknown": True}
    return _problem(f"transformers cannot read it: {summary(e)}")


def _problem(text: str) -> dict[str, Any]:
    return {
        "parameters": {}, "names": {}, "packed": [], "left_out": [], "indices": [], "ties": {},
        "vocabulary": {}, "missing": [], "unpooled": [], "unexpected": [], "mismatched": [],
        "problem": text,
    }  # fmt: skip


def _beside(model: Any, config: Any, headers: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """The headers beside the model, as transformers' own loader brings them together."""
    state = model.state_dict()
    buffers = {n for n, _ in model.named_buffers()}
    indices = {n for n in buffers & state.keys() if not state[n].is_floating_point()}
    parameters = {n: list(t.shape) for n, t in state.items() if n not in indices}
    own, packed = _names(model, state, headers)
    vocabulary = _vocabulary(type(model), config, parameters)
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    info, _ = convert_and_load_state_dict_in_model(
        model,
        {n: torch.empty(shape, device="meta") for n, (_, shape) in headers.items()},
        LoadStateDictConfig(weight_mapping=get_model_conversion_mapping(model), device_map={"": "meta"}),
    )
    model._adjust_missing_and_unexpected_keys(info)
    in_file = {own[n] for n in headers if own[n] in state}
    unexpected = [
        n for n in headers if own[n] not in state and (own[n] in info.unexpected_keys or n in packed)
    ]
    known = {*headers} - {*unexpected}
    left_out = [
        n for n in known if own[n] not in state or own[n] in indices or not is_mergeable(headers[n][0])
    ]
    given = in_file | {n for n, other in ties.items() if other in in_file}
    given |= {ties[n] for n in ties if n in in_file}
    missing = {n for n in info.missing_keys if n in parameters and n not in given}
    spare = missing & (_pooler(model, config, state) if missing else set())
    return {
        "parameters": parameters,
        "names": {n: own[n] for n in known if own[n] != n and n not in packed},
        "packed": sorted(packed & known),
        "left_out": sorted(left_out),
        "indices": sorted(n for n in known if own[n] in indices),
        "ties": ties,
        "vocabulary": vocabulary,
        "missing": sorted(missing - spare),
        "unpooled": sorted(spare),
        "unexpected": sorted(unexpected),
        "mismatched": sorted((n, list(a), list(b)) for n, a, b in info.mismatched_keys),
        "problem": "; ".join(sorted(set(info.conversion_errors.values()))[:1]),
    }


def _pooler(model: Any, config: Any, state: Mapping[str, Any]) -> set[str]:
    """The weights of a pooling layer, if the model's class can be built without it."""
    kind = type(model)
    if OPTIONAL_POOLER not in inspect.signature(kind).parameters:
        return set()
    return {*state} - {*empty(kind, config, **{OPTIONAL_POOLER: False}).state_dict()}


def _names(
    model: Any, state: Mapping[str, Any], headers: Mapping[str, Any]
) -> tuple[dict[str, str], set[str]]:
    """The model's own name for each tensor of the file, and which of them are converted on loading.

    The same two attempts as in transformers' `convert_and_load_state_dict_in_model`.
    """
    mapping = get_model_conversion_mapping(model) or []
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    own, packed = {}, set()
    for name in headers:
        new, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if new not in state and name in state:
            new, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        own[name] = new
        if pattern is not None:
            packed.add(name)
    return own, packed


def _vocabulary(kind: Any, config: Any, parameters: Mapping[str, list[int]]) -> dict[str, int]:
    """The axis of each weight that has an entry for each token: the one that grows with the vocabulary."""
    larger = copy.deepcopy(config)
    text = larger.get_text_config()
    if not isinstance(getattr(text, "vocab_size", None), int):
        return {}
    text.vocab_size += MORE_TOKENS
    grown = empty(kind, larger).state_dict()
    return {
        n: axis
        for n, shape in parameters.items()
        for axis, (a, b) in enumerate(zip(shape, grown[n].shape, strict=True))
        if a != b
    }
