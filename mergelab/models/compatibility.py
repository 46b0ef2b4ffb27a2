"""Comparison of an expert with the base: every difference that makes averaging weights meaningless."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mergelab.core.findings import MAY_PASS, Finding, error, first_few, note
from mergelab.models import config_meaning, tensor_checks
from mergelab.models.architecture import LAYER
from mergelab.models.checkpoint import ModelMetadata
from mergelab.models.config_meaning import Meaning

KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("architecture", re.compile(r"^model_type$")),
    ("layers", re.compile(r"^(num_hidden_layers|n_layers?|num_layers)$")),
    ("shape", re.compile(r"^(hidden_size|intermediate_size)$")),
    ("tied", re.compile(r"^tie_word_embeddings$")),
    ("heads", re.compile(r"heads|n_head$|head_dim")),
    ("rope", re.compile(r"rope|rotary")),
    ("activation", re.compile(r"(^|_)act(_|$)|activation")),
    ("norm", re.compile(r"eps(ilon)?$|(layer|rms)_?norm")),
    ("softcap", re.compile(r"softcap|query_pre_attn_scalar")),
    ("config", re.compile("")),
)
"""The code of the finding where a setting differs: that of the first pattern found in its general name."""


def compare(
    reference: ModelMetadata,
    expert: ModelMetadata,
    key: str,
    *,
    possessive: str,
    fitted: bool,
    described: bool = False,
    fit: str = "model.tokenizer=union (or base)",
) -> Iterator[Finding]:
    """Compare a model with the one that it must be related to.

    Args:
        reference: The base, or the model that is used instead.
        expert: The other model.
        key: The expert's key in the configuration, for findings.
        possessive: The reference in the possessive case, such as `the base's`.
        fitted: Whether mergekit builds a tokenizer and fits the embeddings to it, so that vocabularies
            may differ.
        described: Whether the reference is a description that leaves out what it does not know.
        fit: How the user asks for that.
    """
    if not reference.config or not expert.config:
        return
    ours, theirs = expert.config["architectures"][0], reference.config["architectures"][0]
    strangers = [] if ours == theirs else list(_compare_strangers(reference, expert, key, possessive))
    yield from strangers
    if any(f.code == "missing-tensor" for f in strangers):
        return
    wrong = list(_compare_configs(reference, expert, key, possessive, described))
    if strangers:
        wrong = [f for f in wrong if f.code != "architecture"]  # that has been said
    yield from wrong
    if "Classification" in ours:
        yield from _compare_labels(reference, expert, key, possessive)
    if not any(f.code in ("shape", "heads", "layers") for f in wrong):
        # Otherwise shapes differ because of what has just been reported.
        yield from tensor_checks.compare_shapes(reference, expert, key, possessive, _remedy("shape"))
    if not fitted:
        yield from tensor_checks.compare_vocabularies(reference, expert, key, possessive, fit)
    if reference.dtype and expert.dtype and reference.dtype != expert.dtype:
        yield note("mixed-dtype", key, f"its weights are {expert.dtype}, {possessive} are {reference.dtype}")


def _compare_strangers(
    reference: ModelMetadata, expert: ModelMetadata, key: str, possessive: str
) -> Iterator[Finding]:
    """Models of two architectures can be merged where one has all tensors of the other."""
    ours, theirs = expert.config["architectures"][0], reference.config["architectures"][0]
    message, remedy = (
        f"its architecture is {ours}, {possessive} is {theirs}",
        "Use models of one architecture",
    )
    lacking = sorted(reference.tensors.keys() - expert.tensors.keys()) if expert.tensors else []
    if lacking:
        yield error("missing-tensor", key, f"{message}: it lacks {first_few(lacking)}", f"{remedy}.")
    else:
        remedy += ", or pass allow=[architecture] to merge what has the same name and shape."
        yield error("architecture", key, message, remedy)


def _compare_configs(
    reference: ModelMetadata, expert: ModelMetadata, key: str, possessive: str, described: bool
) -> Iterator[Finding]:
    """Compare what transformers makes of the two config.json; what has no effect may differ."""
    a, b = config_meaning.stated(expert.config), config_meaning.stated(reference.config)
    if a == b or (described and b.items() <= a.items()):
        return
    file = expert.folder / "config.json"
    ours, theirs = config_meaning.of(expert.config), config_meaning.of(reference.config)
    for m, folder in ((ours, expert.folder), (theirs, reference.folder)):
        if m.refused:
            yield error("unloadable", key, f"{folder / 'config.json'}: {m.refused}")
            return
    paths = _differing(ours, theirs)
    if ours.values.get("model_type") != theirs.values.get("model_type"):
        # Another architecture: what only one of the two knows means nothing to the other.
        paths = [p for p in paths if p in ours.values and p in theirs.values]
    if described:
        said = {*reference.config, *(["rope_parameters"] if "rope_theta" in reference.config else [])}
        paths = [p for p in paths if p.split(".")[0] in said]
    shapes, others = ({n: t.shape for n, t in m.tensors.items()} for m in (expert, reference))
    differ: dict[str, list[str]] = {}
    for path in paths:
        code = kind((ours if path in ours.values else theirs).name(path))
        if code in ("shape", "layers") and shapes and shapes == others:
            code = "config"  # a size that no tensor has: a dense layer's in a model that has none
        differ.setdefault(code, []).append(path)
    for code, found in differ.items():
        text = "; ".join(_said(found, ours, theirs, possessive))
        yield error(code, key, f"{text} ({file})", _remedy(code))


def _said(paths: list[str], ours: Meaning, theirs: Meaning, possessive: str) -> Iterator[str]:
    """What differs, as text: the parameters of ropes together, and each other setting by itself."""
    ropes = [p for p in paths if "rope_parameters" in p]
    if ropes:
        a, b = ({p.split("rope_parameters.")[-1]: m.values.get(p) for p in ropes} for m in (ours, theirs))
        yield f"rope is {rope_text(a)}, {possessive} is {rope_text(b)}"
    for path in paths:
        if path not in ropes:
            at, own, other = _shown(ours.values.get(path), theirs.values.get(path))
            yield f"{path}{at} is {own}, {possessive} is {other}"


def _compare_labels(
    reference: ModelMetadata, expert: ModelMetadata, key: str, possessive: str
) -> Iterator[Finding]:
    """Compare the meaning of a classifier's outputs, where both models name them."""
    ours, theirs = (m.config.get("id2label") for m in (expert, reference))
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return
    named = [any(str(v) != f"LABEL_{k}" for k, v in labels.items()) for labels in (ours, theirs)]
    if all(named) and ours != theirs:
        k = next(k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k))
        message = f"id2label.{k} is {ours.get(k)}, {possessive} is {theirs.get(k)}"
        yield error("config", key, f"{message} ({expert.folder / 'config.json'})", _remedy("config"))


