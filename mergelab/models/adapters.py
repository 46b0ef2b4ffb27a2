"""A LoRA adapter beside the model that it is put on: what peft reports late, or passes over in silence.

An adapter's tensors that the model has no place for are left out by peft without a word: that of a
model with more layers loads, and does only part of its work.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from mergelab.core.findings import Finding, error, some, warning
from mergelab.models import architecture, checkpoint
from mergelab.models.checkpoint import ModelMetadata, TensorInfo
from mergelab.models.json_files import load_json
from mergelab.models.resolver import HUB_ID, Source

FILES = ("adapter_config.json", "adapter_model.safetensors")
PREFIX = "base_model.model."
"""What peft puts before the names of a model's own modules."""

FACTOR = re.compile(r"(?P<module>.+?)\.lora_(?P<embedding>embedding_)?(?P<letter>[AB])(\.weight)?")

Shapes = Mapping[str, tuple[int, ...]]


def check(s: Source, base: ModelMetadata) -> Iterator[Finding]:
    """Findings of an adapter from its config and the headers of its file.

    Args:
        s: a model with an adapter.
        base: the model's own facts.
    """
    if s.adapter is None or not base.tensors:
        return
    settings, file = (s.adapter / name for name in FILES)
    if not (settings.exists() and file.exists()):
        return  # it has been told where they were looked for
    config, wrong = load_json(settings, s.place, checkpoint.FETCH)
    if not wrong and not (isinstance(config, dict) and config.get("peft_type")):
        message = f"{settings} names no peft_type, so it is no adapter of peft"
        wrong = [error("adapter", s.place, message, checkpoint.FETCH)]
    tensors, damaged = checkpoint.file_headers(file, s.place, checkpoint.FETCH)
    yield from (*wrong, *damaged)
    if wrong or damaged:
        return
    yield from _check_fit(s, base, tensors)
    yield from _check_origin(s, config.get("base_model_name_or_path"))


def _check_fit(s: Source, base: ModelMetadata, tensors: Mapping[str, TensorInfo]) -> Iterator[Finding]:
    """Whether the model has what the adapter changes. Other architectures than dense decoders may call
    their modules otherwise in their files."""
    if architecture.shapes(base.config) is None:
        return
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
                differ.append(f"{name} is for {ours}, and {weight} has {theirs}")
        elif factor:
            absent[factor["module"]] = None
    remedy = "Put it on the model that it was made for."
    if absent:
        message = f"{s.adapter} adapts {some(absent)}, which {base.folder} does not have"
        yield error("adapter", s.place, message, remedy)
    if differ:
        more = f", and {len(differ) - 1:,} more differ" if len(differ) > 1 else ""
        yield error("adapter", s.place, f"{differ[0]}{more} ({s.adapter})", remedy)


def _sides(
    factor: re.Match[str] | None, own: tuple[int, ...], weight: tuple[int, ...]
) -> tuple[object, object]:
    """What must be equal of a tensor of an adapter, and of the weight it is for: A has the inputs, B the
    outputs; an embedding's weight is (inputs, outputs), any other (outputs, inputs)."""
    if factor is None or len(weight) != 2 or len(own) != 2:
        return list(own), list(weight)
    outputs, inputs = reversed(weight) if factor["embedding"] else weight
    if factor["letter"] == "A":
        return f"{own[1]:,} inputs", f"{inputs:,} inputs"
    return f"{own[0]:,} outputs", f"{outputs:,} outputs"


def _check_origin(s: Source, named: object) -> Iterator[Finding]:
    """Whether the adapter says that it was made for another model; silent where that cannot be told, as
    of a folder on another machine."""
    if not isinstance(named, str) or not named:
        return
    main = s.path.partition("+")[0]
    if Path(named).is_dir():
        other = Path(named).resolve() != s.folder
    elif s.commit and HUB_ID.fullmatch(named):  # people copy models under names of their own
        other = named.rpartition("/")[2].lower() != main.rpartition("/")[2].lower()
    else:
        other = False
    if other:
        message = f"{s.adapter} says that it was made for {named}, and is put on {main}"
        yield warning("adapter-base", s.place, message)
