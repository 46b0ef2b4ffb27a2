"""What makes two runs the same run: the content of their inputs, and everything that determines the
result. Nothing that does not, such as where files lie or how many threads work, takes part."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mergelab.core.model_folder import CONFIGS, companions_of
from mergelab.core.run_dir import read_memo, write_json

IDENTITY_FILES = ("*.safetensors", "*.safetensors.index.json", *CONFIGS, "adapter_config.json", "*.py")
"""The files of a model folder that decide what it computes, besides its companions."""

PICKLED = ("pytorch_model*.bin", "pytorch_model*.bin.index.json", "adapter_model.bin")
"""Those that do besides, where there are no weights in safetensors."""

BLOCK = 1 << 22


def digest(value: Any) -> str:
    """sha256 of a value that Python's json can write, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: Path, on_read: Callable[[int], None] = lambda done: None) -> str:
    """sha256, in hex, of a file's bytes; `on_read` hears how many have been read."""
    sha, done = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            sha.update(block)
            done += len(block)
            on_read(done)
    return sha.hexdigest()


def stamp(path: Path) -> list[int]:
    """Size and time of change of a file: a cheap stand-in for its content."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def folder_stamp(folder: Path) -> list[tuple[str, int, int]]:
    """Name and stamp of each file in a folder."""
    files = sorted(f for f in folder.iterdir() if f.is_file())
    return [(f.name, *stamp(f)) for f in files]  # type: ignore[misc]


def file_hashes(
    folder: Path, memo: Path, progress: Callable[[str, int, int], None] = lambda what, done, total: None
) -> dict[str, str]:
    """sha256 of every file that matters in a model folder, by name.

    A file in the hub's cache is a link to a blob that is named by its sha256, and costs nothing.
    Others are read once; the memo remembers them by path, size and time of change.

    Args:
        folder: the model.
        memo: a JSON file that may or may not be there yet.
        progress: called with the bytes read.
    """
    pickled = () if any(folder.glob("*.safetensors")) else PICKLED
    named = {f for p in (*IDENTITY_FILES, *pickled) for f in folder.glob(p) if f.is_file()}
    files = sorted(named | {folder / name for name in companions_of(folder)})
    known = read_memo(memo)
    total = sum(f.stat().st_size for f in files)
    out: dict[str, str] = {}
    done, learnt = 0, False
    for f in files:
        name, real = f.relative_to(folder).as_posix(), f.resolve()
        of_file = stamp(real)
        entry = known.get(str(real))
        if re.fullmatch(r"[0-9a-f]{64}", real.name):
            out[name] = real.name
        elif isinstance(entry, list) and entry[:2] == of_file:
            out[name] = entry[2]
        else:
            start = done

            def on_read(n: int, start: int = start) -> None:
                progress("read inputs", start + n, total)

            out[name] = file_hash(real, on_read)
            done += of_file[0]
            known[str(real)] = [*of_file, out[name]]
            learnt = True
    if learnt:
        write_json(memo, known)
    return out


def run_key(
    recipe: Mapping[str, Any] | None, contents: Mapping[str, str], settings: Mapping[str, Any]
) -> str:
    """The run's key.

    Args:
        recipe: mergekit's YAML.
        contents: for each model reference in it, a digest of what it refers to.
        settings: seed, evaluation, versions, kind of device.
    """

    def swap(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: swap(v) for k, v in node.items()}
        if isinstance(node, list):
            return [swap(v) for v in node]
        return contents.get(node, node) if isinstance(node, str) else node

    return digest({"recipe": swap(dict(recipe)) if recipe else None, "settings": settings})
