"""Merges that were interrupted, and how the same command finds them again.

A run's folder is new each time, so an unfinished merge is found by its key: a small file in
mergelab's cache names the folder in which it lies. Whoever goes on with it moves it, and holds its
lock; a merge that somebody is still working on is never touched.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.core.errors import StepError
from mergelab.core.hashing import digest
from mergelab.core.run_dir import read_json, write_json
from mergelab.merging import shards
from mergelab.merging.shards import JOURNAL, LOCK

if TYPE_CHECKING:
    from filelock import BaseFileLock

NOTES = "merges"
"""Folder in the cache, with a file a key."""

_held: dict[Path, BaseFileLock] = {}
"""The locks of this process, by the folder; kept until the model has its final name."""


class MergeInterrupted(StepError):
    """The merge cannot go on now, and can later: a full disk, a file system that failed."""


@contextlib.contextmanager
def folder(partial: Path, key: str, recipe: Mapping[str, Any], home: Path) -> Iterator[None]:
    """Work on the merge of this key in the folder `partial`, which has then what an interrupted one
    left of it. After an interruption the folder is kept if anything in it is finished.

    Raises:
        StepError: when another run is working in it.
    """
    note = home / NOTES / f"{key}.json"
    _release(partial)  # of an earlier run in this process
    if not partial.exists():
        _claim(note, partial)
    partial.mkdir(parents=True, exist_ok=True)
    if partial not in _held and not _lock(partial):
        raise StepError(f"another run is writing to {partial}\nChoose another folder: output=DIR")
    write_json(note, {"folder": str(partial), "recipe": digest(recipe)})
    try:
        yield
    except BaseException as e:
        end(partial, home, e)
        raise


def end(partial: Path, home: Path, e: BaseException) -> None:
    """An exception has ended a run: keep what it has merged if that can go on and anything of it is
    finished, remove it otherwise. Somebody who interrupts is told."""
    outside = isinstance(e, MergeInterrupted) or not isinstance(e, Exception)  # Ctrl-C, or a cluster's signal
    if not outside or not started(partial):
        drop(partial, home)
        return
    _release(partial)
    if isinstance(e, KeyboardInterrupt):
        kept = f"interrupted; what is merged is kept in {partial}"
        e.args = (f"{kept}\nThe same command goes on from there.",)


def started(partial: Path) -> bool:
    """Whether any tensor of a merge is finished."""
    with contextlib.suppress(OSError):
        return len((partial / JOURNAL).read_text(encoding="utf-8").splitlines()) > 1
    return False


def settle(partial: Path, home: Path) -> None:
    """The merge in `partial` has become a model: leave nothing in its folder but the model."""
    _forget(partial, home)
    _release(partial)
    for name in (JOURNAL, LOCK):
        (partial / name).unlink(missing_ok=True)


def drop(partial: Path, home: Path) -> None:
    """Remove a merge that is of no use."""
    _forget(partial, home)
    _release(partial)
    shutil.rmtree(partial, ignore_errors=True)


def _forget(partial: Path, home: Path) -> None:
    with contextlib.suppress(OSError, ValueError, LookupError):
        first = (partial / JOURNAL).read_text(encoding="utf-8").splitlines()[0]
        note = home / NOTES / f"{json.loads(first)['key']}.json"
        if read_json(note)["folder"] == str(partial):
            note.unlink()


def allocated(recipe: Mapping[str, Any], disk: Path, home: Path) -> int:
    """Bytes that unfinished merges of this recipe hold on the disk of a folder: what is left to write
    needs that much less room."""
    total = 0
    for note in (home / NOTES).glob("*.json"):
        with contextlib.suppress(OSError, ValueError, LookupError):
            content = read_json(note)
            there = Path(content["folder"])
            if not there.exists():
                note.unlink()  # somebody has removed it
            elif content["recipe"] == digest(recipe) and there.stat().st_dev == disk.stat().st_dev:
                total += shards.allocated(there)
    return total


def _claim(note: Path, partial: Path) -> None:
    """Move what an interrupted merge left to where it is needed, unless it is in use or on another
    disk."""
    with contextlib.suppress(OSError, ValueError, LookupError):
        there = Path(read_json(note)["folder"])
        if (there / JOURNAL).exists() and _lock(there):
            lock = _held.pop(there)
            try:
                partial.parent.mkdir(parents=True, exist_ok=True)
                there.rename(partial)
            except OSError:
                lock.release()
                return
            _held[partial] = lock


def _lock(partial: Path) -> bool:
    from filelock import FileLock, Timeout

    lock = FileLock(partial / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    _held[partial] = lock
    return True


def _release(partial: Path) -> None:
    if partial in _held:
        _held.pop(partial).release()
