"""What has been submitted: `slurm/jobs.jsonl` in a sweep's folder, and the names of what lies beside it.

An intention is on the disk before sbatch is called, and the job's number after it. Whoever comes after a
kill between the two finds the job by its name and comment, so that nothing is submitted twice.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.core import hashing, jsonl_log
from mergelab.core.jsonl_log import JsonlLog

FOLDER = "slurm"
NAME = "jobs.jsonl"

Key = tuple[str, int]
"""An item's name and the number of the attempt."""


@dataclass(frozen=True)
class Assignment:
    """Who has an item: a task of a batch."""

    batch: str
    task: int


class SubmissionLog:
    """The batches of a sweep. One process writes it.

    Args:
        sweep: the sweep's folder.
        name: of its jobs, if it has none yet.
    """

    def __init__(self, sweep: Path, name: str):
        self.folder = sweep / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = JsonlLog(self.folder / NAME)
        if not self._file.lines:
            self._file.append("begin", schema=1, name=name, token=secrets.token_hex(2))
        self.name: str = self._file.lines[0]["name"]
        self._token: str = self._file.lines[0]["token"]
        """Of this ledger: Slurm may remember one that was in the same folder before."""
        self.assignments: dict[Key, Assignment] = {}
        self.tasks: dict[str, list[list[Key]]] = {}
        """The items of each task of a batch."""
        self.jobs: dict[str, str] = {}
        """The job of a batch, where it is known."""
        self.revoked: set[str] = set()
        """Batches that were never submitted, or were taken back."""
        self.ended: set[tuple[str, int]] = set()
        """Tasks that are known to have ended."""
        self.times: dict[Key, int] = {}
        """How often an item has been submitted."""
        for line in self._file.lines:
            self._take(line)

    def _take(self, line: Mapping[str, Any]) -> None:
        event, batch = line["event"], str(line.get("batch"))
        if event == "submitting":
            self.tasks[batch] = [[(str(n), int(a)) for n, a in items] for items in line["tasks"]]
        elif event == "submitted":
            self.jobs[batch] = str(line["job"])
            for i, items in enumerate(self.tasks[batch]):
                for key in items:
                    self.assignments[key] = Assignment(batch, i)
                    self.times[key] = self.times.get(key, 0) + 1
        elif event in ("void", "cancelled"):
            self.revoked.add(batch)
            done = {(str(n), int(a)) for n, a in line.get("done", [])}
            mine = [key for items in self.tasks[batch] for key in items if self._has(key, batch)]
            self._free(key for key in mine if key not in done)
        elif event == "ended":
            self.ended.add((batch, int(line["task"])))
            self._free((str(n), int(a)) for n, a in line.get("free", []))

    def _has(self, key: Key, batch: str) -> bool:
        return key in self.assignments and self.assignments[key].batch == batch

    def _free(self, keys: Any) -> None:
        for key in list(keys):
            self.assignments.pop(key, None)

    def _write(self, event: str, **data: Any) -> None:
        self._take(self._file.append(event, **data))

    # ---------------------------------------------------------------- what is told

    def record_intent(self, tasks: Sequence[Sequence[Key]], array: bool, folders: Mapping[str, str]) -> str:
        """A new batch is about to be submitted; returns its name.

        Args:
            folders: in the sweep's, by item: where each leaves its log.
        """
        batch = f"b{len(self.tasks) + 1:04d}-{self._token}"
        self._write("submitting", batch=batch, array=array, folders=dict(folders),
                    tasks=[[list(k) for k in t] for t in tasks])  # fmt: skip
        return batch

    def submitted(self, batch: str, job: str) -> None:
        """A batch has become a job."""
        self._write("submitted", batch=batch, job=job)

    def record_rejected(self, batch: str, why: str) -> None:
        """A batch has not become a job, and will not: should Slurm have it after all, its tasks see the
        mark and end at once."""
        self._mark_void(batch)
        self._write("void", batch=batch, reason=why)

    def cancelled(self, batch: str) -> None:
        """We have ended a batch; what it had not done is nobody's."""
        self._mark_void(batch)
        done = [
            list(k) for items in self.tasks[batch] for k in items if result(self.place(batch), k).exists()
        ]
        self._write("cancelled", batch=batch, done=done)

    def _mark_void(self, batch: str) -> None:
        self.place(batch).mkdir(exist_ok=True)
        (self.place(batch) / "void").touch()
        for payload in self.place(batch).glob("task*.pkl"):
            payload.unlink()

    def record_ended(self, batch: str, task: int, state: str, reason: str, free: Sequence[Key]) -> None:
        """A task has ended without having done all; `free` is to be submitted again."""
        self._write("ended", batch=batch, task=task, state=state, reason=reason, free=[list(k) for k in free])

    def controller(self, job: str, known: int) -> None:
        """A job begins to steer the sweep, whose journal has so many lines."""
        self._write("controller", job=job, known=known, time=round(time.time(), 1))

    # ---------------------------------------------------------------- what is asked

    def place(self, batch: str) -> Path:
        """A batch's folder."""
        return self.folder / batch

    def open(self) -> list[str]:
        """Batches of which it is not known whether they became jobs."""
        return [b for b in self.tasks if b not in self.jobs and b not in self.revoked]

    def live(self) -> list[tuple[str, int]]:
        """Tasks that may still be running or waiting, as far as is known."""
        return [
            (batch, i)
            for batch, items in self.tasks.items()
            if batch in self.jobs and batch not in self.revoked
            for i in range(len(items))
            if (batch, i) not in self.ended
        ]

    def controllers(self) -> list[dict[str, Any]]:
        """The jobs that have steered the sweep, in their order: `job`, `known`, `time` of their start."""
        return self._file.select("controller")


def job_name(sweep: Path) -> str:
    """What the Slurm jobs of a sweep are called: `scancel --name=...` ends all of them."""
    return f"mergelab-{hashing.digest(str(sweep.resolve()))[:10]}"


def read(sweep: Path) -> list[dict[str, Any]]:
    """The lines of a sweep's ledger, for whoever only looks."""
    return jsonl_log.read(sweep / FOLDER / NAME)


def result(place: Path, key: Key) -> Path:
    """Where what an item came to lies."""
    return place / "results" / f"{key[0]}.{key[1]}.json"


def begun(place: Path, key: Key) -> Path:
    """The mark that an item was begun."""
    return place / "begun" / f"{key[0]}.{key[1]}"
