"""Merges that were interrupted, and how the same command resumes them.

An unfinished merge is found by its key in the registry `merges`. The run that resumes it moves its folder,
and holds the lock in it. A merge that another process is working on is never touched.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.core import jsonl_log
from mergelab.core.errors import Interrupted, StepError
from mergelab.core.hashing import digest
from mergelab.core.resume_registry import ResumeRegistry
from mergelab.merging import shards
from mergelab.merging.shards import JOURNAL, LOCK

if TYPE_CHECKING:
    from filelock import BaseFileLock

KIND = "merges"
"""In the registry of unfinished work."""

_held: dict[Path, BaseFileLock] = {}
"""The locks of this process, by folder; kept until the model has its final name."""


class MergeInterrupted(StepError):
    """The merge cannot continue now, and can be resumed later: a full disk, a file system that failed."""


@contextlib.contextmanager
def resumable_folder(partial: Path, key: str, recipe: Mapping[str, Any], home: Path) -> Iterator[None]:
    """Work on the merge of a key in the folder `partial`, which then holds what an interrupted merge of this
    key has finished. After an interruption the folder is kept if anything in it is finished.

    Args:
        partial: where the model is written before it has its name.
        key: of the merge.
        recipe: mergekit's YAML.
        home: mergelab's cache.
    Raises:
        StepError: when another run is working in it.
    """
    registry = ResumeRegistry(KIND, home)
    _release(partial)  # of an earlier run in this process
    if not partial.exists():
        _take_over(registry.folder(key), partial)
    partial.mkdir(parents=True, exist_ok=True)
    if partial not in _held and not _lock(partial):
        raise StepError(f"another run is writing to {partial}\nChoose another folder: output=DIR")
    registry.record(key, partial, recipe=digest(recipe))
    with kept_if_interrupted(partial, home):
        yield


@contextlib.contextmanager
def kept_if_interrupted(partial: Path, home: Path, *, whole: bool = False) -> Iterator[None]:
    """When an exception ends the body: keep what is merged if it can be resumed and anything is finished;
    otherwise remove it.

    Args:
        whole: the merge itself is finished, so that no failure is a reason to remove it.
    Raises:
        Interrupted: for a KeyboardInterrupt, with a message that says what is kept.
    """
    try:
        yield
    except BaseException as e:
        # Ctrl-C and a cluster's signal are not Exceptions.
        resumable = isinstance(e, MergeInterrupted) or not isinstance(e, Exception)
        if whole and isinstance(e, Exception):
            _release(partial)
            raise
        if not resumable or not started(partial):
            discard(partial, home)
            raise
        _release(partial)
        if isinstance(e, KeyboardInterrupt):
            kept = f"interrupted; what is merged is kept in {partial}"
            raise Interrupted(f"{kept}\nThe same command resumes from there.") from e
        raise


def started(partial: Path) -> bool:
    """Whether any tensor of a merge is finished."""
    return len(_journal(partial)) > 1


def complete(partial: Path, home: Path) -> None:
    """The merge in `partial` has become a model: leave nothing in its folder but the model."""
    _forget(partial, home)
    _release(partial)
    for name in (JOURNAL, LOCK):
        (partial / name).unlink(missing_ok=True)


def discard(partial: Path, home: Path) -> None:
    """Remove a merge that cannot be resumed."""
    _forget(partial, home)
    _release(partial)
    shutil.rmtree(partial, ignore_errors=True)


def _journal(partial: Path) -> list[dict[str, Any]]:
    with contextlib.suppress(OSError):
        return jsonl_log.read(partial / JOURNAL)
    return []


def _forget(partial: Path, home: Path) -> None:
    with contextlib.suppress(OSError):
        for key in [str(line["key"]) for line in _journal(partial)[:1] if "key" in line]:
            ResumeRegistry(KIND, home).forget(key, partial)


def allocated(recipe: Mapping[str, Any], disk: Path, home: Path) -> int:
    """Bytes that unfinished merges of this recipe hold on the disk of a folder. So much less room is needed
    for what is left to write."""
    try:
        wanted = digest(recipe)
    except ValueError:  # it holds nan or infinity, which preflight reports: nothing was begun with it
        return 0
    total = 0
    for there, content in ResumeRegistry(KIND, home).entries():
        with contextlib.suppress(OSError):
            if content.get("recipe") == wanted and there.stat().st_dev == disk.stat().st_dev:
                total += shards.allocated(there)
    return total


def _take_over(earlier: Path | None, partial: Path) -> None:
    """Move what an interrupted merge left to where it is needed, unless it is in use or on another disk."""
    with contextlib.suppress(OSError):
        if earlier is not None and (earlier / JOURNAL).exists() and _lock(earlier):
            lock = _held.pop(earlier)
            try:
                partial.parent.mkdir(parents=True, exist_ok=True)
                earlier.rename(partial)
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
