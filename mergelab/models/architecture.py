"""The tensors of an architecture and their shapes, from config.json alone.

The names come from mergekit's own architecture files, so that they are the names mergekit will look up.
The files are read as data because importing mergekit's own reader takes seconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

LAYER = re.compile(r"\.(\d+)\.")
"""The first number in a tensor's name is its layer's, as in mergekit."""


@dataclass(frozen=True)
class Weight:
    """One tensor of an architecture."""

    name: str
    layer: int | None
    """The layer it belongs to; None for embeddings, the final norm and the head."""
    optional: bool
    aliases: tuple[str, ...] = ()
    """Other names under which a checkpoint may hold it."""
    tied: tuple[str, ...] = ()
    """Tensors that replace it where it is absent."""

    @property
    def kind(self) -> str:
        """What stands before the number of its layer."""
        return self.name.partition(f".{self.layer}.")[0]

    @property
    def also(self) -> tuple[str, ...]:
        """All other names under which it may be found."""
        return self.aliases + self.tied


@cache
def _definitions() -> dict[str, list[dict[str, Any]]]:
    """mergekit's architecture files by the name of the transformers class."""
    out: dict[str, list[dict[str, Any]]] = {}
    folder = resources.files("mergekit._data") / "architectures"
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".json"):
            content = json.loads(entry.read_text(encoding="utf-8"))
            for name in content.get("architectures", []):
                out.setdefault(name, []).append(content)
    return out


def weights(config: Mapping[str, Any], layers: int | None = None) -> list[Weight] | None:
    """The tensors of a model in mergekit's order.

    Args:
        config: The content of config.json.
        layers: The number of layers, if it differs from the config's own.

    Returns:
        The tensors, or None for an architecture of which mergekit has no plain list.
    """
    names = config.get("architectures") or [None]
    candidates = _definitions().get(names[0], [])
    if len(candidates) > 1:
        candidates = [c for c in candidates if c.get("model_type") == config.get("model_type")]
    if not candidates or "layer_templates" not in candidates[0]:
        return None
    d = candidates[0]
    count = layers if layers is not None else layer_count(config)
    if count is None:
        return None
    out = [_weight(w, None) for w in d.get("pre_weights", [])]
    for i in range(count):
        out += [_weight(w, i) for w in d["layer_templates"]["weights"]]
    return out + [_weight(w, None) for w in d.get("post_weights", [])]


def layer_count(config: Mapping[str, Any]) -> int | None:
    """The number of layers that config.json states under the key that mergekit reads."""
    names = config.get("architectures") or [None]
    for d in _definitions().get(names[0], []):
        value = config.get(d.get("num_layers_config_key") or "num_hidden_layers")
        if isinstance(value, int):
            return value
    value = config.get("num_hidden_layers")
    return value if isinstance(value, int) else None


def modules(config: Mapping[str, Any]) -> list[str] | None:
    """mergekit's names for the parts of a model, or None where it infers them."""
    for d in _definitions().get((config.get("architectures") or [""])[0], []):
        return list(d["modules"]) if "modules" in d else ["default"]
    return None


def layers_key(config: Mapping[str, Any], module: str) -> str | None:
    """The key under which the layers of a module are counted, or None where mergekit does not know it."""
    for d in _definitions().get((config.get("architectures") or [""])[0], []):
        own = d["modules"].get(module, {}).get("architecture", {}) if "modules" in d else d
        key = own.get("num_layers_config_key")
        return str(key) if key else None
    return None


def _weight(w: Mapping[str, Any], layer: int | None) -> Weight:
    def fill(name: str) -> str:
        return name.replace("${layer_index}", str(layer))

    aliases, tied_names = (tuple(fill(n) for n in w.get(k) or []) for k in ("aliases", "tied_names"))
    return Weight(fill(w["name"]), layer, bool(w.get("optional")), aliases, tied_names)


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """The shape of every tensor of a dense decoder, or None for other architectures.

    Covers the Llama, Mistral, Qwen2, Qwen3 and Gemma families, whose projections follow from hidden
    size, heads and head size. The tests compare the result with transformers' own models. Building such
    a model on the meta device would cover every architecture, but takes seconds where this takes
    milliseconds, and imports torch.
    """
    listed = weights(config)
    if listed is None:
        return None
    try:
        h, v = int(config["hidden_size"]), int(config["vocab_size"])
        heads = int(config["num_attention_heads"])
        kv = int(config.get("num_key_value_heads") or heads)
        hd = int(config.get("head_dim") or h // heads)
        i = int(config["intermediate_size"])
    except (KeyError, TypeError, ValueError):
        return None
    by_end: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (v, h),
        "lm_head.weight": (v, h),
        "q_proj.weight": (heads * hd, h),
        "k_proj.weight": (kv * hd, h),
        "v_proj.weight": (kv * hd, h),
        "o_proj.weight": (h, heads * hd),
        "q_proj.bias": (heads * hd,),
        "k_proj.bias": (kv * hd,),
        "v_proj.bias": (kv * hd,),
        "gate_proj.weight": (i, h),
        "up_proj.weight": (i, h),
        "down_proj.weight": (h, i),
        "q_norm.weight": (hd,),
        "k_norm.weight": (hd,),
    }
    out: dict[str, tuple[int, ...]] = {}
    for w in listed:
        if w.optional and (not w.name.endswith("lm_head.weight") or tied(config)):
            continue
        end = ".".join(w.name.rsplit(".", 2)[-2:])
        if end in by_end:
            out[w.name] = by_end[end]
        elif "norm" in end:
            out[w.name] = (h,)
        else:
            return None
    return out


def tied(config: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding. Where config.json does not say so, it is in the Gemma family."""
    return bool(config.get("tie_word_embeddings", str(config.get("model_type", "")).startswith("gemma")))
