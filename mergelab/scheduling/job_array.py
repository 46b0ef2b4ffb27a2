"""Batches of work on a cluster: submitted once, watched and collected, also after this process was killed.

The state is on the disk: the submission log, and a small file for each result. The process that submits may
therefore die at any moment. The next one adopts the tasks that run, collects the results that are there and
submits the rest. Results are noticed by their files. Lost tasks are noticed by asking the scheduler's queue
every few seconds, or its accounting once the queue has forgotten the task.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergelab.core.errors import MergelabError
from mergelab.core.run_dir import read_memo, write_json
from mergelab.scheduling.batch_dir import (
    Key,
    last_lines,
    result_file,
    started_mark,
    status_of,
    with_exit,
    work_file,
)
from mergelab.scheduling.scheduler import (
    INFRASTRUCTURE_FAILURES,
    JobRequest,
    Scheduler,
    SchedulerLimitReached,
    SchedulerRejected,
    SchedulerUnavailable,
    Task,
)
from mergelab.scheduling.submission_log import SubmissionLog

POLL_RESULTS_S = 0.1
"""Seconds between two looks for results."""
POLL_QUEUE_S = 4.0
"""Seconds between two queries of the scheduler's queue."""
RESULT_GRACE_S = 4.0
"""Seconds that a result may appear after its task was reported as ended: shared disks are slow."""
RETRY_S = 10.0
"""Seconds until a submission that was refused for now is tried again."""
QUEUE_MEMORY_S = 60.0
"""Seconds for which the queue surely remembers a job; Slurm's MinJobAge is 300 by default."""
OUT_OF_MEMORY = re.compile(r"exceeded (job )?memory|oom.?kill|out of memory|MemoryError", re.IGNORECASE)
MAX_RESUBMISSIONS = 5
"""Maximum submissions of one work item. After that a lost task counts as a failure of the item."""

TaskKey = tuple[str, int]
"""A batch's name and the index of a task in it."""


@dataclass(frozen=True)
class WorkItem:
    """A piece of work."""

    name: str
    """Unique in the sweep, and the same when the sweep is resumed."""
    work: Callable[[], Any]
    """Called on the node; it and everything it holds are pickled. Returns a value that JSON can write."""
    folder: Path
    """Where its log and events go."""
    attempt: int = 1
    """Raised by a retry after a failure of its own. A resubmission has the same attempt."""

    @property
    def key(self) -> Key:
        """By which its result is found."""
        return self.name, self.attempt


@dataclass(frozen=True)
class WorkResult:
    """The result of a work item."""

    value: Any = None
    reason: str | None = None
    """Why there is no value."""
    lost: bool = False
    """Whether its task ended before the work did, so that the reason is not the work's own."""


