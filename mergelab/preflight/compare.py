"""An expert beside the base: everything that makes averaging their weights meaningless."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mergelab.preflight.architecture import weights
from mergelab.preflight.checkpoint import Facts, _some
from mergelab.preflight.findings import Finding, error, note, warning

ANCESTRY = "Use fine-tunes of one base model, or pass allow=[{code}] if you know that it is right."

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
"""Keys of config.json that must be equal, and the code of the finding where they are not."""


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """How positions are encoded, whichever way config.json writes it.

    transformers 5 writes `rope_parameters`; before, it was `rope_theta` and `rope_scaling`.
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


def compare(base: Facts, expert: Facts, place: str, *, fitted: bool) -> Iterator[Finding]:
    """Findings of one expert against the base.

    Args:
        base: the model whose config and tokenizer the output gets.
        expert: the other model.
        place: how findings call the expert.
        fitted: mergekit builds a tokenizer and fits the embeddings to it, so that vocabularies
            may differ.
    """
    if not base.config or not expert.config:
        return
    names = (base.config["architectures"][0], expert.config["architectures"][0])
    if names[0] != names[1]:
        yield error(
            "architecture",
            place,
            f"it is a {names[1]}, the base a {names[0]}",
            "Only models of one architecture can be merged.",
        )
        return
    ours, theirs = expert.text_config, base.text_config
    for key, code in SAME.items():
        if key in ours and key in theirs and ours[key] != theirs[key]:
            yield error(
                code,
                place,
                f"{key} is {ours[key]}, the base's is {theirs[key]} ({expert.folder}/config.json)",
                ANCESTRY.format(code=code),
            )
    if rope(ours) != rope(theirs):
        yield error(
            "rope",
            place,
            f"rope is {_rope_text(rope(ours))}, the base's is {_rope_text(rope(theirs))} "
            f"({expert.folder}/config.json)",
            ANCESTRY.format(code="rope"),
        )
    yield from _compare_tensors(base, expert, place, fitted)
    if not fitted:
        yield from _compare_tokenizers(base, expert, place)
    if base.dtype and expert.dtype and base.dtype != expert.dtype:
        yield note("mixed-dtype", place, f"its weights are {expert.dtype}, the base's {base.dtype}")


def _rope_text(r: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in r.items()) or "unset"


def generic(tensor: str) -> str:
    """A tensor's name without the number of its layer."""
    return re.sub(r"\.\d+\.", ".*.", tensor, count=1)


def _compare_tensors(base: Facts, expert: Facts, place: str, fitted: bool) -> Iterator[Finding]:
    vocabulary = {"model.embed_tokens.weight", "lm_head.weight"}
    differ = [
        (n, t.shape, base.tensors[n].shape)
        for n, t in expert.tensors.items()
        if n in base.tensors and t.shape != base.tensors[n].shape
    ]
    rows = [d for d in differ if d[0] in vocabulary]
    if rows and not fitted:
        n, a, b = rows[0]
        yield error(
            "vocabulary",
            place,
            f"{n} has {a[0]:,} rows, the base's has {b[0]:,}: the vocabularies differ",
            "Set model.tokenizer=union (or base) to let mergekit fit the embeddings.",
        )
    rest = [d for d in differ if d[0] not in vocabulary]
    if rest:
        n, a, b = rest[0]
        more = f", and {len(rest) - 1:,} more differ" if len(rest) > 1 else ""
        yield error(
            "shape",
            place,
            f"{n} is {list(a)}, the base's is {list(b)}{more}",
            "Use fine-tunes of one base model.",
        )


def check_complete(facts: Facts, place: str) -> Iterator[Finding]:
    """Missing and extra tensors of one model, by its own config.json."""
    if not facts.config or not facts.tensors or any(f.code in _BROKEN for f in facts.findings):
        return
    listed = weights(facts.config)
    if listed is None:
        yield note(
            "unlisted",
            place,
            f"mergekit has no list of the tensors of {facts.config['architectures'][0]}; it will infer one",
        )
        return
    have = set(facts.tensors)
    tied = facts.text_config.get("tie_word_embeddings", False)
    missing = [w.name for w in listed if w.name not in have and not (set(w.also) & have) and not w.optional]
    if missing:
        yield error(
            "missing-tensor", place, f"{facts.folder} lacks {_some(missing)}", "Fetch the checkpoint again."
        )
    if (
        not tied
        and facts.config.get("tie_word_embeddings") is False
        and not any(n.endswith("lm_head.weight") for n in have)
        and any(w.name == "lm_head.weight" for w in listed)
    ):
        yield error(
            "missing-tensor",
            place,
            f"{facts.folder} lacks lm_head.weight, and its embeddings are not tied",
            "Fetch the checkpoint again.",
        )
    known = {w.name for w in listed} | {n for w in listed for n in w.also}
    extra = sorted(n for n in have - known if not n.endswith("rotary_emb.inv_freq"))
    if extra:
        yield error(
            "extra-tensor",
            place,
            f"{facts.folder} has {_some(extra)}, which a {facts.config['architectures'][0]} does not; "
            "mergekit would drop them",
            "Pass allow=[extra-tensor] if they are not needed.",
        )


_BROKEN = {"missing-file", "missing-tensor", "corrupt", "unreadable"}


def _compare_tokenizers(base: Facts, expert: Facts, place: str) -> Iterator[Finding]:
    ours, theirs = expert.tokenizer, base.tokenizer
    if ours is None or theirs is None:
        if theirs is not None and not expert.has_tokenizer:
            yield warning(
                "no-tokenizer",
                place,
                f"{expert.folder} has no tokenizer, so it cannot be compared",
                "It is measured with the base's.",
            )
        return
    if ours.digest == theirs.digest:
        return
    by_id = {i: t for t, i in theirs.vocab.items()}
    moved = [(t, i) for t, i in ours.vocab.items() if i in by_id and by_id[i] != t]
    if moved or not (ours.vocab and theirs.vocab):
        shown = (
            f": id {moved[0][1]} is {moved[0][0]!r} here and {by_id[moved[0][1]]!r} there" if moved else ""
        )
        yield error(
            "tokenizer",
            place,
            f"its tokenizer is not the base's, {len(moved) or 'some'} ids mean something else{shown}",
            "Set model.tokenizer=union to let mergekit fit the embeddings, or use another expert.",
        )
        return
    new = sorted(set(ours.vocab) - set(theirs.vocab))
    gone = sorted(set(theirs.vocab) - set(ours.vocab))
    if new or gone:
        parts = [f"adds {_some(new)}"] if new else []
        parts += [f"lacks {_some(gone)}"] if gone else []
        yield warning(
            "added-tokens",
            place,
            f"beside the base's tokenizer, its own {' and '.join(parts)}",
            "The output gets the base's tokenizer.",
        )
    else:
        yield error(
            "tokenizer",
            place,
            "its tokenizer has the base's vocabulary but splits text otherwise",
            ANCESTRY.format(code="tokenizer"),
        )
