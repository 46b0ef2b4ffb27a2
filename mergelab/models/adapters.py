"""Checks of an adapter against its base model: what peft reports late, or not at all.

peft silently drops adapter tensors for which the model has no module. An adapter of a model with more
layers therefore loads, but has only part of its effect.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergelab.core.findings import Finding, error, first_few, more_differ, note, warning
from mergelab.core.remembered import remembered
from mergelab.models import architecture, blueprint, checkpoint
from mergelab.models.checkpoint import ModelMetadata, TensorInfo
from mergelab.models.json_files import load_json
from mergelab.models.resolver import HUB_ID, Source

FILES = ("adapter_config.json", "adapter_model.safetensors")
PREFIX = "base_model.model."
"""The prefix that peft puts before the names of a model's own modules."""

ITS_OWN = "Use it with the model that it was made for."
LATER = "Leave it out of the merge, and put it on the merged model with peft."

FACTOR = re.compile(r"(?P<module>.+?)\.lora_(?P<embedding>embedding_)?(?P<letter>[AB])(\.weight)?")

USUAL = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "target_modules", "task_type", "trainable_token_indices", "use_dora",
    "use_rslora",
})  # fmt: skip
"""Settings of a LoRA that the table of shapes suffices for. For all others peft itself is asked."""


def check(s: Source, base: ModelMetadata) -> Iterator[Finding]:
    """Check an adapter by its config and the headers of its file.

    Args:
        s: A model with an adapter.
        base: The metadata of the model without it.

    Yields:
        What is wrong with the adapter, or does not fit the model.
    """
    if s.adapter is None or not base.tensors:
        return
    settings, file = (s.adapter / name for name in FILES)
    if not (settings.exists() and file.exists()):
        return  # reported by the resolver
    config, wrong = load_json(settings, s.key, checkpoint.FETCH)
    if not wrong and not (isinstance(config, dict) and config.get("peft_type")):
        message = f"{settings} names no peft_type, so it is not a peft adapter"
        wrong = [error("adapter", s.key, message, checkpoint.FETCH)]
    tensors, damaged = checkpoint.file_headers(file, s.key, checkpoint.FETCH)
    yield from (*wrong, *damaged)
    if wrong or damaged:
        return
    rows = [*_check_rows(s, base, tensors)]
    usual = config["peft_type"] == "LORA" and not {k for k, v in config.items() if v} - USUAL
    if rows:
        yield from rows
    elif usual and architecture.shapes(base.config) is not None:
        yield from _check_fit(s, base, tensors)
    else:
        yield from _ask_peft(s, base, config, tensors)
    yield from _check_ties(s, base, config, tensors)
    yield from _check_origin(s, config.get("base_model_name_or_path"))


def copies(names: Collection[str]) -> set[str]:
    """Those of an adapter's tensors that are a whole module under a second name.

    peft saves a replaced embedding or head twice where the model was resized, and reads one of the two.
    """
    return {n for n in names if ".modules_to_save." in n and n.replace(".modules_to_save.", ".") in names}


def changed_elements(adapter: Path, base: ModelMetadata) -> int:
    """The number of elements of the base's tensors that an adapter changes; an upper bound.

    All of them count where the adapter's modules have other names than the base's tensors.
    """
    headers, _ = checkpoint.file_headers(adapter / FILES[1], "", checkpoint.FETCH)
    names = [n.removeprefix(PREFIX) for n in headers]
    modules: dict[str, int] = {}
    for name, t in base.tensors.items():
        module = f"{name.rpartition('.')[0]}."
        modules[module] = modules.get(module, 0) + t.numel
    found = {m for m in modules if any(n.startswith(m) for n in names)}
    known = all(any(n.startswith(m) for m in found) for n in names)
    return sum(modules[m] for m in found) if known else base.parameters