class JobArrayExecutor:
    """Submits work and waits for it.

    Args:
        sweep: the folder in which everything is recorded.
        name: of the jobs of a new sweep.
        scheduler: where they are submitted.
        ranks: processes of a task, which share its items.
        per_task: items of a task.
        scratch: a folder on the nodes' own disks.
        report: called with what the user should know: a lost task, a batch that was submitted.
    """

    def __init__(
        self,
        sweep: Path,
        name: str,
        scheduler: Scheduler,
        *,
        ranks: int = 1,
        per_task: int = 1,
        scratch: str | None = None,
        report: Callable[[str], None] = lambda text: None,
    ):
        self.scheduler = scheduler
        self.log = SubmissionLog(scheduler.jobs_dir(sweep.resolve()), name, scheduler.options)
        self._ranks, self._per_task, self._scratch = ranks, per_task, scratch
        self.report = report
        self.show_status: Callable[[str], None] = lambda text: None
        """Called with the state of all tasks, on one line, when that changes."""
        self._shown = ""
        self._seen: dict[TaskKey, Task] = {}
        self._over_since: dict[TaskKey, float] = {}
        self._largest: int | None = None
        self._next_try = 0.0
        self._trouble = ""
        self._submit_trouble = False
        """Whether the trouble is a submission's: it does not end when the queue answers."""
        self._wait = RETRY_S
        self._intended: dict[str, float] = {}
        """When this process has recorded the intent to submit a batch."""

    # ---------------------------------------------------------------- the work

    def run(self, items: Sequence[WorkItem], array: bool = True) -> Iterator[tuple[int, WorkResult]]:
        """The result of each item as it arrives, with the item's position.

        Args:
            items: the work.
            array: whether they are the tasks of one job array; else a job each.
        Raises:
            SchedulerRejected: when the scheduler will never accept them.
        """
        waiting = dict(enumerate(items))
        last = -POLL_QUEUE_S
        while True:
            for position, item in list(waiting.items()):
                if (result := self._collected(item)) is not None:
                    del waiting[position]
                    yield position, result
            if not waiting:
                self.show_status("")
                return
            if time.monotonic() - last >= POLL_QUEUE_S and self._has_submitted(waiting.values()):
                self._poll_queue(waiting.values())
                last = time.monotonic()
                continue
            self._submit([i for i in waiting.values() if i.key not in self.log.assignments], array)
            self._show_status(waiting.values())
            time.sleep(POLL_RESULTS_S)

    def submit(self, items: Sequence[WorkItem], array: bool = True) -> bool:
        """Submit the items that are not submitted yet, without waiting for them; returns whether the
        scheduler now has all of them."""
        if self._has_submitted(items):
            self._poll_queue(items)
        self._submit([i for i in items if i.key not in self.log.assignments], array)
        return all(i.key in self.log.assignments for i in items)

    def failed(self) -> dict[str, set[int]]:
        """The attempts that have failed, by item: the task was lost, or the work reports a failure."""
        out: dict[str, set[int]] = {}
        for (name, attempt), assigned in self.log.assignments.items():
            found = read_memo(result_file(self.log.batch_dir(assigned.batch), (name, attempt)))
            if found.get("reason") or (found.get("value") or {}).get("reason"):
                out.setdefault(name, set()).add(attempt)
        return out

    def cancel(self) -> list[str]:
        """Cancel every job that is not done; returns their ids.

        Raises:
            SchedulerUnavailable: when the scheduler does not answer; its jobs then keep running.
        """
        if self.log.unconfirmed():  # the scheduler may have a job of which it gave us no id
            self._recover(self.scheduler.queue(self.log.name))
        live = {b: self.log.jobs[b] for b, _ in self.log.live()}
        jobs = {b: job for b, job in live.items() if self._unfinished(b)}
        self.scheduler.cancel(jobs.values())
        for batch in jobs:
            self.log.record_cancelled(batch)
        return list(jobs.values())

    def _unfinished(self, batch: str) -> bool:
        folder = self.log.batch_dir(batch)
        assigned = [k for items in self.log.tasks[batch] for k in items if self.log.is_assigned(k, batch)]
        return any(not result_file(folder, k).exists() for k in assigned)

    def _collected(self, item: WorkItem) -> WorkResult | None:
        assigned = self.log.assignments.get(item.key)
        if assigned is None:
            return None
        found = read_memo(result_file(self.log.batch_dir(assigned.batch), item.key))
        return WorkResult(found.get("value"), found.get("reason"), bool(found.get("lost"))) if found else None

    # ---------------------------------------------------------------- submitting

    def _submit(self, items: Sequence[WorkItem], array: bool) -> None:
        if not items or time.monotonic() < self._next_try or self.log.unconfirmed():
            return
        groups = [items[i : i + self._per_task] for i in range(0, len(items), self._per_task)]
        try:
            if not array:
                while groups:
                    self._submit_batch([groups.pop(0)], array=False)
            if self._largest is None and groups:
                self._largest = self.scheduler.array_limit()
            while groups:
                size = min(len(groups), self._largest or 1)
                try:
                    self._submit_batch(groups[:size], array=True)
                except SchedulerLimitReached:
                    if size == 1:
                        raise
                    self._largest = size // 2
                    continue
                groups = groups[size:]
            self._set_trouble("")
            self._wait = RETRY_S
        except (SchedulerUnavailable, SchedulerLimitReached) as e:
            self._set_trouble(f"{e}; it is tried again", submitting=True)
            self._largest = None
            self._next_try = time.monotonic() + self._wait
            self._wait = min(self._wait * 1.5, 6 * RETRY_S)

    def _submit_batch(self, groups: Sequence[Sequence[WorkItem]], array: bool) -> None:
        import cloudpickle

        folders = {i.name: i.folder.name for g in groups for i in g}
        batch = self.log.record_intent([[i.key for i in g] for g in groups], array, folders)
        self._intended[batch] = time.monotonic()
        folder = self.log.batch_dir(batch)
        for name in ("results", "begun"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for i, group in enumerate(groups):
            work_file(folder, i).write_bytes(cloudpickle.dumps(list(group)))
        command = [sys.executable, "-u", "-m", self.scheduler.worker, str(folder)]
        request = JobRequest(
            folder,
            self.log.name,
            [*command, *([self._scratch] if self._scratch else [])],
            tasks=len(groups) if array else None,
            ranks=min(self._ranks, max(len(g) for g in groups)),
            scratch=self._scratch,
        )
        try:
            job = self.scheduler.submit(request)
        except (SchedulerLimitReached, SchedulerRejected) as e:
            self.log.record_rejected(batch, str(e))
            raise
        self.log.record_submitted(batch, job)
        what = f"array {job}, {len(groups)} tasks"
        if not array:
            what = f"job {job}: " + ", ".join(i.name.partition("-")[0] for g in groups for i in g)
        self.report(f"submitted {what}")

    # ---------------------------------------------------------------- watching

    def _has_submitted(self, items: Iterable[WorkItem]) -> bool:
        """Whether there is anything to ask the scheduler about: not before the first submission."""
        return bool(self.log.unconfirmed()) or any(i.key in self.log.assignments for i in items)

    def _poll_queue(self, items: Iterable[WorkItem]) -> None:
        """Ask the scheduler for the tasks of these items, and record those that have ended."""
        try:
            queue = self.scheduler.queue(self.log.name)
            self._recover(queue)
            assigned = [self.log.assignments[i.key] for i in items if i.key in self.log.assignments]
            keys = {(a.batch, a.task) for a in assigned}
            self._seen = self._known_tasks(keys, queue)
        except SchedulerUnavailable as e:
            self._set_trouble(f"{self.scheduler.title} does not answer ({e}); running tasks are not affected")
            return
        if not self._submit_trouble:
            self._set_trouble("")
        self._cancel_quietly({t.job for t in queue if t.comment in self.log.revoked and not t.over})
        now = time.monotonic()
        for key in keys:
            task = self._seen.get(key)
            if task is not None and task.stuck:
                self._cancel_quietly({task.number})
                self._task_ended(*key, replace(task, state="BOOT_FAIL"))
            elif task is not None and not task.over:
                self._over_since.pop(key, None)
            elif now - self._over_since.setdefault(key, now) >= RESULT_GRACE_S:
                self._task_ended(*key, task)

    def _set_trouble(self, text: str, submitting: bool = False) -> None:
        """Report a new trouble, once; an empty text ends it."""
        if text and text != self._trouble:
            self.report(text)
        self._trouble, self._submit_trouble = text, submitting

    def _cancel_quietly(self, numbers: set[str]) -> None:
        """Cancel what nobody waits for. If the scheduler does not answer now, the next poll does it."""
        with suppress(MergelabError):
            self.scheduler.cancel(sorted(numbers))

    def _known_tasks(self, keys: set[TaskKey], queue: Sequence[Task]) -> dict[TaskKey, Task]:
        """The scheduler's record of each task. Keys about which nothing can be said now are removed.

        Only the queue says which tasks live: the accounting may never have heard the end of one whose
        controller crashed. After a crash an id may also be given twice, so that the comment must match.
        """
        known = {(t.comment, t.job, t.index): t for t in queue}
        identities = {key: (key[0], self.log.jobs[key[0]], key[1]) for key in keys}
        missing = {identity[1] for identity in identities.values() if identity not in known}
        try:
            forgotten = self.scheduler.history(sorted(missing))
        except SchedulerUnavailable:
            keys -= {key for key, identity in identities.items() if identity not in known}
            forgotten = []
        for t in forgotten:
            if t.over:
                known.setdefault((t.comment, t.job, t.index), t)
        return {key: known[identity] for key, identity in identities.items() if identity in known}

    def _recover(self, queue: Sequence[Task]) -> None:
        """Find out what became of a batch whose submitter was killed, or got no answer."""
        for batch in self.log.unconfirmed():
            job = next((t.job for t in queue if t.comment == batch), None)
            # The queue remembers for minutes what has ended; for older jobs there is the accounting.
            if (
                job is None
                and time.monotonic() - self._intended.get(batch, -QUEUE_MEMORY_S) >= QUEUE_MEMORY_S
            ):
                history = self.scheduler.history_by_name(self.log.name)
                job = next((t.job for t in history if t.comment == batch), None)
            if job is not None:
                self.log.record_submitted(batch, job)
            else:
                self.log.record_rejected(batch, f"{self.scheduler.title} does not know it")

    def _task_ended(self, batch: str, index: int, task: Task | None) -> None:
        """Record the end of a task: each item without a result is lost or submitted again."""
        folder = self.log.batch_dir(batch)
        items = self.log.tasks[batch][index]
        left = [k for k in items if self.log.is_assigned(k, batch) and not result_file(folder, k).exists()]
        state = task.state if task else "UNKNOWN"
        if not left:
            self.log.record_ended(batch, index, state, "", [])
            return
        title = self.scheduler.title
        number = task.number if task else f"{self.log.jobs[batch]}_{index}"
        node = f"{task.node}, " if task and task.node not in ("", "None assigned") else ""
        end = with_exit(task, folder).describe() if task else f"{title} no longer knows it"
        tail = last_lines(folder, self.log.jobs[batch], index)
        out_of_memory = bool(OUT_OF_MEMORY.search(tail))
        if out_of_memory:  # not every cluster has a state for it
            end = "out of memory"
        reason = f"{end} ({node}{title} task {number})"
        # A script that did not reach its end, and not for its memory, was killed together with its node.
        cut_off = task is not None and task.state == "FAILED" and not status_of(folder, index)
        infrastructure = (
            task is None or task.state in INFRASTRUCTURE_FAILURES or (cut_off and not out_of_memory)
        )
        started = [k for k in left if started_mark(folder, k).exists()]
        any_started = any(started_mark(folder, k).exists() for k in items)
        failed = [] if infrastructure else started if any_started else left
        lost = [k for k in left if k in failed or self.log.submissions.get(k, 1) >= MAX_RESUBMISSIONS]
        for key in lost:
            text = reason + (f"; its last output: {tail}" if tail else "")
            write_json(result_file(folder, key), {"reason": text, "lost": True})
        free = [k for k in left if k not in lost]
        self.log.record_ended(batch, index, state, reason, free)
        self._over_since.pop((batch, index), None)
        names = ", ".join(k[0] for k in (lost or free))
        again = "" if lost else "; submitted again"
        self.report(f"{names}: {reason}{again}" + (f"\n{tail}" if tail else ""))

    def _show_status(self, items: Iterable[WorkItem]) -> None:
        counts: dict[str, int] = {}
        reasons: dict[str, int] = {}
        jobs: dict[str, None] = {}
        assigned = [a for i in items if (a := self.log.assignments.get(i.key))]
        for batch, index in dict.fromkeys((a.batch, a.task) for a in assigned):
            task = self._seen.get((batch, index))
            state = task.state.lower() if task else "submitted"
            jobs[self.log.jobs[batch]] = None
            counts[state] = counts.get(state, 0) + 1
            if task is not None and task.state == "PENDING" and task.reason not in ("", "None"):
                reasons[task.reason] = reasons.get(task.reason, 0) + 1
        parts = [f"{n} {s}" + (f" ({', '.join(reasons)})" if s == "pending" and reasons else "")
                 for s, n in counts.items()]  # fmt: skip
        text = f"{self.scheduler.title} {', '.join(jobs)}: {', '.join(parts)}" if parts else ""
        text = "; ".join(t for t in (text, self._trouble) if t)
        if text != self._shown:
            self._shown = text
            self.show_status(text)
