"""The executor on a cluster: a population is one job array, everything else is a job of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from mergelab.core import hashing
from mergelab.core.errors import MergelabError, StepError
from mergelab.core.run_dir import RunDir
from mergelab.jobs.run_job import run_job
from mergelab.merging import node_local_cache
from mergelab.optimization.candidate_evaluator import Outcome
from mergelab.optimization.executors.base import EvaluationRequest
from mergelab.optimization.executors.processes import evaluate_here
from mergelab.report import terminal
from mergelab.scheduling import job_array, on_node, submission_log
from mergelab.scheduling.job_array import JobArrayExecutor, WorkItem
from mergelab.scheduling.scheduler import Scheduler
from mergelab.schema import Run, identity_of
from mergelab.search_history import INITIAL

POPULATION = ("candidate", "screen")
"""Kinds of requests that are submitted as a population."""


Measure = Callable[[EvaluationRequest, float | None], dict[str, Any]]
"""From a request and a candidate's time limit to its Outcome as a mapping."""


class ClusterExecutor:
    """Has candidates evaluated by the tasks of a cluster.

    Args:
        run: the composed run.
        folder: the sweep's.
        scheduler: of the run's hardware.
        measure: what a task does with a request.
    """

    def __init__(self, run: Run, folder: Path, scheduler: Scheduler, measure: Measure | None = None):
        h = run.hardware
        self._folder, self._timeout = folder, run.search.timeout
        self._measure: Measure = measure or measure_in_task
        self._jobs = JobArrayExecutor(
            folder, submission_log.job_name(folder), scheduler,
            ranks=h.workers, per_task=h.candidates_per_task, scratch=h.scratch, report=terminal.aside,
        )  # fmt: skip
        self._spent = attempts_spent(self._jobs)
        self.show: Callable[[str], None] | None = None
        """Shows the state of the tasks in a live view; None: on a line of its own."""

    def evaluate(self, requests: Sequence[EvaluationRequest]) -> Iterator[tuple[int, Outcome]]:
        """The outcome of each, as they arrive."""
        items = [
            WorkItem(
                request.name,
                partial(self._measure, _local(request), self._timeout),
                self._folder / _log_folder(request),
                self._spent.get(request.name, 0) + request.attempt,
            )
            for request in requests
        ]
        array = bool(requests) and requests[0].kind in POPULATION
        for position, result in self._run(items, array):
            outcome = Outcome(reason=result.reason) if result.value is None else Outcome(**result.value)
            yield position, outcome

    def run_winner(self, run: Run, run_dir: RunDir, turn: int) -> None:
        """Run the steps of a job, those of the winner, in a task of its own.

        Raises:
            StepError: with the reason, when it has failed twice.
        """
        local = on_node(run)
        name = f"winner-{turn}-{hashing.digest([identity_of(local), str(run_dir.model)])[:8]}"
        for attempt in (1, 2):
            item = WorkItem(name, partial(run_steps_in_task, local, run_dir), run_dir.folder / "winner",
                            self._spent.get(name, 0) + attempt)  # fmt: skip
            ((_, result),) = self._run([item], array=False)
            if result.reason is None:
                return
        raise StepError(f"the winner: {result.reason}")

    def _run(self, items: Sequence[WorkItem], array: bool) -> Iterator[tuple[int, job_array.WorkResult]]:
        with ExitStack() as stack:
            self._jobs.show_status = self.show or stack.enter_context(terminal.waiting())
            yield from self._jobs.run(items, array)

    def close(self, at_once: bool = False) -> None:
        """Cancel what is still running; results that are there are kept."""
        scheduler = self._jobs.scheduler
        try:
            jobs = self._jobs.cancel()
        except MergelabError as e:
            command = scheduler.cancel_command(self._jobs.log.name)
            how = f"\nTo end them: {command}" if command else ""
            terminal.aside(f"{scheduler.title} does not answer, and its jobs keep running ({e}){how}")
            return
        if jobs:
            terminal.aside(f"cancelled {scheduler.title} job {', '.join(jobs)}")


def attempts_spent(jobs: JobArrayExecutor) -> dict[str, int]:
    """For each item the attempts of earlier processes, in pairs. An item that failed twice and is requested
    again was not recorded as a failure, and is retried."""
    out = {}
    for name, attempts in jobs.failed().items():
        n = 0
        while {n + 1, n + 2} <= attempts:
            n += 2
        out[name] = n
    return out


def _log_folder(request: EvaluationRequest) -> str:
    """The folder of a candidate's log."""
    return INITIAL if request.number < 0 else str(request.number)


def _local(request: EvaluationRequest) -> EvaluationRequest:
    """A request as the task sees it: it works on its own node."""
    return replace(request, run=on_node(request.run))


def run_steps_in_task(run: Run, run_dir: RunDir) -> None:
    """Run the steps of a job, in a task."""
    run_job(run, replace(run_dir, scratch=node_local_cache.folder()))


def measure_in_task(request: EvaluationRequest, timeout: float | None) -> dict[str, Any]:
    """The outcome of a request, in a task: on the GPU of its rank."""
    return asdict(evaluate_here(request, timeout, int(os.environ.get("MERGELAB_LOCAL_RANK") or 0)))
