"""Where built things are kept: whole, verified, and built once however many ask.

A thing is a folder. It is built under another name beside its own and renamed when it is whole, so
what has the name was whole once; its manifest has the hash of every file, so what was damaged
later (or never reached the disk before a power cut) is found out and built again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

MANIFEST = "manifest.json"
SCHEMA = 1

Build = Callable[[Path], Mapping[str, Any]]
"""Fills the empty folder it is given, and returns what the manifest is to say about it."""

logger = logging.getLogger("mergelab.zoo")


def open_at(path: Path, build: Build) -> None:
    """See to it that the folder `path` is whole, by `build` if it is missing or damaged.

    One process builds while the others wait for it. A build that fails or is killed leaves nothing
    under `path`, and what a killed one left beside it is removed by the next.

    Raises OSError, naming the folder and the remedy, if a build is needed where none can be kept.
    """
    if not problems(path):
        return
    with _locked(path):
        found = problems(path)  # again: another process may have built it meanwhile
        if found:
            if path.exists():
                logger.warning("building %s anew because it is damaged: %s", path, "; ".join(found))
            _build_at(path, build)


def problems(path: Path) -> list[str]:
    """What is wrong with the folder `path`, a line each; nothing if it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return [f"{MANIFEST} is missing"]
    except ValueError:
        return [f"{MANIFEST} cannot be read"]
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        return [f"{MANIFEST} is not of schema {SCHEMA}"]
    found = []
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            found.append(f"{name} is missing")
        elif _sha256(file) != expected:
            found.append(f"{name} has changed")
    return found


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock on what is built at `path`: one process at a time."""
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("waiting for another process that is building %s", path)
            lock.acquire()
    except OSError as error:
        why = f"cannot write here ({error.strerror}); set MERGELAB_HOME to a writable folder"
        raise OSError(error.errno, why, str(path.parent)) from error
    try:
        yield
    finally:
        lock.release()


def _build_at(path: Path, build: Build) -> None:
    """Build `path`, replacing what is there. To be called with the lock held."""
    building = path.with_name(f".{path.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        _write_manifest(building, build(building))
        if path.exists():
            shutil.rmtree(path)
        building.rename(path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    hashes = {file.relative_to(folder).as_posix(): _sha256(file) for file in files}
    manifest = folder / MANIFEST
    text = json.dumps({"schema": SCHEMA, **about, "files": hashes}, indent=2, ensure_ascii=False)
    manifest.write_text(text + "\n", encoding="utf-8")
    # Weights come out of safetensors readable by their owner alone; the user's umask decides.
    mode = manifest.stat().st_mode
    for file in files:
        file.chmod(mode)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