def _ask_peft(
    s: Source, base: ModelMetadata, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> Iterator[Finding]:
    """Let peft put the adapter into transformers' model of the base, both without values."""
    headers = {n: (t.dtype, t.shape) for n, t in sorted(tensors.items())}

    def answer() -> dict[str, Any]:
        from mergelab.models import peft_fit

        return peft_fit.fit(base.folder, s.adapter or Path(), headers)

    found = remembered("peft", [version("peft"), base.config, config, headers], answer)
    for problem in found["problems"]:
        later = problem.startswith(("an adapter of prompt tokens", "peft cannot merge"))
        message = f"{s.adapter} cannot be used with {base.folder}: {problem}"
        yield error("adapter", s.key, message, LATER if later else ITS_OWN)
    for text in found["warnings"]:
        yield warning("adapter", s.key, f"peft says of {s.adapter}: {text}")


def _check_rows(s: Source, base: ModelMetadata, tensors: Mapping[str, TensorInfo]) -> Iterator[Finding]:
    """Tell where an adapter has an entry for each token, and for other tokens than the model has.

    peft resizes no model: who trained the adapter did so before.
    """
    found = blueprint.of(base)
    for name, t in tensors.items() if found else ():
        name = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        factor = FACTOR.fullmatch(name)
        weight = f"{factor['module']}.weight" if factor else name
        axis, shape = (
            (found.vocabulary.get(weight), found.parameters.get(weight, ())) if found else (None, ())
        )
        if axis is None or len(t.shape) != len(shape):
            continue
        if factor is None:
            own = t.shape[axis]
            other = t.shape[:axis] + t.shape[axis + 1 :] != shape[:axis] + shape[axis + 1 :]
        else:
            own = t.shape[1 if factor["embedding"] else 0]
            other = factor["letter"] != ("A" if factor["embedding"] else "B")  # it has no rows for tokens
        if not other and own != shape[axis]:
            message = (
                f"{s.adapter} was trained on a model with {own:,} rows in {weight}; {base.folder} has "
                f"{shape[axis]:,}"
            )
            remedy = (
                f"Resize the base as was done for the training: load it, `resize_token_embeddings({own})`, "
                "`save_pretrained` it with the adapter's tokenizer, and name the new folder."
            )
            yield error("adapter", s.key, message, remedy)
            return


def _check_ties(
    s: Source, base: ModelMetadata, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> Iterator[Finding]:
    """Tell where an adapter changes a head, or the embedding that it is tied to, and not both alike."""
    if config.get("ensure_weight_tying"):
        return
    found = blueprint.of(base)
    names = [n.removeprefix(PREFIX) for n in tensors if "trainable_tokens" not in n]
    for head, embedding in (found.ties if found else {}).items():
        modules = [n.rpartition(".")[0] for n in (embedding, head)]
        changed = [m for m in modules if any(n.startswith(f"{m}.") for n in names)]
        if changed:
            message = (
                f"{s.adapter} changes {' and '.join(changed)}, and {modules[1]} is tied to {modules[0]}: "
                f"with it the two are no longer one, and the merged model has tie_word_embeddings=false"
            )
            yield note("untied", s.key, message)


def _check_fit(s: Source, base: ModelMetadata, tensors: Mapping[str, TensorInfo]) -> Iterator[Finding]:
    """Check that a dense decoder, whose files name tensors as the model does, has what changes."""
    shapes = {n: t.shape for n, t in base.tensors.items()}
    if architecture.tied(base.text_config) and "model.embed_tokens.weight" in shapes:
        shapes.setdefault("lm_head.weight", shapes["model.embed_tokens.weight"])
    absent: dict[str, None] = {}
    differ: list[str] = []
    for name, t in tensors.items():
        name = name.removeprefix(PREFIX)
        factor = FACTOR.fullmatch(name)
        weight = f"{factor['module']}.weight" if factor else name
        if weight in shapes:
            ours, theirs = _sides(factor, t.shape, shapes[weight])
            if ours != theirs:
                differ.append(f"{name} expects {ours}, but {weight} has {theirs}")
        elif factor:
            absent[factor["module"]] = None
    if absent:
        message = f"{s.adapter} adapts {first_few(absent)}, but {base.folder} has no such module"
        yield error("adapter", s.key, message, ITS_OWN)
    if differ:
        yield error("adapter", s.key, f"{differ[0]}{more_differ(differ)} ({s.adapter})", ITS_OWN)


def _sides(
    factor: re.Match[str] | None, own: tuple[int, ...], weight: tuple[int, ...]
) -> tuple[object, object]:
    """The dimensions of an adapter's tensor and of the weight it changes that must be equal.

    A has the inputs and B the outputs. An embedding's weight is (inputs, outputs), any other one is
    (outputs, inputs).
    """
    if factor is None or len(weight) != 2 or len(own) != 2:
        return list(own), list(weight)
    outputs, inputs = reversed(weight) if factor["embedding"] else weight
    if factor["letter"] == "A":
        return f"{own[1]:,} inputs", f"{inputs:,} inputs"
    return f"{own[0]:,} outputs", f"{outputs:,} outputs"


def _check_origin(s: Source, named: object) -> Iterator[Finding]:
    """Warn if the adapter names another base model.

    Nothing is reported where this is unknown, for example because it names a folder on another machine.
    """
    if not isinstance(named, str) or not named:
        return
    main = s.path.partition("+")[0]
    if Path(named).is_dir():
        other = Path(named).resolve() != s.folder
    elif s.commit and HUB_ID.fullmatch(
        named
    ):  # the owner is not compared: models are copied to other accounts
        other = named.rpartition("/")[2].lower() != main.rpartition("/")[2].lower()
    else:
        other = False
    if other:
        message = f"{s.adapter} was made for {named}, but is used with {main}"
        yield warning("adapter-base", s.key, message)