def kind(name: str) -> str:
    """The code for a setting with this general name."""
    return next(code for code, pattern in KINDS if pattern.search(name))


def _differing(ours: Meaning, theirs: Meaning) -> list[str]:
    """The paths of settings that are not the same, in the order of the first model's."""
    a, b = ours.values, theirs.values
    paths = [p for p in {**a, **b} if not config_meaning.same(a.get(p), b.get(p))]
    if any(kind(ours.name(p)) == "layers" for p in paths):
        # A list with an entry for each layer then differs as well.
        lists = [p for p in paths if isinstance(a.get(p), list) and isinstance(b.get(p), list)]
        paths = [p for p in paths if p not in lists or len(a[p]) == len(b[p])]
    return paths


def _shown(a: Any, b: Any) -> tuple[str, Any, Any]:
    """Two values that differ: of long lists the first entries that do, with their index."""
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b) > 4:
        i = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        return f"[{i}]", a[i], b[i]
    return "", "unset" if a is None else a, "unset" if b is None else b


def rope_text(rope: Mapping[str, Any]) -> str:
    """Rope parameters as text."""

    def text(v: Any) -> str:
        if isinstance(v, Mapping):
            return f"({rope_text(v)})"
        return f"{v:g}" if isinstance(v, float) else str(v)

    first = ("rope_theta", "rope_type")
    keys = [k for k in (*first, *(k for k in rope if k not in first)) if rope.get(k) is not None]
    return ", ".join(f"{k}={text(rope[k])}" for k in keys) or "unset"


def norm_eps(settings: Mapping[str, Any]) -> float | None:
    """The epsilon of a model's norms, whatever its family calls it."""
    found = (v for k, v in settings.items() if kind(k) == "norm" and isinstance(v, float))
    return next(found, None)


def _remedy(code: str) -> str:
    if code in MAY_PASS:
        return f"Use fine-tunes of one base model, or pass allow=[{code}] if the difference is intended."
    return "Use fine-tunes of one base model (model.base.path)."


def generic(tensor: str) -> str:
    """A tensor's name without its layer number."""
    return LAYER.sub(".*.", tensor, count=1)
