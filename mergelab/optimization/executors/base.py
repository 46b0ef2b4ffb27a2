"""What evaluates candidates: the protocol `Executor`, and the request that it is handed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from mergelab.core.run_dir import RunDir
from mergelab.evaluation import Measure
from mergelab.optimization.candidate_evaluator import CandidateEvaluator, Outcome, finite, run_guarded
from mergelab.schema import Run
from mergelab.search_history import INITIAL


@dataclass(frozen=True)
class EvaluationRequest:
    """A candidate to be merged and measured."""

    number: int
    """-1: the initial point."""
    run: Run
    measures: Sequence[Measure]
    share: float = 1.0
    """Of each task's prompts."""
    kind: str = "candidate"
    """`candidate`, `screen` (on few prompts), `validate` (a finalist) or `INITIAL`."""
    attempt: int = 1

    @property
    def name(self) -> str:
        """Unique in the search, and the same in every process that resumes it."""
        return f"{self.kind}{self.number}"

    @classmethod
    def initial(cls, run: Run, measures: Sequence[Measure]) -> EvaluationRequest:
        """The request for the initial point."""
        return cls(-1, run, measures, kind=INITIAL)


class Executor(Protocol):
    """Evaluates candidates, and merges the winner.

    Attributes:
        show: receives a line on what is being waited for; None where nobody shows it.
    """

    show: Callable[[str], None] | None

    def evaluate(self, requests: Sequence[EvaluationRequest]) -> Iterator[tuple[int, Outcome]]:
        """Evaluate a population.

        Yields:
            each outcome as soon as it is there, with the index of its request.
        """

    def run_winner(self, run: Run, run_dir: RunDir, turn: int) -> None:
        """Run the steps of the winner's job: merge to disk, verify, measure.

        Args:
            run: the winner's run.
            run_dir: where it goes.
            turn: how many winners the search has had before.
        Raises:
            StepError: when it fails.
        """

    def close(self, at_once: bool = False) -> None:
        """Release everything.

        Args:
            at_once: whether to abort what is being evaluated.
        """


def evaluate_in_process(
    evaluators: dict[str, CandidateEvaluator],
    request: EvaluationRequest,
    timeout: float | None,
    device: int | None = None,
) -> Outcome:
    """Evaluate a request in this process.

    Args:
        evaluators: what this process has loaded, by its models; it keeps it for the next request.
        request: what to evaluate.
        timeout: seconds that it may take.
        device: the GPU to use, counted from the run's own; None: the run's own.
    """
    kind, _, first = request.run.hardware.device.partition(":")
    if kind != "cpu" and device is not None:
        hardware = replace(request.run.hardware, device=f"{kind}:{int(first or 0) + device}")
        request = replace(request, run=replace(request.run, hardware=hardware))

    def scores() -> dict[str, dict[str, object]]:
        key = _models(request.run)
        if key not in evaluators:
            evaluators.clear()  # memory holds one set of models at a time
            evaluators[key] = CandidateEvaluator(request.run)
        return finite(evaluators[key].measure(request.run, request.measures, request.share))

    return run_guarded(scores, timeout)


def _models(run: Run) -> str:
    """What an evaluator has loaded, as a text: runs of one text share one."""
    experts = [(name, e.path, e.revision) for name, e in run.experts.items()]
    return repr((run.model, experts, run.method.base, run.hardware, run.eval, run.seed))
