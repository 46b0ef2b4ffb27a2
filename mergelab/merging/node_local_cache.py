"""A cache on the node's own disk: experts are read from a copy there, a merge is written there first.

    <scratch>/mergelab-<uid>-models/<key>/    a copy of a model, shared by all tasks that use it now
    <scratch>/mergelab-<uid>-task-<job>/      what one task writes

Each has a lock file beside it that its users hold. The kernel releases the locks of a killed process. What no
process holds is therefore removed by the next one, or by the task's own batch script:

    python -m mergelab.merging.node_local_cache <scratch>
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergelab.core.errors import InputError, StepError
from mergelab.core.hashing import digest, folder_stamp


def own_name(what: str) -> str:
    """A name of this user: others have their own in the same folder."""
    return f"mergelab-{os.getuid()}-{what}"


LOCK = ".lock"

_open: dict[str, Path] = {}
"""`root` and `task`, while a scratch folder is in use by this process."""
_held: dict[Path, int] = {}
"""The models that this process uses, and the descriptors of their locks."""


@contextmanager
def for_task(path: str | None, task: str) -> Iterator[None]:
    """Use a scratch folder until the body ends; without one, everything stays where it is.

    Args:
        path: the folder, with $VARIABLES of the node.
        task: a name that no other task has.
    Raises:
        InputError: where it is not a folder, or may not be written to.
    """
    if not path:
        yield
        return
    root = Path(os.path.expandvars(path)).expanduser()
    if not root.is_dir() or not os.access(root, os.W_OK | os.X_OK):
        raise InputError(
            f"hardware.scratch: {root} is not a folder on {os.uname().nodename} that can be written to"
        )
    clean(root)
    mine = root / own_name(f"task-{task}")
    lock = _lock(mine, fcntl.LOCK_EX)
    assert lock is not None
    mine.mkdir(exist_ok=True)
    _open.update(root=root, task=mine)
    try:
        yield
    finally:
        _open.clear()
        os.close(lock)
        for descriptor in _held.values():
            os.close(descriptor)
        _held.clear()
        clean(root)


def folder() -> Path | None:
    """Where this task writes first; None without a scratch folder."""
    return _open.get("task")


def copy_of(model: Path) -> Path:
    """A model on the node's own disk; itself without a scratch folder.

    Raises:
        StepError: where it does not fit.
    """
    root = _open.get("root")
    if root is None:
        return model
    files = sorted(f for f in model.iterdir() if f.is_file())
    copy = root / own_name("models") / digest([str(model.resolve()), folder_stamp(model)])[:24]
    copy.parent.mkdir(exist_ok=True)
    while copy not in _held:
        lock = _lock(copy, fcntl.LOCK_SH)  # waits while another process makes it
        assert lock is not None
        try:
            if not copy.exists():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _copy(files, copy)
                fcntl.flock(lock, fcntl.LOCK_SH)  # unlocked for a moment, so it may be removed
            if copy.exists():
                _held[copy] = lock
        except BlockingIOError:  # others wait as well; one of them will make it
            time.sleep(random.uniform(0.05, 0.2))
        finally:
            if copy not in _held:
                os.close(lock)
    return copy


def _copy(files: list[Path], to: Path) -> None:
    """Copy files, with their times, into a folder that is there whole or not at all."""
    size, free = sum(f.stat().st_size for f in files), shutil.disk_usage(to.parent).free
    if size > free:
        from mergelab.core.sizes import format_size

        raise StepError(
            f"hardware.scratch: a copy needs {format_size(size)}, but only {format_size(free)} are free "
            f"in {to.parent}"
        )
    part = to.with_name(f"{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        for file in files:
            shutil.copy2(file, part / file.name)
        part.rename(to)
    except OSError as e:
        shutil.rmtree(part, ignore_errors=True)
        raise StepError(f"hardware.scratch: {e.strerror}: {e.filename or to}") from e


def clean(root: Path) -> None:
    """Remove what no living process uses."""
    for lock in [*root.glob(own_name(f"task-*{LOCK}")), *(root / own_name("models")).glob(f"*{LOCK}")]:
        target = lock.with_name(lock.name.removesuffix(LOCK))
        if (held := _lock(target, fcntl.LOCK_EX | fcntl.LOCK_NB)) is None:
            continue
        for leftover in (target, target.with_name(f"{target.name}.part")):
            shutil.rmtree(leftover, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(held)


def _lock(target: Path, how: int) -> int | None:
    """A descriptor that holds the lock of a folder; None where others do and `how` does not wait.

    The file may be removed between opening and locking it: then there is another by now.
    """
    path = target.with_name(target.name + LOCK)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, how)
        except BlockingIOError:
            os.close(descriptor)
            return None
        try:
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)


if __name__ == "__main__":
    clean(Path(os.path.expandvars(sys.argv[1])).expanduser())
