"""What runs below some folders: a row for each run, and one for each sweep with those of its tasks."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from mergelab import search_history
from mergelab.core import heartbeat
from mergelab.monitor.readers import (
    Files,
    Item,
    Json,
    Queue,
    Submissions,
    find,
    item_name,
    number,
    part,
    submissions_of,
    text,
)
from mergelab.scheduling import submission_log
from mergelab.scheduling.scheduler import Task
from mergelab.search_history import INITIAL

STALE = 15.0
"""Seconds after which a heartbeat that was not rewritten is not a sign of life."""
WALK = 5.0
"""Seconds between two searches for new folders. On a network disk these take the time."""
OVER = {"done", "failed", "invalid", "interrupted", "lost", "stopped"}


@dataclass(frozen=True)
class Row:
    """A run, or a task of a sweep."""

    folder: Path
    state: str
    """running, pending, done, failed ... as in result.json; `lost` and `no sign` without a heartbeat."""
    when: float = 0.0
    """When it began, if it lives; its last heartbeat, if it does not."""
    name: str = ""
    """A run's model and method; a task's work item."""
    step: str = ""
    share: float | None = None
    """The part of the step's work that is done."""
    left: float | None = None
    """Seconds that the rest of the step takes at this rate."""
    fitness: float | None = None
    job: str = ""
    """The id of its task on a cluster."""
    position: int = 0
    """Among the user's pending tasks, from 1."""
    node: str = ""
    memory: int = 0
    gpus: tuple[Mapping[str, Any], ...] = ()
    reason: str = ""
    """Why it waits, or why it failed."""

    @property
    def rank(self) -> int:
        """0: running, 1: waiting, 2: ended. The order in which rows are shown."""
        return 2 if self.state in OVER else int(self.state in ("pending", "submitted"))

    @property
    def going(self) -> bool:
        """Whether it has neither ended nor stopped writing its heartbeat."""
        return self.rank < 2 and self.state != "no sign"


@dataclass(frozen=True)
class Sweep(Row):
    """A search."""

    done: int = 0
    total: int = 0
    rate: float | None = None
    """Candidates a minute."""
    generation: int = 0
    generations: int = 0
    best: float | None = None
    initial: float | None = None
    failed: int = 0
    last_failure: str = ""
    """Its reason."""
    tasks: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """Everything that was seen at one time."""

    time: float
    rows: list[Row] = field(default_factory=list)
    trouble: str = ""
    """Why nothing is known from a scheduler."""


# ---------------------------------------------------------------- from files to rows


def living(row: Row, beat: Json, now: float) -> Row:
    """A row with what its heartbeat says: alive, or for how long it has not been."""
    at, began, since = (number(beat.get(k)) or 0.0 for k in ("time", "started", "since"))
    done, total = (max(number(beat.get(k)) or 0.0, 0.0) for k in ("done", "total"))
    gpus = beat.get("gpus")
    row = replace(
        row, state="running", when=began or at, job=text(beat.get("job")) or row.job,
        step=" ".join(filter(None, (text(beat.get("step")), text(beat.get("what"))))),
        share=min(done / total, 1.0) if total else None,
        left=max(total - done, 0) * (at - since) / done if total and done and 0 < since < at else None,
        node=text(beat.get("host")), memory=int(number(beat.get("rss")) or 0),
        gpus=tuple(g for g in gpus if isinstance(g, dict)) if isinstance(gpus, list) else (),
    )  # fmt: skip
    if now - at <= STALE:
        return row
    pid = min(int(number(beat.get("pid")) or 0), 2**31 - 1)
    if row.node == socket.gethostname() and not psutil.pid_exists(pid):
        reason = f"process {pid} is gone, and left no result"
        return replace(row, state="lost", when=at, left=None, reason=reason)
    return replace(row, state="no sign", when=at, left=None)


def run_row(folder: Path, result: Json, ended: float) -> Row:
    """The row of a run by its result.json, written at the time `ended`."""
    choices, error = part(result, "choices"), part(result, "error")
    job = text(choices.get("job"))
    what = (
        result.get("file") or choices.get("model"),
        choices.get("method") if job in ("", "merge") else job,
    )
    return Row(
        folder, text(result.get("status")) or "running", ended, " · ".join(filter(None, map(text, what))),
        step=text(error.get("step")), fitness=number(part(result, "fitness").get("value")),
        reason=text(error.get("reason")),
    )  # fmt: skip


