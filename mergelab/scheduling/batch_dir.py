"""A batch's folder: the names of what is in it, and what its tasks have left there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mergelab.scheduling.scheduler import Task

Key = tuple[str, int]
"""A work item's name and the number of the attempt."""


def result_file(folder: Path, key: Key) -> Path:
    """Where the result of a work item lies."""
    return folder / "results" / f"{key[0]}.{key[1]}.json"


def started_mark(folder: Path, key: Key) -> Path:
    """The mark that a work item was started."""
    return folder / "begun" / f"{key[0]}.{key[1]}"


def work_file(folder: Path, index: int) -> Path:
    """The pickled work items of a task."""
    return folder / f"task{index}.pkl"


def revoked_mark(folder: Path) -> Path:
    """The mark that nobody waits for the batch any more: its tasks end at once."""
    return folder / "void"


def with_exit(task: Task, folder: Path) -> Task:
    """The task with the exit status that its script has left, where the scheduler calls it failed."""
    status = status_of(folder, task.index)
    return replace(task, exit=f"{status}:0") if task.state == "FAILED" and status else task


def status_of(folder: Path, index: int) -> str:
    """The exit status that a task's script has left; empty where the script did not reach its end."""
    try:
        text = (folder / f"status.{index}").read_text().strip()
    except OSError:
        return ""
    return text if text.isdigit() else ""


def last_lines(folder: Path, job: str, index: int, most: int = 3) -> str:
    """The last lines of a task's error output, else of its output, on one line."""
    for end in (".err", ".out"):
        for file in (folder / f"{job}_{index}{end}", folder / f"{job}{end}"):
            if text := last_lines_of(file, most):
                return text[-400:]
    return ""


def last_lines_of(file: Path, most: int = 3) -> str:
    """The last lines of a file that are not blank, on one line; empty where there are none."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            f.seek(max(0, size - 4000))
            lines = f.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return " | ".join([x.strip() for x in lines if x.strip()][-most:])


def log_of(folder: Path, job: str, index: int) -> Path:
    """A task's output."""
    array = folder / f"{job}_{index}.out"
    return array if array.exists() else folder / f"{job}.out"
