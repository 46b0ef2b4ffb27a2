"""A search without models: the controller with workers that answer as a test wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from composing import composed

from mergelab.core.run_dir import RunDir, write_json
from mergelab.evaluation import Measure, Score
from mergelab.methods import registry
from mergelab.optimization import search_space
from mergelab.optimization.candidate_evaluator import Outcome
from mergelab.optimization.controller import evolve
from mergelab.optimization.executors.base import EvaluationRequest
from mergelab.optimization.finalize import finalize
from mergelab.optimization.journal import Journal
from mergelab.optimization.request import Setup
from mergelab.schema import Run

MEASURES = [Measure("math", "tiny_math_search", None), Measure("code", "tiny_code_search", None)]


def scores(math: float, code: float) -> dict[str, Any]:
    """The scores of a candidate."""
    return {name: asdict(Score(value, 0.01, 100, "exact_match", True, f"tiny_{name}_search"))
            for name, value in (("math", math), ("code", code))}  # fmt: skip


def setup_of(*overrides: str, population: int = 4, **search: Any) -> Setup:
    """A search over the composed run."""
    run = _base(overrides)
    run = replace(run, search=replace(run.search, **{"budget": 12, **search}))
    takes = registry.get(run.method.name).used
    genes = search_space.genes(run.search.space, run, takes)
    starts = {g.key: search_space.start(run, g) for g in genes}
    return Setup(run, genes, starts, population, MEASURES, lambda genome: search_space.apply(run, genome))


@cache
def _base(overrides: tuple[str, ...]) -> Run:
    return composed("search=cma", *overrides)


def smooth(run: Run) -> dict[str, Any]:
    """Best where weights are 1."""
    weights = [e.weight for e in run.experts.values()]
    value = 1 - sum((w - 1) ** 2 for w in weights if isinstance(w, float)) / 10
    return scores(value, value / 2)


class Pretended:
    """Workers that answer from a function, and remember what they were asked.

    Args:
        answer: from an order to an outcome, scores, a reason, or an exception that is raised.
        last_first: whether outcomes come in the reverse of the orders.
    """

    def __init__(self, answer: Callable[[EvaluationRequest], Any] | None = None, last_first: bool = False):
        self._answer = answer or (lambda order: smooth(order.run))
        self._last_first = last_first
        self.asked: list[EvaluationRequest] = []

    def evaluate(self, requests: Sequence[EvaluationRequest]) -> Iterator[tuple[int, Outcome]]:
        """As `Executor` says."""
        for index in sorted(range(len(requests)), reverse=self._last_first):
            self.asked.append(requests[index])
            answer = self._answer(requests[index])
            if isinstance(answer, BaseException):
                raise answer
            if isinstance(answer, str):
                answer = Outcome(reason=answer)
            yield index, answer if isinstance(answer, Outcome) else Outcome(scores=answer)

    def run_winner(self, run: Run, run_dir: RunDir, turn: int) -> None:
        """As `Executor` says, of a model that is a small file."""
        if "merge" in run.job.steps:
            with run_dir.staging() as partial:
                write_json(partial / "config.json", {name: asdict(e) for name, e in run.experts.items()})
                partial.rename(run_dir.model)
        told = smooth(run)
        run_dir.record({"metrics": {"merged": {"search": told, "validation": told}}})

    def close(self, at_once: bool = False) -> None:
        """As `Executor` says."""

    @property
    def numbers(self) -> list[int]:
        """The numbers of all orders but the preset's."""
        return [o.number for o in self.asked if o.number >= 0]


def cut_off(after: int) -> Callable[[EvaluationRequest], Any]:
    """Answers so many orders, and is then interrupted."""
    left = after

    def answer(order: EvaluationRequest) -> Any:
        nonlocal left
        left -= 1
        return KeyboardInterrupt() if left < 0 else smooth(order.run)

    return answer


def evolved(folder: Path, setup: Setup, workers: Pretended) -> Journal:
    """The journal of a search, gone on with or begun."""
    folder.mkdir(exist_ok=True)
    journal = Journal(folder)
    if journal.begin is None:
        journal.append("begin", schema=1)
    evolve(setup, journal, workers, lambda event, line: None)
    return journal


def settled(folder: Path, setup: Setup, workers: Pretended) -> None:
    """A search to its very end, gone on with or begun."""
    journal = evolved(folder, setup, workers)
    finalize(setup, None, journal, RunDir(folder, folder / "model"), workers, "the command")  # type: ignore[arg-type]


def genomes(journal: Journal) -> list[Mapping[str, Any]]:
    """In the order of the journal."""
    return [line["genome"] for line in journal.select("candidate")]
