"""Batches of work on a Slurm cluster: submitted once, watched, collected, whatever happens meanwhile.

The state is on the disk (`ledger`, and a small file for each result), so that the process that submits
may die at any moment: the next one adopts what runs, collects what has finished and submits the rest.
Results are noticed by their files; that a task was lost, by `squeue` (or, when that has forgotten it, by
the accounting), asked every few seconds whatever the age of the run.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.core.errors import MergelabError
from mergelab.core.run_dir import read_memo, write_json
from mergelab.slurm import client
from mergelab.slurm.batch_dir import last_lines, status_of, with_exit, write_script
from mergelab.slurm.client import SlurmLimitReached, SlurmRejected, SlurmUnavailable, Task
from mergelab.slurm.submission_log import Key, SubmissionLog, begun, result

if TYPE_CHECKING:
    from mergelab.schema import Slurm

POLL_RESULTS_S = 0.1
"""Seconds between two looks for results."""
POLL_QUEUE_S = 4.0
"""Seconds between two questions to Slurm."""
SETTLING = 4.0
"""Seconds that a result may come after Slurm has called its task ended: shared disks are slow."""
RETRY_S = 10.0
"""Seconds until Slurm is asked again to take what it has refused for now."""
RECENT = 60.0
"""Seconds for which squeue surely remembers a job; Slurm's MinJobAge is 300 by default."""
TASK = (sys.executable, "-u", "-m", "mergelab.slurm.worker")
INFRASTRUCTURE_FAILURES = {"PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "REVOKED"}
"""Ends for which the work is not to blame."""
MEMORY = re.compile(r"exceeded (job )?memory|oom.?kill|out of memory|MemoryError", re.IGNORECASE)
MAX_RESUBMISSIONS = 5
"""How often an item is submitted before its losses are its own."""


@dataclass(frozen=True)
class WorkItem:
    """A piece of work."""

    name: str
    """Unique in the sweep, and the same when the sweep goes on."""
    work: Callable[[], Any]
    """What is called on the node; it and what it holds are pickled. Returns what JSON can say."""
    folder: Path
    """Where its log and events go."""
    attempt: int = 1

    @property
    def key(self) -> Key:
        """By which it is found again."""
        return self.name, self.attempt


@dataclass(frozen=True)
class WorkResult:
    """What an item came to."""

    value: Any = None
    reason: str | None = None
    """Why there is no value."""
    lost: bool = False
    """Whether its task ended under it, and not it by itself."""


class JobArrayExecutor:
    """Submits work and waits for it.

    Args:
        sweep: the folder in which everything is written down.
        name: of the jobs, for a sweep that has none yet.
        settings: what a task asks for.
        ranks: processes of a task, which share out its items.
        per_task: items of a task.
        scratch: the nodes' own disk.
        tell: hears of what the user should know: a lost task, a batch that was submitted.
    """

    def __init__(
        self,
        sweep: Path,
        name: str,
        settings: Slurm,
        *,
        ranks: int = 1,
        per_task: int = 1,
        scratch: str | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ):
        self.ledger = SubmissionLog(sweep.resolve(), name)
        self._settings, self._ranks, self._per_task, self._scratch = settings, ranks, per_task, scratch
        self.tell = tell
        self.show: Callable[[str], None] = lambda text: None
        """Hears of how things stand, in a line, when that changes."""
        self._shown = ""
        self._seen: dict[tuple[str, int], Task] = {}
        self._over_since: dict[tuple[str, int], float] = {}
        self._largest: int | None = None
        self._next_try = 0.0
        self._trouble = ""
        self._wait = RETRY_S
        self._intended: dict[str, float] = {}
        """When this process has intended a batch."""

    # ---------------------------------------------------------------- the work

    def run(self, items: Sequence[WorkItem], array: bool = True) -> Iterator[tuple[int, WorkResult]]:
        """What each item came to, as it comes, by its place.

        Args:
            array: whether they are the tasks of one job array; else a job each.
        Raises:
            Refused: when Slurm will never take them.
        """
        waiting = dict(enumerate(items))
        last = -POLL_QUEUE_S
        while True:
            for place, item in list(waiting.items()):
                if (done := self._collected(item)) is not None:
                    del waiting[place]
                    yield place, done
            if not waiting:
                self.show("")
                return
            if time.monotonic() - last >= POLL_QUEUE_S and self._needs_look(waiting.values()):
                self._look(waiting.values())
                last = time.monotonic()
                continue
            self._submit([i for i in waiting.values() if i.key not in self.ledger.assignments], array)
            self._tell_state(waiting.values())
            time.sleep(POLL_RESULTS_S)

    def submit(self, items: Sequence[WorkItem], array: bool = True) -> bool:
        """Submit what is not, without waiting for it; whether all of it is Slurm's now."""
        if self._needs_look(items):
            self._look(items)
        self._submit([i for i in items if i.key not in self.ledger.assignments], array)
        return all(i.key in self.ledger.assignments for i in items)

    def failed(self) -> dict[str, set[int]]:
        """The attempts that have failed, by item: with their task, or by what their work says."""
        out: dict[str, set[int]] = {}
        for (name, attempt), claim in self.ledger.assignments.items():
            found = read_memo(result(self.ledger.place(claim.batch), (name, attempt)))
            if found.get("reason") or (found.get("value") or {}).get("reason"):
                out.setdefault(name, set()).add(attempt)
        return out

    def cancel(self) -> list[str]:
        """End everything that is not done, and say what; what Slurm cannot be asked now stays."""
        if self.ledger.open():  # Slurm may have one of which we had no answer
            self._recover(client.queue(self.ledger.name))
        wanted = {b: self.ledger.jobs[b] for b, _ in self.ledger.live()}
        finished = {b for b in wanted if not self._unfinished(b)}
        jobs = {b: job for b, job in wanted.items() if b not in finished}
        client.cancel(jobs.values())
        for batch in jobs:
            self.ledger.cancelled(batch)
        return list(jobs.values())

    def _unfinished(self, batch: str) -> bool:
        place = self.ledger.place(batch)
        mine = [k for items in self.ledger.tasks[batch] for k in items if self._claims(batch, k)]
        return any(not result(place, k).exists() for k in mine)

    def _claims(self, batch: str, key: Key) -> bool:
        return key in self.ledger.assignments and self.ledger.assignments[key].batch == batch

    def _collected(self, item: WorkItem) -> WorkResult | None:
        claim = self.ledger.assignments.get(item.key)
        if claim is None:
            return None
        found = read_memo(result(self.ledger.place(claim.batch), item.key))
        return WorkResult(found.get("value"), found.get("reason"), bool(found.get("lost"))) if found else None

    # ---------------------------------------------------------------- submitting

    def _submit(self, items: Sequence[WorkItem], array: bool) -> None:
        if not items or time.monotonic() < self._next_try or self.ledger.open():
            return
        groups = [items[i : i + self._per_task] for i in range(0, len(items), self._per_task)]
        try:
            if not array:
                while groups:
                    self._one([groups.pop(0)], array=False)
            if self._largest is None and groups:
                self._largest = client.array_limit()
            while groups:
                size = min(len(groups), self._largest or 1)
                try:
                    self._one(groups[:size], array=True)
                except SlurmLimitReached:
                    if size == 1:
                        raise
                    self._largest = size // 2
                    continue
                groups = groups[size:]
            self._in_trouble("")
            self._wait = RETRY_S
        except (SlurmUnavailable, SlurmLimitReached) as e:
            self._in_trouble(f"{e}; it is tried again")
            self._largest = None
            self._next_try = time.monotonic() + self._wait
            self._wait = min(self._wait * 1.5, 6 * RETRY_S)

    def _one(self, groups: Sequence[Sequence[WorkItem]], array: bool) -> None:
        import cloudpickle

        folders = {i.name: i.folder.name for g in groups for i in g}
        batch = self.ledger.record_intent([[i.key for i in g] for g in groups], array, folders)
        self._intended[batch] = time.monotonic()
        place = self.ledger.place(batch)
        for name in ("results", "begun"):
            (place / name).mkdir(parents=True, exist_ok=True)
        for i, group in enumerate(groups):
            (place / f"task{i}.pkl").write_bytes(cloudpickle.dumps(list(group)))
        ranks = min(self._ranks, max(len(g) for g in groups))
        path = write_script(
            place, self._settings, self.ledger.name,
            [*TASK, str(place), *([self._scratch] if self._scratch else [])],
            tasks=len(groups) if array else None, ranks=ranks, scratch=self._scratch,
        )  # fmt: skip
        try:
            job = client.submit(path)
        except (SlurmLimitReached, SlurmRejected) as e:
            self.ledger.record_rejected(batch, str(e))
            raise
        self.ledger.submitted(batch, job)
        what = f"array {job}, {len(groups)} tasks"
        if not array:
            what = f"job {job}: " + ", ".join(i.name.partition("-")[0] for g in groups for i in g)
        self.tell(f"submitted {what}")

    # ---------------------------------------------------------------- watching

    def _needs_look(self, items: Any) -> bool:
        """Whether there is anything to ask Slurm about: not before the first submission."""
        return bool(self.ledger.open()) or any(i.key in self.ledger.assignments for i in items)

    def _look(self, items: Any) -> None:
        """Ask Slurm how the tasks are, and draw the conclusions."""
        try:
            seen = client.queue(self.ledger.name)
            self._recover(seen)
            claims = [self.ledger.assignments[i.key] for i in items if i.key in self.ledger.assignments]
            asked = {(c.batch, c.task) for c in claims}
            self._seen = self._tasks(asked, seen)
        except SlurmUnavailable as e:
            self._in_trouble(f"Slurm does not answer ({e}); what runs goes on")
            return
        if not self._trouble.startswith("sbatch"):
            self._in_trouble("")
        self._cancel_quietly({t.job for t in seen if t.comment in self.ledger.revoked and not t.over})
        now = time.monotonic()
        for at in asked:
            task = self._seen.get(at)
            if task is not None and task.stuck:
                self._cancel_quietly({task.number})
                self._ended(*at, replace(task, state="BOOT_FAIL"))
            elif task is not None and not task.over:
                self._over_since.pop(at, None)
            elif now - self._over_since.setdefault(at, now) >= SETTLING:
                self._ended(*at, task)

    def _in_trouble(self, text: str) -> None:
        """Tell a new trouble, once; an empty text ends it."""
        if text and text != self._trouble:
            self.tell(text)
        self._trouble = text

    def _cancel_quietly(self, numbers: set[str]) -> None:
        """End what nobody waits for; if Slurm cannot be asked now, the next look does it."""
        with suppress(MergelabError):
            client.cancel(sorted(numbers))

    def _tasks(self, asked: set[tuple[str, int]], seen: Sequence[Task]) -> dict[tuple[str, int], Task]:
        """What is known of each task. squeue alone says which are alive: the accounting may never have
        heard the end of one whose slurmctld crashed. A crash may also give a number twice, so that the
        comment has to be right, too."""
        known = {(t.comment, t.job, t.index): t for t in seen}
        places = {at: (at[0], self.ledger.jobs[at[0]], at[1]) for at in asked}
        missing = {job for at, (_, job, _) in places.items() if places[at] not in known}
        try:
            forgotten = client.accounting(sorted(missing))
        except SlurmUnavailable:  # nothing can be said of these yet
            asked -= {at for at, place in places.items() if place not in known}
            forgotten = []
        for t in forgotten:
            if t.over:
                known.setdefault((t.comment, t.job, t.index), t)
        return {at: known[place] for at, place in places.items() if place in known}

    def _recover(self, seen: Sequence[Task]) -> None:
        """Find out what became of a batch whose submitter was killed, or got no answer."""
        for batch in self.ledger.open():
            job = next((t.job for t in seen if t.comment == batch), None)
            # squeue remembers for minutes what has ended; for what is older there is the accounting.
            if job is None and time.monotonic() - self._intended.get(batch, -RECENT) >= RECENT:
                found = client.accounting_by_name(self.ledger.name)
                job = next((t.job for t in found if t.comment == batch), None)
            if job is not None:
                self.ledger.submitted(batch, job)
            else:
                self.ledger.record_rejected(batch, "Slurm does not know it")

    def _ended(self, batch: str, index: int, task: Task | None) -> None:
        """A task has ended: what it has not done is lost, or to be submitted again."""
        place = self.ledger.place(batch)
        mine = self.ledger.tasks[batch][index]
        left = [k for k in mine if self._claims(batch, k) and not result(place, k).exists()]
        if not left:
            self.ledger.record_ended(batch, index, task.state if task else "UNKNOWN", "", [])
            return
        number = task.number if task else f"{self.ledger.jobs[batch]}_{index}"
        where = f"{task.node}, " if task and task.node not in ("", "None assigned") else ""
        words = with_exit(task, place).words() if task else "Slurm no longer knows it"
        tail = last_lines(place, self.ledger.jobs[batch], index)
        if MEMORY.search(tail):  # of which not every cluster's states know
            words = "out of memory"
        reason = f"{words} ({where}Slurm task {number})"
        # A script that did not come to its end, and not for its memory, was killed with its node.
        cut_off = task is not None and task.state == "FAILED" and not status_of(place, index)
        innocent = (
            task is None or task.state in INFRASTRUCTURE_FAILURES or (cut_off and not MEMORY.search(tail))
        )
        started = [k for k in left if begun(place, k).exists()]
        any_begun = any(begun(place, k).exists() for k in mine)
        guilty = [] if innocent else started if any_begun else left
        lost = [k for k in left if k in guilty or self.ledger.times.get(k, 1) >= MAX_RESUBMISSIONS]
        for key in lost:
            told = reason + (f"; its last words: {tail}" if tail else "")
            write_json(result(place, key), {"reason": told, "lost": True})
        free = [k for k in left if k not in lost]
        self.ledger.record_ended(batch, index, task.state if task else "UNKNOWN", reason, free)
        self._over_since.pop((batch, index), None)
        what = ", ".join(k[0] for k in (lost or free))
        self.tell(f"{what}: {reason}" + ("" if lost else "; submitted again") + (f"\n{tail}" if tail else ""))

    def _tell_state(self, items: Any) -> None:
        counts: dict[str, int] = {}
        reasons: dict[str, int] = {}
        jobs: dict[str, None] = {}
        for at in dict.fromkeys(
            (c.batch, c.task) for i in items if (c := self.ledger.assignments.get(i.key))
        ):
            task = self._seen.get(at)
            state = task.state.lower() if task else "submitted"
            jobs[self.ledger.jobs[at[0]]] = None
            counts[state] = counts.get(state, 0) + 1
            if task is not None and task.state == "PENDING" and task.reason not in ("", "None"):
                reasons[task.reason] = reasons.get(task.reason, 0) + 1
        parts = [f"{n} {s}" + (f" ({', '.join(reasons)})" if s == "pending" and reasons else "")
                 for s, n in counts.items()]  # fmt: skip
        text = f"Slurm {', '.join(jobs)}: {', '.join(parts)}" if parts else ""
        text = "; ".join(t for t in (text, self._trouble) if t)
        if text != self._shown:
            self._shown = text
            self.show(text)
