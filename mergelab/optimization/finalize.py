"""The end of a search: validate the finalists, write the winner's model, the result and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergelab import evaluation
from mergelab.core.errors import StepError
from mergelab.core.run_dir import RunDir, write_json
from mergelab.optimization import search_result
from mergelab.optimization.executors.base import EvaluationRequest, Executor
from mergelab.optimization.journal import Journal, OutOfOrderResults
from mergelab.optimization.request import Setup
from mergelab.optimization.retry import evaluate_with_retry
from mergelab.optimization.winner import candidate_run, write_winner
from mergelab.preflight import Plan
from mergelab.report import terminal
from mergelab.search_history import INITIAL, objectives, pareto_front

Line = Mapping[str, Any]
"""A line of the journal."""


def finalize(
    setup: Setup, plan: Plan, journal: Journal, run_dir: RunDir, executor: Executor, command: str
) -> float | None:
    """Bring a search whose budget is spent to its result; resumes where an earlier process was cut short.

    Returns:
        the winner's fitness, None with several objectives.
    Raises:
        StepError: when no candidate could be measured, or the winner on the disk does not score what it
            scored in memory.
    """
    ranked = [line for line in by_fitness(journal) if line["number"] < setup.budget]
    if not ranked:
        raise StepError("no candidate could be measured")
    initial = journal.select(INITIAL)[0]
    names = setup.run.search.objectives
    leading = on_front(ranked, names) if names else ranked
    winner = None if names else (ranked[0] if ranked[0]["fitness"] > initial["fitness"] else initial)
    finalists = _distinct([initial, *([winner] if winner else []), *leading[: setup.run.search.finalists]])
    with terminal.step("validate") as done:
        validated = _validate(setup, journal, executor, finalists)
        done(f"{len(finalists)} models on the validation split")
    on_disk = write_winner(setup, journal, run_dir, executor, winner, command)
    metrics = search_result.metrics(setup, on_disk, finalists, validated, winner)
    result = search_result.build(setup, journal, run_dir, metrics, winner, leading, command)
    write_json(run_dir.result, result)
    with terminal.step("report") as done:
        from mergelab.report.evolution import write_report  # late: matplotlib takes seconds

        write_report(run_dir.folder, journal.lines, result)
        done("report/index.html")
    search_result.show(run_dir, result)
    if winner is not None and result["on_disk"] != result["winner"]["fitness"]:
        raise StepError(
            f"the winner's fitness is {winner['fitness']:.4f} in memory and {result['on_disk']:.4f} when "
            "merged to disk\nDo not trust this search before you know why; mergelab.log has what was logged."
        )
    return None if winner is None else float(winner["fitness"])


def by_fitness(journal: Journal) -> list[dict[str, Any]]:
    """Candidates that were measured on all prompts, the fittest first, each genome once."""
    measured = [line for line in journal.select("candidate") if line["status"] == "done"]
    return sorted(measured, key=lambda line: (-line["fitness"], line["number"]))


def on_front(lines: Sequence[Line], names: Sequence[str]) -> list[Line]:
    """The lines on the Pareto front of some objectives."""
    points = {i: v for i, line in enumerate(lines) if (v := objectives(line["scores"], names)) is not None}
    return [lines[i] for i in pareto_front(points)]


def _distinct(lines: Sequence[Line]) -> list[Line]:
    """Each line once, in order."""
    return list({line.get("number", INITIAL): line for line in lines}.values())


def _validate(
    setup: Setup, journal: Journal, executor: Executor, finalists: Sequence[Line]
) -> dict[str, dict[str, Any]]:
    """Scores on the validation split by row; what is in the journal is not measured again."""
    known = {line["name"]: line["scores"] for line in journal.select("validated")}
    measures = evaluation.measures(setup.run, "validation")
    left = {line.get("number", -1): line for line in finalists if search_result.row(line) not in known}
    requests = [
        EvaluationRequest(n, candidate_run(setup, line), measures, kind="validate")
        for n, line in left.items()
    ]
    early = OutOfOrderResults(journal.path.parent)
    for request, outcome in evaluate_with_retry(executor, early, requests):
        name = search_result.row(left[request.number])
        if outcome.scores is None:
            raise StepError(f"{name} cannot be measured on the validation split: {outcome.reason}")
        known[name] = journal.append("validated", name=name, scores=outcome.scores)["scores"]
    early.end()
    return {search_result.row(line): known[search_result.row(line)] for line in finalists}
