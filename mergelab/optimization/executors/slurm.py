"""Workers on a Slurm cluster: a population is one job array, everything else a job by itself."""

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
from mergelab.schema import Run
from mergelab.slurm import job_array, on_node, submission_log
from mergelab.slurm.job_array import JobArrayExecutor, WorkItem

POPULATION = ("candidate", "screen")
"""Kinds of orders that come as a population."""


Measuring = Callable[[EvaluationRequest, float | None], dict[str, Any]]
"""From an order and a candidate's time limit to its Outcome as a mapping."""


class SlurmExecutor:
    """Has candidates measured by Slurm tasks.

    Args:
        run: the composed run.
        folder: the sweep's.
        measure: what a task does with an order.
    """

    def __init__(self, run: Run, folder: Path, measure: Measuring | None = None):
        h = run.hardware
        assert h.slurm is not None
        self._folder, self._timeout = folder, run.search.timeout
        self._measure: Measuring = measure or measured
        self._batches = JobArrayExecutor(
            folder, submission_log.job_name(folder), h.slurm,
            ranks=h.workers, per_task=h.candidates_per_task, scratch=h.scratch, tell=terminal.aside,
        )  # fmt: skip
        self._spent = spent(self._batches)
        self.show: Callable[[str], None] | None = None
        """Where a live view shows how things stand; else a line of our own does."""

    def evaluate(self, orders: Sequence[EvaluationRequest]) -> Iterator[tuple[int, Outcome]]:
        """The outcome of each, as they come."""
        items = [
            WorkItem(
                order.name,
                partial(self._measure, _local(order), self._timeout),
                self._folder / _place(order),
                self._spent.get(order.name, 0) + order.attempt,
            )
            for order in orders
        ]
        array = bool(orders) and orders[0].kind in POPULATION
        for place, done in self._run(items, array):
            yield place, Outcome(reason=done.reason) if done.value is None else Outcome(**done.value)

    def run_winner(self, run: Run, run_dir: RunDir, turn: int) -> None:
        """Run the steps of a job, that of the winner, in a task of its own.

        Raises:
            StepError: with the reason, when it has failed twice.
        """
        here = on_node(run)
        name = f"winner-{turn}-{hashing.digest([asdict(here), str(run_dir.model)])[:8]}"
        for attempt in (1, 2):
            item = WorkItem(name, partial(finished, here, run_dir), run_dir.folder / "winner",
                        self._spent.get(name, 0) + attempt)  # fmt: skip
            ((_, done),) = self._run([item], array=False)
            if done.reason is None:
                return
        raise StepError(f"the winner: {done.reason}")

    def _run(self, items: Sequence[WorkItem], array: bool) -> Iterator[tuple[int, job_array.WorkResult]]:
        with ExitStack() as stack:
            self._batches.show = self.show or stack.enter_context(terminal.waiting())
            yield from self._batches.run(items, array)

    def close(self, at_once: bool = False) -> None:
        """End what is still running; what has finished is kept."""
        try:
            jobs = self._batches.cancel()
        except MergelabError as e:
            name = self._batches.ledger.name
            terminal.aside(
                f"Slurm does not answer, and its jobs go on ({e})\nTo end them: scancel --name={name}"
            )
            return
        if jobs:
            terminal.aside(f"cancelled Slurm job {', '.join(jobs)}")


def spent(of: JobArrayExecutor) -> dict[str, int]:
    """For each item the attempts that an earlier process has made in vain, in pairs: what failed twice
    and is asked for again was not written down as a failure, and is tried anew."""
    out = {}
    for name, attempts in of.failed().items():
        n = 0
        while {n + 1, n + 2} <= attempts:
            n += 2
        out[name] = n
    return out


def _place(order: EvaluationRequest) -> str:
    """The folder of a candidate's log."""
    return "preset" if order.number < 0 else str(order.number)


def _local(order: EvaluationRequest) -> EvaluationRequest:
    """An order as the task sees it, for which the node is here."""
    return replace(order, run=on_node(order.run))


def finished(run: Run, run_dir: RunDir) -> None:
    """Run the steps of a job, in a task."""
    run_job(run, replace(run_dir, scratch=node_local_cache.folder()))


def measured(order: EvaluationRequest, timeout: float | None) -> dict[str, Any]:
    """What came of an order, in a task: on the GPU of its rank."""
    return asdict(evaluate_here(order, timeout, int(os.environ.get("SLURM_LOCALID", 0))))
