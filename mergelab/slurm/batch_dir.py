"""A batch's folder: the script that is submitted from it, and what its tasks leave in it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.slurm import sbatch_script
from mergelab.slurm.client import Task

if TYPE_CHECKING:
    from mergelab.schema import Slurm


def write_script(
    place: Path, settings: Slurm, name: str, command: Sequence[str], *,
    tasks: int | None = None, ranks: int = 1, scratch: str | None = None, requeue: bool = True,
    more: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write a batch's script into its folder; returns its path."""
    asked = sbatch_script.options(
        settings, name=name, folder=place, cwd=Path.cwd(), ranks=ranks, tasks=tasks, requeue=requeue
    )
    after = ""
    if scratch:  # the task cleans up by itself unless it is killed
        clean = shlex.join([sys.executable, "-m", "mergelab.merging.node_local_cache", scratch])
        after = f"[ $status -eq 0 ] || {clean}"
    text = sbatch_script.text(asked | (more or {}), command, setup=settings.setup, ranks=ranks,
                       cpus=settings.cpus, status=place / "status", after=after)  # fmt: skip
    path = place / "job.sh"
    path.write_text(text, encoding="utf-8")
    return path


def with_exit(task: Task, place: Path) -> Task:
    """The task with the exit status that its script has left, where Slurm calls it failed."""
    status = status_of(place, task.index)
    return replace(task, exit=f"{status}:0") if task.state == "FAILED" and status else task


def status_of(place: Path, index: int) -> str:
    """The exit status that a task's script has left; empty where it did not come to that."""
    try:
        text = (place / f"status.{index}").read_text().strip()
    except OSError:
        return ""
    return text if text.isdigit() else ""


def last_lines(place: Path, job: str, index: int, most: int = 3) -> str:
    """What a task said last on its error output, else on its output, on one line."""
    for end in (".err", ".out"):
        for file in (place / f"{job}_{index}{end}", place / f"{job}{end}"):
            if words := last_words(file, most):
                return words[-400:]
    return ""


def last_words(file: Path, most: int = 3) -> str:
    """The last lines of a file that are not blank, on one; empty where there are none."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            f.seek(max(0, size - 4000))
            said = f.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return " | ".join([x.strip() for x in said if x.strip()][-most:])


def log_of(place: Path, job: str, index: int) -> Path:
    """A task's output."""
    array = place / f"{job}_{index}.out"
    return array if array.exists() else place / f"{job}.out"
