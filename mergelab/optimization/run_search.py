"""A search from top to bottom: check the request, find or begin its folder, evolve, finalize."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mergelab.core import heartbeat, run_log
from mergelab.core.errors import Interrupted, StepError
from mergelab.core.run_dir import RunDir, short_path
from mergelab.jobs import offline
from mergelab.optimization import controller_job, fingerprint, journal, prepare, search_folder, summary
from mergelab.optimization.controller import evolve
from mergelab.optimization.executors import make_executor
from mergelab.optimization.finalize import finalize
from mergelab.optimization.journal import Journal
from mergelab.optimization.request import Request, Setup
from mergelab.optimization.search_result import show
from mergelab.optimization.study import Study
from mergelab.optimization.wandb_client import SweepTracker
from mergelab.preflight import Plan
from mergelab.report import progress_table, terminal
from mergelab.schema import Run
from mergelab.tracking import wandb_sync

log = logging.getLogger(__name__)


def run(request: Request) -> Study | None:
    """Search, and return the study; None of `job=plan`, and where a detached job drives the search.

    Raises:
        InputError: for everything that is wrong, before anything is measured.
        TooManyFailures: see `controller`.
        StepError: see `finalize`.
    """
    with offline.where_local(request.run):
        terminal.say(summary.title(request), "bold")  # at once: the first check imports a lot
        if request.groups.get("job") == "plan":
            summary.show_plan(*prepare.prepare(request, dry_run=True))
            return None
        setup, plan = prepare.prepare(request)
        identity = fingerprint.identify(setup, plan)
        folder = search_folder.find(request, identity)
        run_dir = RunDir(folder, folder / "model")
        terminal.say(short_path(folder), "dim")
        if controller_job.wanted(setup.run):
            summary.show_header(setup, plan, folder, journal.read(folder / journal.NAME))
            return _leave_to_job(setup, run_dir, request)
        with run_dir.lock(), run_log.written(folder / run_log.NAME):
            log.info("command: %s", request.command)
            lines = search_folder.open_journal(folder, setup, identity, request.command)
            summary.show_header(setup, plan, folder, lines.lines)
            _search(setup, plan, lines, run_dir, request)
        return Study.load(folder)


def _leave_to_job(setup: Setup, run_dir: RunDir, request: Request) -> Study | None:
    """Let a job on the cluster drive the search, and watch it. That job alone writes the journal."""
    controller_job.start(setup.run, run_dir.folder, request.arguments)
    if setup.run.hardware.detach:
        terminal.say("  python -m mergelab job=monitor   shows it", "dim")
        terminal.say("  the same command without hardware.detach watches it and shows the result", "dim")
        return None
    result = controller_job.follow(setup.run, run_dir.folder, setup.budget, setup.population)
    show(run_dir, result)
    wandb_sync.finish(run_dir.folder, setup.run.tracking)
    return Study.load(run_dir.folder)


def _search(setup: Setup, plan: Plan, journal: Journal, run_dir: RunDir, request: Request) -> None:
    """Evolve and finalize, with all that accompanies it: heartbeat, log, tracking, signals."""
    known = len(journal.lines)
    try:
        with (
            controller_job.chained_resubmission(setup.run, run_dir.folder, request.arguments, known),
            heartbeat.running(run_dir.folder),
            _tasks_kept_on_hangup(setup.run),
            _tracked(setup, run_dir) as tracker,
        ):
            _evolve_and_finalize(setup, plan, journal, run_dir, request.command)
            tracker.finish(0)
            if setup.run.tracking.sync:
                wandb_sync.finish(run_dir.folder, setup.run.tracking)
    except (Exception, KeyboardInterrupt) as e:
        log.error("the search did not finish: %s", e or type(e).__name__, exc_info=e)
        raise


def _evolve_and_finalize(setup: Setup, plan: Plan, journal: Journal, run_dir: RunDir, command: str) -> None:
    executor = make_executor(setup.run, run_dir.folder)
    measured_before = len(journal.select("candidate"))
    try:
        with progress_table.table(setup.budget, setup.population, measured_before) as table:
            executor.show = table.show_status

            def watch(event: str, line: Mapping[str, Any]) -> None:
                table.update(event, line)
                heartbeat.report_progress("candidates", table.done, setup.budget)
                if event == "generation":
                    run_dir.event("generation", generation=line["generation"], of=setup.generations)

            evolve(setup, journal, executor, watch)
        executor.show = None
        finalize(setup, plan, journal, run_dir, executor, command)
    except KeyboardInterrupt:
        counted = len(journal.select("candidate"))
        raise Interrupted(
            f"interrupted; {counted} of {setup.budget} candidates are safe in {short_path(journal.path)}\n"
            "Run the same command again to resume."
        ) from None
    finally:
        executor.close(at_once=True)


@contextmanager
def _tracked(setup: Setup, run_dir: RunDir) -> Iterator[SweepTracker]:
    """The search in W&B, which is also informed of a failure."""
    tracker = SweepTracker(setup.run, run_dir.folder, setup.budget)
    try:
        yield tracker
    except StepError as e:
        tracker.finish(e.exit_status)
        raise
    finally:
        tracker.leave()


@contextmanager
def _tasks_kept_on_hangup(run: Run) -> Iterator[None]:
    """Let a closed terminal end this process only: the same command adopts the cluster's tasks."""
    if not run.hardware.on_cluster or threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: object) -> None:
        log.info("the terminal was closed; the cluster's tasks keep running")
        logging.shutdown()
        os._exit(128 + signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
