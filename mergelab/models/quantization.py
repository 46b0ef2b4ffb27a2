"""Whether the weights of a checkpoint are quantized: by its tensors, because config.json may be outdated.

A fine-tune that was trained on a quantized base and then merged back into 16 bits often keeps the key.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergelab.core.findings import Finding, error, first_few, warning

KEY = "quantization_config"
"""The key of config.json by which transformers quantizes a model while it loads it."""

SIDE = re.compile(
    r".*[._](absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..+|SCB|weight_format|"
    r"qweight|qzeros|qscales|g_idx|scales|zeros|zero_point|weight_(packed|scale|scale_inv|scale_2|scales|shape|"
    r"zero_point|g_idx|global_scale)|input_(scale|global_scale)|activation_scale|output_scale|W_q|codes|codebooks|"
    r"channel_scale|group_scale|_data|_scale|blocks|dqweight|tables|tables2)"
)
"""Tensors that stand beside, or instead of, a quantized weight."""

PLAIN = frozenset(("F64", "F32", "BF16", "F16"))
"""The dtypes of weights that are not quantized, as safetensors calls them."""

WHILE_COMPUTING = ("bitnet",)
"""Methods of models that quantize whole weights while they compute. Without them they are other models."""


def settings(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What config.json says of a quantization, at the top or for the language model; None if nothing."""
    parts = (config, config.get("text_config"))
    found = [part[KEY] for part in parts if isinstance(part, Mapping) and part.get(KEY) is not None]
    if not found:
        return None
    return dict(found[0]) if isinstance(found[0], Mapping) else {"quant_method": found[0]}


def without(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without the key, wherever it stands."""
    out = {k: v for k, v in config.items() if k != KEY}
    return {k: without(v) if isinstance(v, Mapping) and KEY in v else v for k, v in out.items()}


def evidence(config: Mapping[str, Any], dtypes: Mapping[str, str]) -> str:
    """What shows that the weights are quantized, as config.json says; empty where nothing does.

    Args:
        config: The content of config.json.
        dtypes: The dtype of each tensor, as safetensors calls it.
    """
    said = settings(config)
    if said is None:
        return ""
    method = said.get("quant_method")
    if method in WHILE_COMPUTING:
        return f"a {method} model quantizes its weights while it computes"
    side = [n for n in dtypes if SIDE.fullmatch(n)]
    if side:
        return f"it has {first_few(side)}"
    packed = [
        f"{n} of dtype {code}" for n, code in dtypes.items() if n.endswith("weight") and code not in PLAIN
    ]
    return f"it has {first_few(packed)}" if packed else ""


def check(config: Mapping[str, Any], dtypes: Mapping[str, str], key: str, file: Path) -> Iterator[Finding]:
    """Check what config.json says of a quantization by the tensors.

    Args:
        config: The content of config.json.
        dtypes: The dtype of each tensor, as safetensors calls it; empty if that is not known.
        key: The model's key in the configuration.
        file: config.json.
    """
    said = settings(config)
    if said is None or not dtypes:
        return
    method = said.get("quant_method") or (
        "bitsandbytes" if any(k.startswith("load_in_") for k in said) else None
    )
    shown = f"{KEY} ({method})" if method else KEY
    if shows := evidence(config, dtypes):
        message = f"{file} has {shown}, and {shows}: the weights are quantized, and cannot be averaged"
        yield error("quantized", key, message, "Use the unquantized checkpoint.")
        return
    yield warning(
        "quantization-leftover",
        key,
        f"{file} has {shown}, but the weights are whole, in {_dtypes(dtypes)}: it is outdated, and ignored",
        f"The output does not get it. Other software may quantize by it: remove {KEY} from the file.",
    )


def _dtypes(dtypes: Mapping[str, str]) -> str:
    from mergelab.core.dtypes import BY_CODE

    return " and ".join(sorted({BY_CODE[code].name for code in dtypes.values() if code in PLAIN}))


@contextlib.contextmanager
def leftovers_ignored(*folders: Path) -> Iterator[None]:
    """Have transformers load models whose quantization_config is a leftover as they are.

    A single model that is really quantized is loaded as transformers does. Nothing is imported unless a
    folder has the key.
    """
    if not any(_is_leftover(f) for f in folders):
        yield
        return
    from unittest import mock

    from transformers.quantizers.auto import AutoHfQuantizer

    with mock.patch.object(AutoHfQuantizer, "supports_quant_method", staticmethod(lambda said: False)):
        yield


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # reported where the model is read
        return {}
    return found if isinstance(found, dict) else {}


def _is_leftover(folder: Path) -> bool:
    from mergelab.models import checkpoint

    if settings(_config(folder)) is None:
        return False
    facts = checkpoint.weights(folder)
    return bool(facts.tensors) and not evidence(facts.config, {n: t.dtype for n, t in facts.tensors.items()})
