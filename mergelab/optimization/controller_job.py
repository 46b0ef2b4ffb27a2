"""A sweep controlled by a job on the cluster: `search.controller=job`. No process stays on the login node.

The job runs the same command, with the sweep's folder named. It first submits its successor, which the
scheduler starts when the job has ended, in whatever way. The journal is all that the successor needs. A sweep
that reaches its end cancels the successor.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from mergelab.core.errors import Interrupted, MergelabError, StepError
from mergelab.core.run_dir import hydra_value, read_memo, short_path
from mergelab.optimization import journal
from mergelab.report import progress_table, terminal
from mergelab.scheduling import job_array, submission_log
from mergelab.scheduling.batch_dir import last_lines_of
from mergelab.scheduling.scheduler import JobRequest, Scheduler, Task, scheduler_of
from mergelab.schema import Run
from mergelab.search_history import INITIAL

INSIDE = "MERGELAB_CONTROLLER"
"""Set in the controller's job."""
MARK = "controller"
"""The prefix of its jobs' folders, and so of the comments by which the jobs are found."""
MAX_STALLED_CONTROLLERS = 3
"""Controllers in a row that may end without a new line in the journal; the next one would not do better."""
STALL_S = 600.0
"""Seconds within which they do. A candidate may take longer than a controller that is often preempted."""
POLL_JOURNAL_S = 0.5
"""Seconds between two looks at the journal."""


def wanted(run: Run) -> bool:
    """Whether this process leaves the control of the sweep to a job."""
    return run.search.controller == "job" and INSIDE not in os.environ


def command(arguments: Sequence[str], folder: Path) -> list[str]:
    """The command line of the controller's job.

    Args:
        arguments: of the command that the user typed.
        folder: the sweep's.
    """
    kept = [a for a in arguments if not a.startswith("hydra.sweep.dir=")]
    return [sys.executable, "-u", "-m", "mergelab", *kept, f"hydra.sweep.dir={hydra_value(folder)}"]


def _scheduler(run: Run) -> Scheduler:
    scheduler = scheduler_of(run)
    assert scheduler is not None
    return scheduler.for_controller(run)


# ---------------------------------------------------------------- from the login node


def start(run: Run, folder: Path, arguments: Sequence[str]) -> None:
    """Ensure that a job controls the sweep: the one that already does, or a new one.

    Raises:
        SchedulerUnavailable, SchedulerLimitReached, SchedulerRejected: see `Scheduler.submit`.
    """
    scheduler = _scheduler(run)
    jobs = scheduler.jobs_dir(folder)
    jobs.mkdir(parents=True, exist_ok=True)
    with FileLock(jobs / "submit.lock"):  # the command may have been typed twice
        running = controllers(scheduler, folder)
        if running:
            terminal.say(f"· {scheduler.title} job {running[0].job} already controls this sweep", "dim")
            return
        job = _submit(scheduler, folder, arguments, after=None)
    terminal.say(f"· submitted job {job}, which controls the sweep", "dim")


def controllers(scheduler: Scheduler, folder: Path) -> list[Task]:
    """The controller's jobs that run or wait, running ones first."""
    queue = scheduler.queue(submission_log.job_name(folder))
    found = [t for t in queue if t.comment.startswith(MARK) and not t.over]
    return sorted(found, key=lambda t: (t.state != "RUNNING", len(t.job), t.job))


def _submit(scheduler: Scheduler, folder: Path, arguments: Sequence[str], after: str | None) -> str:
    jobs = scheduler.jobs_dir(folder)
    n = len(list(jobs.glob(f"{MARK}*")))
    batch = jobs / f"{MARK}{n + 1:03d}"
    batch.mkdir()
    return scheduler.submit(
        JobRequest(
            batch,
            submission_log.job_name(folder),
            command(arguments, folder),
            restart=False,
            after=after,
            environment={INSIDE: "1"},
        )
    )


