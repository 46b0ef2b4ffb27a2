"""Evaluates candidates in this process, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from mergelab.core.run_dir import RunDir
from mergelab.jobs.run_job import run_job
from mergelab.optimization.candidate_evaluator import CandidateEvaluator, Outcome
from mergelab.optimization.executors.base import EvaluationRequest, evaluate_in_process
from mergelab.schema import Run


class InlineExecutor:
    """An `Executor` that is this process.

    Args:
        timeout: seconds that a candidate may take.
    """

    def __init__(self, timeout: float | None):
        self.show: Callable[[str], None] | None = None
        self._timeout = timeout
        self._evaluators: dict[str, CandidateEvaluator] = {}

    def evaluate(self, requests: Sequence[EvaluationRequest]) -> Iterator[tuple[int, Outcome]]:
        """Evaluate a population in its order."""
        for index, request in enumerate(requests):
            yield index, evaluate_in_process(self._evaluators, request, self._timeout)

    def run_winner(self, run: Run, run_dir: RunDir, turn: int) -> None:
        """Run the winner's job, after the models of the candidates are released."""
        self._evaluators.clear()
        run_job(run, run_dir)

    def close(self, at_once: bool = False) -> None:
        """Release the models."""
        self._evaluators.clear()
