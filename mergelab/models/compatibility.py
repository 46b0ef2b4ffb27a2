"""Comparison of an expert with the base: every difference that makes averaging weights meaningless."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mergelab.core.findings import MAY_PASS, Finding, error, note
from mergelab.models import tensor_checks
from mergelab.models.checkpoint import ModelMetadata

SAME: dict[str, str] = {
    "model_type": "architecture",
    "hidden_size": "shape",
    "intermediate_size": "shape",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "heads",
    "head_dim": "heads",
    "hidden_act": "activation",
    "rms_norm_eps": "norm",
    "layer_norm_eps": "norm",
    "tie_word_embeddings": "tied",
    "attn_logit_softcapping": "softcap",
    "final_logit_softcapping": "softcap",
    "query_pre_attn_scalar": "softcap",
}
"""Keys of config.json that must be equal, and the code of the finding if they are not."""


def compare(
    reference: ModelMetadata, expert: ModelMetadata, key: str, *, possessive: str, fitted: bool
) -> Iterator[Finding]:
    """Compare a model with the one that it must be related to.

    Args:
        reference: The base, or the model that is used instead.
        expert: The other model.
        key: The expert's key in the configuration, for findings.
        possessive: The reference in the possessive case, such as `the base's`.
        fitted: Whether mergekit builds a tokenizer and fits the embeddings to it, so that vocabularies
            may differ.
    """
    if not reference.config or not expert.config:
        return
    ours, theirs = expert.config["architectures"][0], reference.config["architectures"][0]
    if ours != theirs:
        remedy = "Only models of one architecture can be merged."
        yield error("architecture", key, f"its architecture is {ours}, {possessive} is {theirs}", remedy)
        return
    wrong = list(_compare_configs(reference, expert, key, possessive))
    yield from wrong
    if not any(f.code in ("shape", "heads", "layers") for f in wrong):
        # Otherwise shapes differ because of what has just been reported.
        yield from tensor_checks.compare_shapes(reference, expert, key, possessive, _remedy("shape"))
    if not fitted:
        yield from tensor_checks.compare_vocabularies(reference, expert, key, possessive)
    if reference.dtype and expert.dtype and reference.dtype != expert.dtype:
        yield note("mixed-dtype", key, f"its weights are {expert.dtype}, {possessive} are {reference.dtype}")


def _compare_configs(
    reference: ModelMetadata, expert: ModelMetadata, key: str, possessive: str
) -> Iterator[Finding]:
    file = expert.folder / "config.json"
    ours, theirs = _filled(expert.text_config), _filled(reference.text_config)
    differ: dict[str, list[str]] = {}
    for name, code in SAME.items():
        a, b = _both(ours, theirs, name)
        if a != b:
            differ.setdefault(code, []).append(f"{name} is {a}, {possessive} is {b}")
    for code, messages in differ.items():
        yield error(code, key, f"{'; '.join(messages)} ({file})", _remedy(code))
    a, b = rope(ours), rope(theirs)
    if ("rope_theta" in a) != ("rope_theta" in b):
        a, b = ({"rope_theta": _default_theta(ours), **r} for r in (a, b))
    if a != b:
        message = f"rope is {rope_text(a)}, {possessive} is {rope_text(b)} ({file})"
        yield error("rope", key, message, _remedy("rope"))


def _remedy(code: str) -> str:
    if code in MAY_PASS:
        return f"Use fine-tunes of one base model, or pass allow=[{code}] if the difference is intended."
    return "Use fine-tunes of one base model (model.base.path)."


def _filled(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config, completed by keys that follow from others and are often omitted."""
    out = {k: v for k, v in config.items() if v is not None}
    heads, hidden = out.get("num_attention_heads"), out.get("hidden_size")
    if isinstance(heads, int) and heads > 0:
        out.setdefault("num_key_value_heads", heads)
        if isinstance(hidden, int):
            out.setdefault("head_dim", hidden // heads)
    return out


def _both(ours: Mapping[str, Any], theirs: Mapping[str, Any], key: str) -> tuple[Any, Any]:
    """A key's value in both configs. Where only one has it, the other one means the default."""
    if (key in ours) == (key in theirs):
        return ours.get(key), theirs.get(key)
    default = _default(ours, key)
    return ours.get(key, default), theirs.get(key, default)


def _default(config: Mapping[str, Any], key: str) -> Any:
    """transformers' default for a key (imports transformers)."""
    from transformers import CONFIG_MAPPING

    name = str(config.get("model_type"))
    return getattr(CONFIG_MAPPING[name](), key, None) if name in CONFIG_MAPPING else None


def _default_theta(config: Mapping[str, Any]) -> float | None:
    theta = (_default(config, "rope_parameters") or {}).get("rope_theta")
    return float(theta) if theta is not None else None


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary position embedding, in whichever form config.json has it.

    transformers 5 writes `rope_parameters`; earlier versions wrote `rope_theta` and `rope_scaling`.
    """
    new = config.get("rope_parameters")
    old = config.get("rope_scaling")
    out: dict[str, Any] = dict(new) if isinstance(new, dict) else {}
    if isinstance(old, dict):
        out |= {("rope_type" if k == "type" else k): v for k, v in old.items()}
    if "rope_theta" not in out and "rope_theta" in config:
        out["rope_theta"] = config["rope_theta"]
    if out.get("rope_type") in (None, "default"):
        out.pop("rope_type", None)
    return {k: float(v) if isinstance(v, (int, float)) else v for k, v in out.items()}


def rope_text(r: Mapping[str, Any]) -> str:
    """The result of `rope` as text."""
    return ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in r.items()) or "unset"


def generic(tensor: str) -> str:
    """A tensor's name without its layer number."""
    return re.sub(r"\.\d+\.", ".*.", tensor, count=1)
