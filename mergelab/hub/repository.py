"""What a repository of the hub holds, and what of it a merge reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mergelab.core.findings import Finding, error, some
from mergelab.core.run_dir import read_json

TIMEOUT = 30.0
"""Seconds that the hub may take to answer one question."""

FORMS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""The one file of weights, or the index of several: in safetensors, and pickled."""
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
COMPANIONS = (".json", ".txt", ".jinja", ".model", ".tiktoken")
"""What the files beside the weights end in."""
TEMPLATES = "additional_chat_templates/"
"""The only folder in which transformers looks for such files."""


@dataclass(frozen=True)
class File:
    """One file of a repository."""

    name: str
    size: int
    """Bytes."""
    digest: str
    """By this name the hub's cache knows its content: the sha256 of a large file, else git's own hash."""
    large: bool


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    name: str
    commit: str
    files: tuple[File, ...]


@dataclass(frozen=True)
class Need:
    """What is asked of a repository."""

    adapter: bool = False
    """That it is a LoRA, and not a model."""
    code: bool = False
    """The model's own Python code, too."""
    pickled: bool = False
    """Weights even where they are pickled."""


def ask(name: str, revision: str | None) -> Repository:
    """All files of a repository, with their sizes. Raises what the hub's client raises."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT)
    files = [
        File(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else str(s.blob_id), s.lfs is not None)
        for s in info.siblings or []
    ]
    return Repository(name, str(info.sha), tuple(files))


def index(of: Repository, need: Need) -> str | None:
    """The index of the weights that a merge would read; None where they are one file, or none."""
    names = {f.name for f in of.files}
    if need.adapter:
        return None
    for single, several in FORMS if need.pickled else FORMS[:1]:
        if several in names:
            return several
        if single in names:
            return None
    return None


def shards(of: Repository, name: str) -> set[str]:
    """The weight files that an index names. The index is read, and not kept. Raises what the hub's
    client raises."""
    from huggingface_hub import hf_hub_download

    with TemporaryDirectory() as aside:
        path = hf_hub_download(of.name, name, revision=of.commit, local_dir=aside)
        listed: Any = read_json(Path(path))
    weight_map = listed.get("weight_map") if isinstance(listed, dict) else None
    return {str(v) for v in weight_map.values()} if isinstance(weight_map, dict) else set()


def wanted(of: Repository, indexed: set[str], need: Need) -> list[File]:
    """The files that a merge reads: the weights once, config, tokenizer, templates.

    Args:
        indexed: the weight files that the index names; empty where there is none.
    """
    used, weights = index(of, need), indexed or {_single(of, need)}

    def beside(name: str) -> bool:
        if name.endswith(".py"):
            return need.code
        if name.endswith(".index.json"):
            return name == used  # the others are of weights in another format
        return "/" not in name.removeprefix(TEMPLATES) and name.endswith(COMPANIONS)

    return [f for f in of.files if f.name in weights or beside(f.name)]


def check(of: Repository, indexed: set[str], place: str, need: Need) -> list[Finding]:
    """Whether the repository has what a merge needs.

    Args:
        indexed: as for `wanted`.
        place: the key that names it.
    """
    names = {f.name for f in of.files}
    at = f"{of.name}@{of.commit[:12]}"
    config, kind = (ADAPTER[0], "LoRA") if need.adapter else ("config.json", "model")
    if config not in names:
        lora = not need.adapter and ADAPTER[0] in names
        remedy = f"It is a LoRA: name it after its model, as BASE+{of.name}" if lora else ""
        return [error("no-config", place, f"{at} has no {config}, so it is no {kind}", remedy)]
    if index(of, need):
        lost = sorted(indexed - names)
        if indexed and not lost:
            return []
        message = f"lacks {some(lost)}, which its index names" if lost else "has an index that names no file"
        return [error("missing-file", place, f"{at} {message}", "Choose another revision.")]
    if _single(of, need) in names:
        return []
    pickled = sorted(n for n in names if n.endswith((".bin", ".pt", ".pth")) and "/" not in n)
    if pickled:
        return [_pickled(at, place, pickled, need)]
    other = sorted(n for n in names if n.endswith((".gguf", ".safetensors", ".msgpack", ".h5")))
    there = f"; it has {some(other)}" if other else ""
    message = f"{at} has no {_single(of, need)}{there}"
    return [error("no-weights", place, message, "Use the unquantized checkpoint.")]


def _single(of: Repository, need: Need) -> str:
    """The one file of weights that is looked for."""
    if need.adapter:
        return ADAPTER[1]
    names = {f.name for f in of.files}
    forms = [single for single, _ in FORMS if single in names]
    return forms[0] if forms and need.pickled else FORMS[0][0]


def _pickled(at: str, place: str, files: list[str], need: Need) -> Finding:
    message = f"{at} has only pickled weights ({some(files)}), which can run code"
    remedy = (
        "Name a revision with safetensors, if its pages show one under Pull requests (revision=refs/pr/N), "
        "or convert them: load and save_pretrained."
    )
    if need.adapter or not any(f.startswith("pytorch_model") for f in files):
        return error("no-weights", place, message, remedy)  # this cannot be let pass
    more = "Or pass allow=[pickled]: they are then read without running any."
    return error("pickled", place, message, f"{remedy}\n{more}")
