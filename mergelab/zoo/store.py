"""A store of built folders that are complete, verified, and built only once.

A folder is built under a temporary name beside its own and renamed when it is complete. Its manifest has
the hash of every file, so damage (or data lost in a power failure) is detected and the folder is rebuilt.
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
"""Fills an empty folder and returns the additional content of its manifest."""

log = logging.getLogger(__name__)


def open_at(path: Path, build: Build) -> None:
    """Make sure that the folder `path` is complete, and build it if it is missing or damaged.

    One process builds while others wait for it. A build that fails or is killed leaves nothing under
    `path`, and the temporary folder of a killed one is removed by the next.

    Raises:
        OSError: A build is needed and the folder cannot be written. The message names the remedy.
    """
    if not problems(path):
        return
    with _locked(path):
        found = problems(path)  # again: another process may have built it meanwhile
        if found:
            if path.exists():
                log.warning("rebuilding %s because it is damaged: %s", path, "; ".join(found))
            _build_at(path, build)


def problems(path: Path) -> list[str]:
    """What is wrong with the folder `path`, one line each. Empty if it is complete."""
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
    """Hold the lock of the folder `path`, which one process can have at a time."""
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("waiting for another process that is building %s", path)
            lock.acquire()
    except OSError as e:
        why = f"cannot write here ({e.strerror}); set MERGELAB_HOME to a writable folder"
        raise OSError(e.errno, why, str(path.parent)) from e
    try:
        yield
    finally:
        lock.release()


def _build_at(path: Path, build: Build) -> None:
    """Build `path` and replace what exists. The caller must hold the lock."""
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
    # safetensors creates files that only their owner can read. The user's umask shall decide.
    mode = manifest.stat().st_mode
    for file in files:
        file.chmod(mode)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
