"""The files that runs leave, and the queues of schedulers, read by a process that only watches.

Any file may be half-written, or removed after it was seen. It then counts as it was before, or as absent.
Nothing is written, and a file that has not changed is not read again.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from mergelab.core import heartbeat
from mergelab.core.errors import MergelabError
from mergelab.core.run_dir import read_memo
from mergelab.scheduling import submission_log
from mergelab.scheduling.scheduler import ENDED, SCHEDULERS, Task
from mergelab.search_history import row_label

POLL_QUEUE_S = 5.0
"""Seconds between two queries of a scheduler's queue."""
RETRY_S = 30.0
"""The same after it has not answered: each try may take a minute."""
DEPTH = 6
SKIPPED = {"model", "wandb", "report", "early"}
LARGE = {"inputs", "metrics", "genome"}
"""Keys of result.json that are not shown and would fill the memory."""

Json = dict[str, Any]


class Files:
    """JSON files and folders, read again only where they have changed."""

    def __init__(self) -> None:
        self._mappings: dict[Path, tuple[Any, Json]] = {}
        self._lines: dict[Path, tuple[int, int, list[Json]]] = {}
        self._folders: dict[Path, tuple[int, tuple[set[str], list[str]]]] = {}

    def mapping(self, path: Path) -> Json:
        """What a file holds; as it was before where it is torn, empty where there is none."""
        if (found := _stat(path)) is None:
            self._mappings.pop(path, None)
            return {}
        stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        before, content = self._mappings.get(path, (None, {}))
        if stamp != before:
            content = {k: v for k, v in read_memo(path).items() if k not in LARGE} or content
            self._mappings[path] = stamp, content
        return content

    def lines(self, path: Path) -> list[Json]:
        """The whole lines of a file that grows; only what is new is read."""
        if (found := _stat(path)) is None:
            self._lines.pop(path, None)
            return []
        inode, end, lines = self._lines.get(path, (found.st_ino, 0, []))
        if inode != found.st_ino or found.st_size < end:
            end, lines = 0, []
        if found.st_size > end:
            try:
                with path.open("rb") as f:
                    f.seek(end)
                    new = f.read()
            except OSError:
                return lines
            whole = new[: new.rfind(b"\n") + 1]
            lines, end = lines + [x for x in map(_parsed, whole.splitlines()) if x], end + len(whole)
        self._lines[path] = found.st_ino, end, lines
        return lines

    def listing(self, folder: Path) -> tuple[set[str], list[str]]:
        """The names of the files and of the folders in a folder."""
        stamp = found.st_mtime_ns if (found := _stat(folder)) else 0
        before, names = self._folders.get(folder, (-1, (set(), [])))
        if stamp == before:
            return names
        files: set[str] = set()
        folders: list[str] = []
        try:
            with os.scandir(folder) as entries:
                for e in entries:
                    if e.is_dir(follow_symlinks=False):
                        folders.append(e.name)
                    else:
                        files.add(e.name)
        except OSError:
            return set(), []
        if time.time() - stamp / 1e9 > 10:  # of a younger one the clock of a disk may hide a change
            self._folders[folder] = stamp, (files, folders)
        return files, folders

    def changed(self, folder: Path, *names: str) -> float:
        """When one of these files was last written; 0 where there is none."""
        return max((s.st_mtime for name in names if (s := _stat(folder / name))), default=0.0)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _parsed(line: bytes) -> Json:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if ok else None


def text(value: Any) -> str:
    """A text; empty for anything else."""
    return value if isinstance(value, str) else ""


def part(value: Json, key: str) -> Json:
    """A mapping in a mapping; empty for anything else."""
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def find(files: Files, folder: Path, depth: int = DEPTH) -> Iterator[tuple[str, Path]]:
    """The `sweep`s, `grid`s on Slurm and `run`s in a folder; nothing is looked for inside of them."""
    names, below = files.listing(folder)
    log = submissions_of(files, folder)
    items = {name for item in log.items for name, _ in item.keys}
    if "journal.jsonl" in names or (log.lines and not items and "result.json" not in names):
        yield "sweep", folder
    elif items:
        yield "grid" if any(n.startswith("run") for n in items) else "sweep", folder
    elif names & {"result.json", heartbeat.NAME}:
        yield "run", folder
    elif depth:
        for name in below:
            if name not in SKIPPED and name not in scheduler_names() and not name.startswith("."):
                yield from find(files, folder / name, depth - 1)


