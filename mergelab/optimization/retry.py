"""Evaluates requests, each that fails once more, and returns the outcomes in the order of the requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from mergelab.optimization.candidate_evaluator import Outcome
from mergelab.optimization.executors.base import EvaluationRequest, Executor
from mergelab.optimization.journal import OutOfOrderResults


def evaluate_with_retry(
    executor: Executor, early: OutOfOrderResults, requests: Sequence[EvaluationRequest]
) -> Iterator[tuple[EvaluationRequest, Outcome]]:
    """Evaluate requests. One that fails is retried once, after all others are done.

    Args:
        executor: evaluates them.
        early: keeps on the disk what is ready before its turn; what is kept there is not evaluated again.
        requests: what to evaluate.
    Yields:
        each request with its outcome, in their order.
    """
    ready: dict[int, Outcome] = {}
    for index, request in enumerate(requests):
        if kept := early.found(request.name):
            ready[index] = Outcome(**kept)
    turn = 0
    for index, outcome in _evaluate_twice(
        executor, requests, [i for i in range(len(requests)) if i not in ready]
    ):
        ready[index] = outcome
        if index != turn:
            early.keep(requests[index].name, asdict(outcome))
        while turn in ready:
            yield requests[turn], ready.pop(turn)
            turn += 1
    while turn in ready:
        yield requests[turn], ready.pop(turn)
        turn += 1
    early.clear(request.name for request in requests)


def _evaluate_twice(
    executor: Executor, requests: Sequence[EvaluationRequest], indices: Sequence[int]
) -> Iterator[tuple[int, Outcome]]:
    """Outcomes as they are ready: successes first, then those of the second attempts."""
    failed: list[int] = []
    for i, outcome in executor.evaluate([requests[index] for index in indices]):
        if outcome.scores is None:
            failed.append(indices[i])
        else:
            yield indices[i], outcome
    failed.sort()
    again = [replace(requests[index], attempt=2) for index in failed]
    for i, outcome in executor.evaluate(again) if failed else ():
        yield failed[i], outcome
