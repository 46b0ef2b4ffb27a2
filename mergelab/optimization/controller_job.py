"""A sweep steered from a Slurm job: `search.controller=job`, so that nothing need live on the login node.

The job is the same command, with the sweep's folder named. Its first act is to submit its successor, which
Slurm starts when it has ended, however it ended: the journal is all that the successor needs. A sweep that
comes to its end takes the successor away.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from mergelab.core.errors import MergelabError, StepError
from mergelab.core.run_dir import hydra_value, read_memo, short_path
from mergelab.optimization import journal
from mergelab.report import progress_table, terminal
from mergelab.schema import Run, Slurm
from mergelab.slurm import client, job_array, submission_log
from mergelab.slurm.batch_dir import last_words, write_script
from mergelab.slurm.client import Task

INSIDE = "MERGELAB_CONTROLLER"
"""Set in the controller's job."""
MARK = "controller"
"""How the folders of its jobs begin, and so the comments by which they are found."""
MAX_STALLED_CONTROLLERS = 3
"""Controllers in a row that may end without a line in the journal; the next would do no better."""
SHORT = 600.0
"""Seconds in which they do; a candidate may well take longer than a controller that is often preempted."""
FOLLOW = 0.5
"""Seconds between two looks at the journal."""


def wanted(run: Run) -> bool:
    """Whether this process is to leave the sweep to a job."""
    return run.search.controller == "job" and INSIDE not in os.environ


def settings(run: Run) -> Slurm:
    """What the controller's job asks for: where it says nothing, what the tasks do."""
    own, tasks = run.search.controller_job, run.hardware.slurm
    assert tasks is not None
    return replace(
        own,
        partition=own.partition or tasks.partition,
        account=own.account or tasks.account,
        qos=own.qos or tasks.qos,
        setup=own.setup or tasks.setup,
    )


def command(arguments: Sequence[str], folder: Path) -> list[str]:
    """The command line of the controller's job.

    Args:
        arguments: of the command that the user typed.
    """
    kept = [a for a in arguments if not a.startswith("hydra.sweep.dir=")]
    return [sys.executable, "-u", "-m", "mergelab", *kept, f"hydra.sweep.dir={hydra_value(folder)}"]


# ---------------------------------------------------------------- from the login node


def start(run: Run, folder: Path, arguments: Sequence[str]) -> None:
    """See that a job steers the sweep: the one that there is, or a new one.

    Raises:
        Away, Limited, Refused: what Slurm says.
    """
    (folder / submission_log.FOLDER).mkdir(parents=True, exist_ok=True)
    with FileLock(folder / submission_log.FOLDER / "submit.lock"):  # the command may have been typed twice
        there = controllers(folder)
        if there:
            terminal.say(f"· Slurm job {there[0].job} steers this sweep already", "dim")
            return
        job = _submit(run, folder, arguments, after=None)
    terminal.say(f"· submitted job {job}, which steers the sweep", "dim")


def controllers(folder: Path) -> list[Task]:
    """The controller's jobs that run or wait, running ones first."""
    found = [
        t for t in client.queue(submission_log.job_name(folder)) if t.comment.startswith(MARK) and not t.over
    ]
    return sorted(found, key=lambda t: (t.state != "RUNNING", int(t.job)))


def _submit(run: Run, folder: Path, arguments: Sequence[str], after: str | None) -> str:
    n = len(list((folder / submission_log.FOLDER).glob(f"{MARK}*")))
    place = folder / submission_log.FOLDER / f"{MARK}{n + 1:03d}"
    place.mkdir()
    asked = settings(run)
    asked = replace(asked, setup=[*asked.setup, f"export {INSIDE}=1"])
    more: dict[str, Any] = {}
    if after:
        more = {"dependency": f"afterany:{after}", "kill-on-invalid-dep": "yes"}
    path = write_script(
        place, asked, submission_log.job_name(folder), command(arguments, folder), requeue=False, more=more
    )
    return client.submit(path)


