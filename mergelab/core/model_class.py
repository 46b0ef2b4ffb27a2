"""The transformers class of a model: which one config.json names, and whether it generates text.

A merge is not always of text generators. Reward models, classifiers, encoders and embedders have classes of
their own, and so have models with a vision tower, whose language model is only a part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.core.library_output import silence_libraries
from mergelab.core.remembered import remembered

GENERATOR = "ForCausalLM"
"""The end of the names of classes that generate text, each of them."""


def model_class(config: Any) -> Any:
    """The transformers class that a model's config names, or an auto class for a model with its own code.

    Args:
        config: A configuration object of transformers.
    """
    import transformers

    name = (config.architectures or [""])[0]
    own = type(config).__module__.startswith("transformers.")
    named = getattr(transformers, name, None) if own else None
    if named is not None and isinstance(config, getattr(named, "config_class", None) or ()):
        return named
    autos = getattr(config, "auto_map", None) or {}
    if own and not autos and type(config) in transformers.AutoModelForCausalLM._model_mapping:
        # A family that has the class of another, as InternLM3 has Llama's.
        return transformers.AutoModelForCausalLM._model_mapping[type(config)]
    usual = "AutoModelForCausalLM"
    found = next((a for a in autos if a.startswith("AutoModel")), usual)
    return getattr(transformers, usual if usual in autos else found, transformers.AutoModelForCausalLM)


def empty(config: Any, *, trust_remote_code: bool = False) -> Any:
    """A model of a configuration with untrained weights."""
    kind = model_class(config)
    if hasattr(kind, "_from_config"):
        return kind._from_config(config)
    return kind.from_config(config, trust_remote_code=trust_remote_code)


def generates(config: Mapping[str, Any]) -> bool:
    """Whether a model of this config.json continues text.

    A class that transformers does not know, as one that comes with the model, is taken for one that does.
    Imports transformers only for a class whose name does not say it, and once for each.
    """
    name = str((config.get("architectures") or [""])[0])
    if name.endswith(GENERATOR):
        return True
    return bool(remembered("generates", name, lambda: {"text": _generates(name)})["text"])


def _generates(name: str) -> bool:
    import transformers

    kind = getattr(transformers, name, None)
    if kind is None or not hasattr(kind, "can_generate"):
        return True
    with silence_libraries():
        return bool(continues_text(kind))


def continues_text(kind: Any) -> bool:
    """Whether a class generates, and does so from text: a speech model generates from sound."""
    return bool(kind.can_generate()) and getattr(kind, "main_input_name", "input_ids") == "input_ids"
