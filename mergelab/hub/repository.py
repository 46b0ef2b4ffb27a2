"""The files of a repository on the hub, and which of them a merge reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mergelab.core.findings import Finding, error, first_few
from mergelab.core.model_folder import CONFIGS, MODULES, companions
from mergelab.core.run_dir import read_json

TIMEOUT = 30.0
"""Seconds that the hub may take to answer one request."""

FORMS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""The single file of weights, or the index of several: in safetensors, and pickled."""
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
MODULE = re.compile(r"\d+_\w+")
"""How sentence-transformers names the folders of a model's further modules."""


@dataclass(frozen=True)
class File:
    """One file of a repository."""

    name: str
    size: int
    """Bytes."""
    digest: str
    """The name of its content in the hub's cache: the sha256 of a large file, else git's own hash."""
    large: bool


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    name: str
    commit: str
    files: tuple[File, ...]


@dataclass(frozen=True)
class Need:
    """What is needed of a repository."""

    adapter: bool = False
    """It is a LoRA rather than a model."""
    code: bool = False
    """The model's own Python code is needed, too."""
    pickled: bool = False
    """Pickled weights are accepted."""


def ask(name: str, revision: str | None) -> Repository:
    """All files of a repository with their sizes. Exceptions of the hub's client pass through."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT)
    files = [
        File(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else str(s.blob_id), s.lfs is not None)
        for s in info.siblings or []
    ]
    return Repository(name, str(info.sha), tuple(files))


def index(of: Repository, need: Need) -> str | None:
    """The index of the weights that a merge reads; None if they are a single file, or missing."""
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
    """The weight files that an index names. Exceptions of the hub's client pass through.

    The index is not kept in the cache.
    """
    from huggingface_hub import hf_hub_download

    with TemporaryDirectory() as aside:
        path = hf_hub_download(of.name, name, revision=of.commit, local_dir=aside)
        listed: Any = read_json(Path(path))
    weight_map = listed.get("weight_map") if isinstance(listed, dict) else None
    return {str(v) for v in weight_map.values()} if isinstance(weight_map, dict) else set()


def wanted(of: Repository, indexed: set[str], need: Need) -> list[File]:
    """The files that a merge reads: weights in one format, config, tokenizer, templates.

    Args:
        of: The repository.
        indexed: The weight files that the index names; empty if there is no index.
        need: What is needed.
    """
    used, weights = index(of, need), indexed or {_single(of, need)}
    names = [f.name for f in of.files]
    folders = {n.partition("/")[0] for n in names if MODULES in names and "/" in n}
    belong = {*companions(names, (f for f in folders if MODULE.fullmatch(f))), *CONFIGS}
    if need.adapter:
        belong |= {*ADAPTER}

    def beside(name: str) -> bool:
        if name.endswith(".py"):
            return need.code
        if name.endswith(".index.json"):
            return name == used  # the others are of weights in another format
        return name in belong

    return [f for f in of.files if f.name in weights or beside(f.name)]


def check(of: Repository, indexed: set[str], key: str, need: Need) -> list[Finding]:
    """Check that the repository has what a merge needs.

    Args:
        of: The repository.
        indexed: The weight files that the index names; empty if there is no index.
        key: The key that names it.
        need: What is needed.
    """
    names = {f.name for f in of.files}
    label = f"{of.name}@{of.commit[:12]}"
    config, kind = (ADAPTER[0], "LoRA") if need.adapter else ("config.json", "model")
    if config not in names:
        lora = not need.adapter and ADAPTER[0] in names
        remedy = f"It is a LoRA: name it after its model, as BASE+{of.name}" if lora else ""
        return [error("no-config", key, f"{label} has no {config}, so it is not a {kind}", remedy)]
    if index(of, need):
        lost = sorted(indexed - names)
        if indexed and not lost:
            return []
        message = (
            f"lacks {first_few(lost)}, which its index names" if lost else "has an index that names no file"
        )
        return [error("missing-file", key, f"{label} {message}", "Choose another revision.")]
    if _single(of, need) in names:
        return []
    pickled = sorted(n for n in names if n.endswith((".bin", ".pt", ".pth")) and "/" not in n)
    if pickled:
        return [_pickled(label, key, pickled, need)]
    other = sorted(n for n in names if n.endswith((".gguf", ".safetensors", ".msgpack", ".h5")))
    others = f"; it has {first_few(other)}" if other else ""
    message = f"{label} has no {_single(of, need)}{others}"
    return [error("no-weights", key, message, "Use the unquantized checkpoint.")]


def _single(of: Repository, need: Need) -> str:
    """The single file of weights that is expected."""
    if need.adapter:
        return ADAPTER[1]
    names = {f.name for f in of.files}
    forms = [single for single, _ in FORMS if single in names]
    return forms[0] if forms and need.pickled else FORMS[0][0]


def _pickled(label: str, key: str, files: list[str], need: Need) -> Finding:
    message = f"{label} has only pickled weights ({first_few(files)}), which can run code"
    remedy = (
        "Name a revision with safetensors, if its pages show one under Pull requests (revision=refs/pr/N), "
        "or convert them: load and save_pretrained."
    )
    if need.adapter or not any(f.startswith("pytorch_model") for f in files):
        return error("no-weights", key, message, remedy)  # allow=[pickled] does not apply
    more = "Or pass allow=[pickled]: they are then read without running any code."
    return error("pickled", key, message, f"{remedy}\n{more}")
