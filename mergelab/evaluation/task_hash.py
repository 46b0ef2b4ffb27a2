"""The content of a task: the part of a score's key that identifies what was asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

from mergelab.core.hashing import file_hash
from mergelab.evaluation import windows
from mergelab.evaluation.task_index import Catalogue, Function

_FILE_FORMATS = ("json", "csv", "text", "parquet", "arrow", "pandas", "xml")
"""Values of dataset_path that name the format of data_files instead of a dataset."""


def definition(catalogue: Catalogue, name: str) -> dict[str, Any] | None:
    """All that decides what a task or group asks and how answers are scored, by content.

    It covers the YAML of the task and of everything a group contains, with includes; every Python file
    beside a YAML that names a function; local data files; and the commit of each hub dataset.

    Returns:
        None where the content is not known. A hub dataset that has never been fetched has no commit yet. A
        task that is a Python class, or whose data a function makes, may read any file. If its YAML says
        `metadata: {self_contained: true}`, all files in and below its folder stand for what it reads.
    """
    parts: dict[str, Any] = {}
    for item in catalogue.closure(name):
        data: dict[str, str] = {}
        rolling = False
        promise = item.config.get("metadata")
        contained = isinstance(promise, dict) and promise.get("self_contained") is True
        if contained and item.file is not None:
            data = _files(item.file.parent)
        for mapping in _mappings(item.config):
            if not contained and ("class" in mapping or "custom_dataset" in mapping):
                return None
            for source, content in _data(mapping):
                if content is None:
                    return None
                data[source] = content
            # Python may make any kind of request.
            rolling |= mapping.get("output_type") == "loglikelihood_rolling" or "class" in mapping
        version = [windows.VERSION] if rolling else []
        parts[item.name] = [item.kind, item.config, list(item.members), _code(item.config), data, *version]
    return parts


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a YAML value, itself included."""
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value:
        if isinstance(child, (dict, list)):
            yield from _mappings(child)


def _code(config: dict[str, Any]) -> dict[str, str]:
    """Hashes of the Python files that the functions of a task may use, by file name."""
    folders = {
        value.folder
        for mapping in _mappings(config)
        for item in mapping.values()
        for value in (item if isinstance(item, list) else [item])
        if isinstance(value, Function)
    }
    return {
        f"{n}/{file.name}": file_hash(file)
        for n, folder in enumerate(sorted(folders))
        for file in sorted(folder.glob("*.py"))
    }


def _data(mapping: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """The data that a mapping names: their source, and a hash or commit (None: not known).

    Relative paths are relative to the working directory, as `datasets` has it.
    """
    options = mapping.get("dataset_kwargs") or {}
    folder = options.get("data_dir")
    for pattern in _strings(options.get("data_files") or ([f"{folder}/**"] if folder else [])):
        if "://" in pattern:
            yield pattern, None
            continue
        base = pattern if folder is None else str(Path(folder) / pattern)
        found = sorted(glob(base, recursive=True))  # noqa: PTH207 (Path.glob refuses "/...")
        files = [Path(path) for path in found if Path(path).is_file()]
        yield from ((f"{pattern}/{n}", file_hash(file)) for n, file in enumerate(files))
    dataset = mapping.get("dataset_path")
    if not isinstance(dataset, str) or dataset in _FILE_FORMATS:
        return
    if Path(dataset).is_file():
        yield dataset, file_hash(Path(dataset))
    elif Path(dataset).is_dir():
        yield from ((f"{dataset}/{name}", value) for name, value in _files(Path(dataset)).items())
    else:
        yield dataset, _commit(dataset, options.get("revision") or "main")


def _files(folder: Path) -> dict[str, str]:
    """The hashes of all files in a folder and below, by their paths in it."""
    return {
        path.relative_to(folder).as_posix(): file_hash(path)
        for path in sorted(folder.glob("**/*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def _commit(dataset: str, revision: str) -> str | None:
    """The commit of a hub dataset's branch or tag as it was last fetched to this machine."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import constants

    folder = f"datasets--{dataset.replace('/', '--')}"
    ref = Path(constants.HF_HUB_CACHE) / folder / "refs" / revision
    return ref.read_text().strip() if ref.is_file() else None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    else:
        for child in value.values() if isinstance(value, dict) else value:
            yield from _strings(child)