@dataclass(frozen=True)
class Item:
    """A task on a cluster, as the submission log records it, and its work items."""

    batch: str
    job: str
    index: int
    array: bool
    keys: tuple[tuple[str, int], ...]
    """Names and attempts."""
    folders: Mapping[str, str] = field(default_factory=dict)
    """By name, where in the sweep's folder each writes its heartbeat."""
    ended: str = ""
    """How it ended, if it did so before its work was done."""

    @property
    def task(self) -> str:
        """Its id, as the scheduler writes it."""
        return f"{self.job}_{self.index}" if self.array and self.job else self.job


@dataclass(frozen=True)
class Submissions:
    """The submission log of a sweep, as far as it can be read."""

    folder: Path
    """Where the batches are."""
    scheduler: str = ""
    """Its name; empty where nothing was submitted."""
    lines: list[Json] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)

    @property
    def options(self) -> Json:
        """Of the scheduler."""
        return part(self.lines[0], "options") if self.lines else {}


@cache
def scheduler_names() -> frozenset[str]:
    """The schedulers that are registered. In a sweep's folder, a folder of that name holds its jobs."""
    return frozenset(SCHEDULERS.names())


def submissions_of(files: Files, folder: Path) -> Submissions:
    """What was submitted for a sweep, or for the runs of a command."""
    for name in scheduler_names().intersection(files.listing(folder)[1]):
        if lines := files.lines(folder / name / submission_log.NAME):
            return Submissions(folder / name, name, lines, items_of(lines))
    return Submissions(folder)


def items_of(lines: Sequence[Json]) -> list[Item]:
    """The tasks that have been submitted, each with the work items that no later task has taken over."""
    batches: dict[str, list[Item]] = {}
    for line in lines:
        event, batch = line.get("event"), str(line.get("batch"))
        with suppress(TypeError, ValueError, LookupError):  # a line of another version
            if event == "submitting":
                keys = [tuple((str(name), int(attempt)) for name, attempt in task) for task in line["tasks"]]
                array, folders = bool(line["array"]), part(line, "folders")
                batches[batch] = [Item(batch, "", i, array, k, folders) for i, k in enumerate(keys)]
            elif event == "submitted":
                batches[batch] = [replace(x, job=str(line["job"])) for x in batches[batch]]
            elif event in ("void", "cancelled"):
                del batches[batch]
            elif event == "ended":
                reason = line.get("reason") or ENDED.get(line["state"]) or "ended"
                batches[batch][line["task"]] = replace(batches[batch][line["task"]], ended=str(reason))
    tasks = [x for items in batches.values() for x in items]
    latest = {name: (x.batch, x.index) for x in tasks for name, _ in x.keys}
    owned = [replace(x, keys=tuple(k for k in x.keys if latest[k[0]] == (x.batch, x.index))) for x in tasks]
    return [x for x in owned if x.keys]


def item_name(name: str) -> str:
    """`candidate17` as `17`, `screen17` as `screen 17`, `preset-1` as `initial`."""
    found = re.fullmatch(r"([a-z]+)(\d+)", name)
    if found is None:
        return row_label(name.partition("-")[0])
    return found[2] if found[1] == "candidate" else f"{found[1]} {found[2]}"


class Queue:
    """The user's tasks in the queue of a scheduler, asked for only when they are needed, and seldom.

    Args:
        name: of the scheduler.
        options: with which it was used.
    """

    def __init__(self, name: str, options: Mapping[str, Any]):
        self.trouble = ""
        """Why the queue is not known."""
        self._name, self._options = name, options
        self._next = 0.0
        self._tasks: dict[str, tuple[Task, int]] | None = None

    def tasks(self) -> dict[str, tuple[Task, int]] | None:
        """Each task by its id, with its position among the pending ones; None where the scheduler does not
        answer."""
        if time.monotonic() >= self._next:
            wait, self._tasks, self.trouble = POLL_QUEUE_S, None, ""
            title = self._name
            try:
                scheduler = SCHEDULERS.get(self._name)(dict(self._options))
                title = scheduler.title
                if (program := scheduler.missing_program()) is None:
                    self._tasks = _positions(scheduler.queue(None))
                else:
                    self.trouble = f"nothing is known from {title}: there is no {program} on this machine"
            except MergelabError:
                wait, self.trouble = RETRY_S, f"{title} does not answer"
            self._next = time.monotonic() + wait
        return self._tasks


def _positions(tasks: Sequence[Task]) -> dict[str, tuple[Task, int]]:
    pending = 0
    found = {}
    for task in tasks:
        waits = task.state == "PENDING"
        pending += waits
        for number in (f"{task.job}_{task.index}", *([task.job] if task.index == 0 else [])):
            found[number] = task, pending if waits else 0
    return found
