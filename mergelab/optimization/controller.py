"""The ask/tell loop of a search: ask for a population, evaluate it, write the journal, tell the optimizer.

The journal is the only state. What it holds is not evaluated again, and the optimizer, which is asked and
told the same things once more, returns to the same state: to resume is to replay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergelab.core.errors import InputError, StepError
from mergelab.optimization.executors.base import Executor
from mergelab.optimization.journal import Journal
from mergelab.optimization.optimizer import Optimizer
from mergelab.optimization.population_evaluator import PopulationEvaluator, Watch
from mergelab.optimization.request import Setup
from mergelab.search_history import objectives


class TooManyFailures(StepError):
    """More candidates of a population failed than `search.max_failure_rate` allows."""


def evolve(setup: Setup, journal: Journal, executor: Executor, watch: Watch) -> None:
    """Bring the journal from wherever it is to the end of the budget.

    Args:
        setup: of the search.
        journal: begun.
        executor: evaluates the candidates.
        watch: is called with each line of the journal, and at the end of each generation.
    Raises:
        TooManyFailures: with the reasons.
        InputError: where the journal's genomes are not those that the optimizer asks for.
    """
    known = {line["number"]: line for line in journal.select("candidate")}
    optimizer = Optimizer(setup.run.search, setup.genes, setup.starts, setup.population)
    evaluator = PopulationEvaluator(setup, journal, executor, watch)
    evaluator.evaluate_initial()
    for generation in range(setup.generations):
        genomes = optimizer.ask()
        first = generation * setup.population
        for number, genome in enumerate(genomes, start=first):
            if number in known and known[number]["genome"] != genome:
                raise InputError(
                    f"{journal.path}: candidate {number} in it is not the one that "
                    f"{setup.run.search.optimizer} asks for now\n"
                    "This optimizer depends on the budget, which has changed. Start a new search elsewhere: "
                    "hydra.sweep.dir=DIR"
                )
        lines = evaluator.evaluate_population(generation, first, genomes, known)
        _stop_on_failures(setup, generation, lines)
        optimizer.tell([_values(setup, line, lines) for line in lines])
        watch("generation", {"generation": generation, "lines": lines})


def _values(setup: Setup, line: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """What the optimizer is told of a candidate. One that was only screened is told to be no better than any
    that was measured on all prompts."""
    if line["fitness"] is None and line.get("screen") is None:
        return None
    if line["fitness"] is None:
        full = [x["fitness"] for x in lines if x["fitness"] is not None]
        return [min([line["screen"], *full])]
    names = setup.run.search.objectives
    return objectives(line["scores"], names) if names else [line["fitness"]]


def _stop_on_failures(setup: Setup, generation: int, lines: Sequence[Mapping[str, Any]]) -> None:
    failed = [line for line in lines if line["status"] == "failed"]
    if len(failed) <= setup.run.search.max_failure_rate * len(lines):
        return
    reasons: dict[str, int] = {}
    for line in failed:
        reasons[line["reason"]] = reasons.get(line["reason"], 0) + 1
    listed = "\n".join(f"{n} times: {r}" if n > 1 else r for r, n in list(reasons.items())[:5])
    raise TooManyFailures(
        f"generation {generation}: {len(failed)} of {len(lines)} candidates failed, more than "
        f"search.max_failure_rate={setup.run.search.max_failure_rate:g} allows\n{listed}\n"
        "To resume: raise search.max_failure_rate and run the same command again (failed candidates stay "
        "failed), or remove the cause and start a new search in another folder."
    )
