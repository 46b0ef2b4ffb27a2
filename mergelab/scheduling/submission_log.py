"""The submission log: `jobs.jsonl`, which says what has been submitted and which task works on what.

An intention is on the disk before the scheduler is called, and the job's id after it. If the process is
killed between the two, the next one finds the job by its name and comment, so that nothing is submitted
twice.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.core import hashing, jsonl_log
from mergelab.core.jsonl_log import JsonlLog
from mergelab.scheduling.batch_dir import Key, result_file, revoked_mark

NAME = "jobs.jsonl"


@dataclass(frozen=True)
class Assignment:
    """The task of a batch that works on an item."""

    batch: str
    task: int


class SubmissionLog:
    """The batches of a sweep. One process writes it.

    Args:
        folder: of the sweep's jobs.
        name: of its jobs, if the log does not exist yet.
        options: of the scheduler, which are recorded with a new log.
    """

    def __init__(self, folder: Path, name: str, options: Mapping[str, Any] | None = None):
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = JsonlLog(self.folder / NAME)
        if not self._file.lines:
            more = {"options": dict(options)} if options else {}
            self._file.append("begin", schema=1, name=name, token=secrets.token_hex(2), **more)
        self.name: str = self._file.lines[0]["name"]
        self._token: str = self._file.lines[0]["token"]
        """Of this log: the scheduler may remember another one that was in the same folder before."""
        self.assignments: dict[Key, Assignment] = {}
        self.tasks: dict[str, list[list[Key]]] = {}
        """The work items of each task of a batch."""
        self.jobs: dict[str, str] = {}
        """The job of a batch, where it is known."""
        self.revoked: set[str] = set()
        """Batches that were never submitted, or were cancelled."""
        self.ended: set[tuple[str, int]] = set()
        """Tasks that are known to have ended."""
        self.submissions: dict[Key, int] = {}
        """How often a work item has been submitted."""
        for line in self._file.lines:
            self._apply(line)

    def _apply(self, line: Mapping[str, Any]) -> None:
        event, batch = line["event"], str(line.get("batch"))
        if event == "submitting":
            self.tasks[batch] = [[(str(n), int(a)) for n, a in items] for items in line["tasks"]]
        elif event == "submitted":
            self.jobs[batch] = str(line["job"])
            for i, items in enumerate(self.tasks[batch]):
                for key in items:
                    self.assignments[key] = Assignment(batch, i)
                    self.submissions[key] = self.submissions.get(key, 0) + 1
        elif event in ("void", "cancelled"):
            self.revoked.add(batch)
            done = {(str(n), int(a)) for n, a in line.get("done", [])}
            assigned = [key for items in self.tasks[batch] for key in items if self.is_assigned(key, batch)]
            self._release(key for key in assigned if key not in done)
        elif event == "ended":
            self.ended.add((batch, int(line["task"])))
            self._release((str(n), int(a)) for n, a in line.get("free", []))

    def _release(self, keys: Iterable[Key]) -> None:
        for key in list(keys):
            self.assignments.pop(key, None)

    def _append(self, event: str, **data: Any) -> None:
        self._apply(self._file.append(event, **data))

    # ---------------------------------------------------------------- recording

    def record_intent(self, tasks: Sequence[Sequence[Key]], array: bool, folders: Mapping[str, str]) -> str:
        """A new batch is about to be submitted; returns its name.

        Args:
            tasks: the work items of each task.
            array: whether it is a job array.
            folders: by item, the folder in the sweep's where it leaves its log.
        """
        batch = f"b{len(self.tasks) + 1:04d}-{self._token}"
        self._append("submitting", batch=batch, array=array, folders=dict(folders),
                     tasks=[[list(k) for k in t] for t in tasks])  # fmt: skip
        return batch

    def record_submitted(self, batch: str, job: str) -> None:
        """A batch has become a job."""
        self._append("submitted", batch=batch, job=job)

    def record_rejected(self, batch: str, why: str) -> None:
        """A batch has not become a job. Should the scheduler have it after all, its tasks see the mark and
        end at once."""
        self._revoke(batch)
        self._append("void", batch=batch, reason=why)

    def record_cancelled(self, batch: str) -> None:
        """A batch was cancelled; what it had not done is assigned to no task."""
        self._revoke(batch)
        folder = self.batch_dir(batch)
        done = [list(k) for items in self.tasks[batch] for k in items if result_file(folder, k).exists()]
        self._append("cancelled", batch=batch, done=done)

    def _revoke(self, batch: str) -> None:
        folder = self.batch_dir(batch)
        folder.mkdir(exist_ok=True)
        revoked_mark(folder).touch()
        for work in folder.glob("task*.pkl"):
            work.unlink()

    def record_ended(self, batch: str, task: int, state: str, reason: str, free: Sequence[Key]) -> None:
        """A task has ended without having done everything; `free` is to be submitted again."""
        self._append(
            "ended", batch=batch, task=task, state=state, reason=reason, free=[list(k) for k in free]
        )

    def record_controller(self, job: str, known: int) -> None:
        """A job begins to control the sweep, whose journal has `known` lines."""
        self._append("controller", job=job, known=known, time=round(time.time(), 1))

    # ---------------------------------------------------------------- reading

    def batch_dir(self, batch: str) -> Path:
        """A batch's folder."""
        return self.folder / batch

    def is_assigned(self, key: Key, batch: str) -> bool:
        """Whether a work item is assigned to a task of this batch."""
        return key in self.assignments and self.assignments[key].batch == batch

    def unconfirmed(self) -> list[str]:
        """Batches that may or may not have become jobs."""
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
        """The jobs that have controlled the sweep, in order: `job`, `known`, `time` of their start."""
        return self._file.select("controller")


def job_name(sweep: Path) -> str:
    """The name of a sweep's jobs: with Slurm, `scancel --name=...` ends all of them."""
    return f"mergelab-{hashing.digest(str(sweep.resolve()))[:10]}"


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of a submission log that another process may be writing."""
    return jsonl_log.read(folder / NAME)