def follow(run: Run, folder: Path, budget: int, population: int) -> Mapping[str, Any]:
    """Show the sweep as its journal grows; returns its result.

    Raises:
        StepError: when its controller has ended without one.
        KeyboardInterrupt: after saying that the sweep keeps running.
    """
    scheduler = _scheduler(run)
    try:
        known = [x for x in journal.read(folder / journal.NAME) if x["event"] == "candidate"]
        with progress_table.table(budget, population, before=len(known)) as table:
            shown, polled, gone = 0, 0.0, 0
            while True:
                lines = journal.read(folder / journal.NAME)
                shown = _show(table, lines, shown, population)
                result = read_memo(folder / "result.json")
                if is_of(result, lines, budget):
                    return result
                if time.monotonic() - polled >= job_array.POLL_QUEUE_S:
                    polled = time.monotonic()
                    live = _live(scheduler, folder, table)
                    gone = 0 if live or live is None else gone + 1
                    if gone >= 3:
                        last = _last_output(scheduler.jobs_dir(folder))
                        raise StepError(
                            f"the controller of the sweep ended before the search did; it said last: {last}\n"
                            "The same command resumes the search."
                        )
                time.sleep(POLL_JOURNAL_S)
    except KeyboardInterrupt:
        end = scheduler.cancel_command(submission_log.job_name(folder))
        how = f"\nTo end it: {end}" if end else ""
        raise Interrupted(f"stopped watching; the sweep keeps running{how}") from None


def is_of(result: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], budget: int) -> bool:
    """Whether a result is that of the whole budget, and not of a smaller one before."""
    known = (result.get("search") or {}).get("budget")
    candidates = sum(x["event"] == "candidate" for x in lines)
    return result.get("status") == "done" and known == budget <= candidates


def _live(scheduler: Scheduler, folder: Path, table: progress_table.ProgressTable) -> list[Task] | None:
    """The controller's jobs that run or wait; None where the scheduler does not answer."""
    try:
        found = controllers(scheduler, folder)
    except MergelabError as e:
        table.show_status(f"{scheduler.title} does not answer ({e})")
        return None
    states = ", ".join(f"{t.job} {t.state.lower()}" for t in found[:1])
    table.show_status(f"controlled by {scheduler.title} job {states}" if states else "")
    return found


def _show(
    table: progress_table.ProgressTable, lines: Sequence[Mapping[str, Any]], shown: int, population: int
) -> int:
    """Show the lines that are new; returns how many have been shown."""
    for i, line in enumerate(lines[shown:], start=shown):
        if line["event"] in (INITIAL, "candidate"):
            table.update(line["event"], line)
        if line["event"] == "candidate" and (line["number"] + 1) % population == 0:
            own = [x for x in lines[: i + 1] if x["event"] == "candidate"][-population:]
            table.update("generation", {"generation": line["generation"], "lines": own})
    return len(lines)


def _last_output(jobs: Path) -> str:
    """Last log lines of the most recent controller, skipping a successor that never started."""
    for batch in sorted(jobs.glob(f"{MARK}*"), reverse=True):
        for end in ("*.err", "*.out"):
            for file in batch.glob(end):
                if text := last_lines_of(file):
                    return f"{text[-500:]}\n{short_path(file)}"
    return "it wrote no output"


# ---------------------------------------------------------------- in the job


@contextmanager
def chained_resubmission(run: Run, folder: Path, arguments: Sequence[str], known: int) -> Iterator[None]:
    """In the controller's job: submit its successor; cancel it when the body ends by itself.

    Args:
        run: the composed run.
        folder: the sweep's.
        arguments: of the command that the user typed.
        known: lines of the journal.
    Raises:
        StepError: when controllers follow each other without any progress.
    """
    scheduler = _scheduler(run) if INSIDE in os.environ else None
    if scheduler is None or (own := scheduler.current_job()) is None:
        yield
        return
    jobs = scheduler.jobs_dir(folder)
    log = submission_log.SubmissionLog(jobs, submission_log.job_name(folder), scheduler.options)
    last = log.controllers()[-MAX_STALLED_CONTROLLERS:]
    log.record_controller(own, known)
    if (
        len(last) == MAX_STALLED_CONTROLLERS
        and all(c["known"] == known for c in last)
        and time.time() - last[0]["time"] < STALL_S
    ):
        raise StepError(
            f"{MAX_STALLED_CONTROLLERS} controllers in a row ended without any progress; their logs are in "
            f"{short_path(jobs)}/{MARK}*/"
        )
    successor = None
    with suppress(MergelabError):  # the sweep continues without one; the same command resumes it
        successor = _submit(scheduler, folder, arguments, after=own)
    try:
        yield
    finally:
        if successor:
            with suppress(MergelabError):
                scheduler.cancel([successor])