def sweep_row(
    folder: Path, journal: Sequence[Json], events: Sequence[Json], result: Json, beat: Json, changed: float
) -> Sweep:
    """The row of a search, except for whether it lives.

    Args:
        folder: of the sweep.
        journal: its lines.
        events: the lines of events.jsonl.
        result: result.json.
        beat: the heartbeat.
        changed: when any of its files was last written.
    """
    search = part(journal[0], "search") if journal else {}
    error, status = part(result, "error"), result.get("status")
    lines = [x for x in journal if x.get("event") == "candidate"]
    all_of_it = search_history.generation(
        0, ((number(x.get("fitness")), text(x.get("status"))) for x in lines)
    )
    reasons = [text(x.get("reason")) for x in lines if x.get("status") == "failed"]
    turns = [x for x in events if x.get("event") == "generation"]
    size = int(number(search.get("population")) or 0)
    searching = bool(beat) and not status  # later its heartbeat counts other things
    done, total = (int(number(beat.get(k)) or 0) if searching else 0 for k in ("done", "total"))
    done = max(len(lines), done if total else 0)
    total = total or int(number(part(result, "search").get("budget")) or 0)
    planned = int(number(turns[-1].get("of")) or 0) * size if turns else 0
    total = max(total or planned, done) if total or planned or status else 0
    rate = None
    began, at = number(beat.get("started")) or 0.0, number(beat.get("time")) or 0.0
    before = sum((number(x.get("time")) or 0) < began for x in turns)  # by an earlier process
    own = done - size * before
    if searching and own > 0 and at > began > 0:
        rate = own / (at - began) * 60
    return Sweep(
        folder, text(status) if status not in (None, "settling") else "running", changed,
        " · ".join(dict.fromkeys(filter(None, (text(search.get("name")), text(search.get("optimizer")))))),
        step=text(error.get("step")), fitness=number(part(result, "winner").get("fitness")),
        reason=text(error.get("reason")), done=done, total=total, rate=rate,
        generation=min(done // size + 1, max(-(-total // size), 1)) if size else 0,
        generations=-(-total // size) if size else 0,
        best=all_of_it.best, failed=all_of_it.failed, last_failure=reasons[-1] if reasons else "",
        initial=next((number(x.get("fitness")) for x in journal if x.get("event") == INITIAL), None),
    )  # fmt: skip


# ---------------------------------------------------------------- looking


class Watcher:
    """Reads folders repeatedly.

    Args:
        roots: folders to look below.
        hours: what ended longer ago is omitted, unless it is one of the roots.
    """

    def __init__(self, roots: Sequence[Path], hours: float):
        self._roots, self._hours = roots, hours
        self._files = Files()
        self._queues: dict[str, Queue] = {}
        self._next = 0.0
        self._found: list[tuple[str, Path]] = []
        self._over: dict[Path, list[Row]] = {}

    def look(self) -> Snapshot:
        """What there is now: running rows first, the newest of them before the others."""
        now = time.time()
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + WALK
            self._found = list(dict.fromkeys(x for root in self._roots for x in find(self._files, root)))
            self._over.clear()
        rows: list[Row] = []
        for kind, folder in self._found:
            if (here := self._over.get(folder)) is None:
                here = list(self._read(kind, folder, now))
                if all(r.rank == 2 for r in here):  # not looked at again before the next search
                    self._over[folder] = here
            named = folder in self._roots
            rows += [r for r in here if named or r.going or now - r.when <= self._hours * 3600]
        rows.sort(key=lambda r: (r.rank, -r.when))
        return Snapshot(now, rows, "; ".join(q.trouble for q in self._queues.values() if q.trouble))

    def _read(self, kind: str, folder: Path, now: float) -> Iterator[Row]:
        log = submissions_of(self._files, folder)
        if kind == "sweep":
            yield self._sweep(folder, now, log)
        elif kind == "run":
            yield from self._run(folder, now)
        else:
            items = {x.folders.get(name, name): x for x in log.items for name, _ in x.keys}
            numbers = set(items) | set(self._files.listing(folder)[1])
            for n in sorted((n for n in numbers if n.isdecimal()), key=int):
                yield from self._run(folder / n, now, items.get(n), log)

    def _queue(self, log: Submissions | None) -> dict[str, tuple[Task, int]] | None:
        """The tasks in the scheduler's queue, by id; None where that is not known."""
        if log is None or not log.scheduler:
            return None
        if log.scheduler not in self._queues:
            self._queues[log.scheduler] = Queue(log.scheduler, log.options)
        return self._queues[log.scheduler].tasks()

    def _run(
        self, folder: Path, now: float, item: Item | None = None, log: Submissions | None = None
    ) -> Iterator[Row]:
        """The row of a run, if there is anything to show.

        Args:
            folder: of the run.
            now: the time.
            item: the task that it is.
            log: in which the task is recorded.
        """
        result, beat = (self._files.mapping(folder / name) for name in ("result.json", heartbeat.NAME))
        row = run_row(folder, result, changed := self._files.changed(folder, "result.json"))
        if item and row.state != "done":
            row = replace(row, job=item.task)
            if waits := self._waiting(row, log):
                yield waits
                return
            if item.ended and (row.state == "running" or not result):
                row = replace(row, state="failed", reason=item.ended, when=row.when or now)
        if row.state != "running":
            yield row
        elif beat:
            yield living(row, beat, now)
        elif not result:
            if item and self._queue(log) is None:
                yield replace(row, state="submitted")
        else:
            steps = [x for x in self._files.lines(folder / "events.jsonl") if x.get("event") == "step"]
            last = steps[-1] if steps else {}
            row = replace(row, step=text(last.get("step")), when=max(changed, number(last.get("time")) or 0))
            if now - row.when > STALE:
                # A run removes its heartbeat when it ends, and not every job has a step that reports `done`.
                row = replace(row, state="done" if last.get("state") == "done" else "no sign")
            yield row

    def _waiting(self, row: Row, log: Submissions | None) -> Row | None:
        """The row of a task that the scheduler has not started; None for others."""
        task, position = (self._queue(log) or {}).get(row.job, (None, 0))
        if task is None or task.state != "PENDING":
            return None
        return replace(row, state="pending", reason=task.reason, position=position, step="")

    def _in_queue(self, job: str, log: Submissions) -> Task | None:
        return (self._queue(log) or {}).get(job, (None, 0))[0]

    def _sweep(self, folder: Path, now: float, log: Submissions) -> Row:
        """The row of a search, with those of its tasks."""
        journal, events = (self._files.lines(folder / name) for name in ("journal.jsonl", "events.jsonl"))
        result, beat = (self._files.mapping(folder / name) for name in ("result.json", heartbeat.NAME))
        changed = self._files.changed(folder, "journal.jsonl", "result.json")
        changed = max(changed, self._files.changed(log.folder, submission_log.NAME))
        row = sweep_row(folder, journal, events, result, beat, changed)
        if row.state != "running":
            return row
        known = {f"candidate{x.get('number')}" for x in journal if x.get("event") == "candidate"}
        row = replace(row, tasks=tuple(sorted(self._tasks(folder, now, log, known), key=lambda r: r.rank)))
        if beat:
            counting = () if result else ("what", "done", "total")  # candidates, which the row has
            return living(row, {k: v for k, v in beat.items() if k not in counting}, now)
        if controllers := [str(x.get("job")) for x in log.lines if x.get("event") == "controller"]:
            row = replace(row, job=controllers[-1])
            task = self._in_queue(row.job, log)
            if waits := self._waiting(row, log):
                return waits
            if task and not task.over:
                return replace(row, node=task.node)
        if now - row.when <= STALE:
            return row
        return replace(row, state="detached" if row.tasks else "stopped")

    def _tasks(self, folder: Path, now: float, log: Submissions, known: set[str]) -> Iterator[Row]:
        """The rows of a sweep's tasks that have not ended.

        Args:
            folder: of the sweep.
            now: the time.
            log: of what was submitted.
            known: work items whose result the journal has.
        """
        for item in log.items:
            have = self._files.listing(log.folder / item.batch / "results")[0]
            names = [n for n, attempt in item.keys if n not in known and f"{n}.{attempt}.json" not in have]
            if not names or item.ended:
                continue
            beats = [(number(s.get("time")) or 0.0, i, s) for i, n in enumerate(names)
                     if (s := self._sign(folder, n, item))]  # fmt: skip
            at, i, beat = max(beats, key=lambda x: x[0], default=(0.0, 0, {}))
            name = item_name(names[i]) + (f" +{len(names) - 1}" if len(names) > 1 else "")
            row = Row(folder, "submitted", now, name, job=item.task)
            if waits := self._waiting(row, log):
                yield waits
                continue
            task = self._in_queue(item.task, log)
            if now - at > STALE and (task.over if task else self._queue(log) is not None):
                continue
            if task:
                row = replace(row, node=task.node, state=task.state.lower())
            yield living(row, beat, now) if beat else row

    def _sign(self, folder: Path, name: str, item: Item) -> Json:
        """The heartbeat of a work item, that of its candidate; empty where it is another task's."""
        beat = self._files.mapping(folder / item.folders.get(name, name) / heartbeat.NAME)
        return beat if beat.get("job") in (None, item.task) else {}