def follow(folder: Path, budget: int, population: int) -> Mapping[str, Any]:
    """Show the sweep as its journal grows; returns its result.

    Raises:
        StepError: when its controller has ended without one.
        KeyboardInterrupt: after saying that the sweep goes on.
    """
    try:
        there = [x for x in journal.read(folder / journal.NAME) if x["event"] == "candidate"]
        with progress_table.table(budget, population, before=len(there)) as shown:
            told, looked, gone = 0, 0.0, 0
            while True:
                lines = journal.read(folder / journal.NAME)
                told = _tell(shown, lines, told, population)
                result = read_memo(folder / "result.json")
                if is_of(result, lines, budget):
                    return result
                if time.monotonic() - looked >= job_array.POLL_QUEUE_S:
                    looked = time.monotonic()
                    alive = _alive(folder, shown)
                    gone = 0 if alive or alive is None else gone + 1
                    if gone >= 3:
                        raise StepError(f"the sweep's controller has ended: {_last_words(folder)}")
                time.sleep(FOLLOW)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "stopped watching; the sweep keeps running\n"
            f"To end it: scancel --name={submission_log.job_name(folder)}"
        ) from None


def is_of(result: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], budget: int) -> bool:
    """Whether a result is that of the whole budget, and not of a smaller one before."""
    told = (result.get("search") or {}).get("budget")
    return result.get("status") == "done" and told == budget <= sum(x["event"] == "candidate" for x in lines)


def _alive(folder: Path, shown: progress_table.ProgressTable) -> list[Task] | None:
    try:
        there = controllers(folder)
    except MergelabError as e:
        shown.show_status(f"Slurm does not answer ({e})")
        return None
    states = ", ".join(f"{t.job} {t.state.lower()}" for t in there[:1])
    shown.show_status(f"steered by Slurm job {states}" if states else "")
    return there


def _tell(
    shown: progress_table.ProgressTable, lines: Sequence[Mapping[str, Any]], told: int, population: int
) -> int:
    """Show the lines that are new; returns how many have been shown."""
    for i, line in enumerate(lines[told:], start=told):
        if line["event"] in ("preset", "candidate"):
            shown.update(line["event"], line)
        if line["event"] == "candidate" and (line["number"] + 1) % population == 0:
            own = [x for x in lines[: i + 1] if x["event"] == "candidate"][-population:]
            shown.update("generation", {"generation": line["generation"], "lines": own})
    return len(lines)


def _last_words(folder: Path) -> str:
    """What the last controllers said before they ended, the successor that Slurm dropped left out."""
    for place in sorted((folder / submission_log.FOLDER).glob(f"{MARK}*"), reverse=True):
        for end in ("*.err", "*.out"):
            for file in place.glob(end):
                if words := last_words(file):
                    return f"{words[-500:]}\n{short_path(file)}"
    return "it said nothing"


# ---------------------------------------------------------------- in the job


@contextmanager
def chained_resubmission(run: Run, folder: Path, arguments: Sequence[str], known: int) -> Iterator[None]:
    """In the controller's job: see that another follows it; when the body ends by itself, none.

    Args:
        known: lines of the journal.
    Raises:
        StepError: when controllers follow each other without any progress.
    """
    if INSIDE not in os.environ or "SLURM_JOB_ID" not in os.environ:
        yield
        return
    own = os.environ["SLURM_JOB_ID"]
    file = submission_log.SubmissionLog(folder, submission_log.job_name(folder))
    last = file.controllers()[-MAX_STALLED_CONTROLLERS:]
    file.controller(own, known)
    if (
        len(last) == MAX_STALLED_CONTROLLERS
        and all(c["known"] == known for c in last)
        and time.time() - last[0]["time"] < SHORT
    ):
        raise StepError(
            f"{MAX_STALLED_CONTROLLERS} controllers in a row ended without any progress; their logs are in "
            f"{short_path(folder)}/slurm/{MARK}*/"
        )
    successor = None
    with suppress(MergelabError):  # the sweep goes on without; the same command goes on with it
        successor = _submit(run, folder, arguments, after=own)
    try:
        yield
    finally:
        if successor:
            with suppress(MergelabError):
                client.cancel([successor])
