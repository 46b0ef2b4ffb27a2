"""Evaluates a population: submits what is not known yet to the executor, and writes the journal's lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mergelab import evaluation
from mergelab.core.errors import StepError
from mergelab.evaluation import Measure, Score
from mergelab.optimization.candidate_evaluator import Outcome, Scores
from mergelab.optimization.executors.base import EvaluationRequest, Executor
from mergelab.optimization.gene import Genome
from mergelab.optimization.journal import Journal, OutOfOrderResults
from mergelab.optimization.request import Setup
from mergelab.optimization.retry import evaluate_with_retry
from mergelab.search_history import INITIAL

Watch = Callable[[str, Mapping[str, Any]], None]
"""Is called with each line of the journal: (event, line)."""

Line = Mapping[str, Any]
"""A line of the journal."""


class PopulationEvaluator:
    """Evaluates candidates and writes their lines.

    Args:
        setup: of the search.
        journal: where lines go.
        executor: evaluates what is not in the journal.
        watch: is called with each line.
    """

    def __init__(self, setup: Setup, journal: Journal, executor: Executor, watch: Watch):
        self._setup, self._journal, self._executor, self._watch = setup, journal, executor, watch
        self._early = OutOfOrderResults(journal.path.parent)
        self._by_genome: dict[str, Line] = {}

    def evaluate_initial(self) -> None:
        """Evaluate the initial point, once.

        Raises:
            StepError: when it cannot be measured.
        """
        if not self._journal.select(INITIAL):
            request = EvaluationRequest.initial(self._setup.run, self._setup.measures)
            ((_, outcome),) = evaluate_with_retry(self._executor, self._early, [request])
            if outcome.scores is None:
                raise StepError(f"the composed run itself cannot be measured: {outcome.reason}")
            self._journal.append(INITIAL, genome=self._setup.starts, **self._parts(outcome))
        self._watch(INITIAL, self._journal.select(INITIAL)[0])

    def evaluate_population(
        self, generation: int, first: int, genomes: Sequence[Genome], known: Mapping[int, Line]
    ) -> list[Line]:
        """The journal's lines of a population, in its order.

        Args:
            generation: its number.
            first: number of its first candidate.
            genomes: of its candidates.
            known: lines that are in the journal already, by number.
        """
        lines: dict[int, Line] = {}
        new: dict[int, Genome] = {}
        duplicates: dict[int, Genome] = {}
        seen: set[str] = set()
        for number, genome in enumerate(genomes, start=first):
            key = _key(genome)
            if number in known:
                lines[number] = known[number]
                self._remember(known[number])
                self._watch("candidate", known[number])
            elif key in self._by_genome or key in seen:
                duplicates[number] = genome
            else:
                new[number] = genome
            seen.add(key)
        lines |= self._evaluate(generation, new)
        for number, genome in duplicates.items():
            lines[number] = self._repeat(generation, number, genome)
        return [lines[n] for n in sorted(lines)]

    def _evaluate(self, generation: int, new: Mapping[int, Genome]) -> dict[int, Line]:
        """Lines of candidates that are evaluated now; with `search.fidelity` on all prompts only where they
        are promising."""
        chosen, screens = dict(new), dict[int, float]()
        lines: dict[int, Line] = {}
        if self._setup.run.search.fidelity.share < 1 and new:
            chosen, lines, screens = self._screen(generation, new)
        requests = [self._request(n, genome) for n, genome in chosen.items()]
        for request, outcome in evaluate_with_retry(self._executor, self._early, requests):
            n = request.number
            extra = {"screen": screens[n]} if n in screens else {}
            lines[n] = self._write_outcome(generation, n, chosen[n], outcome, **extra)
        return lines

    def _screen(
        self, generation: int, new: Mapping[int, Genome]
    ) -> tuple[dict[int, Genome], dict[int, Line], dict[int, float]]:
        """Measure all on few prompts.

        What was screened before a kill is in the journal, so that the choice is the same.

        Returns:
            those to be measured on all prompts, the lines of the others, and what the first had on few.
        """
        f = self._setup.run.search.fidelity
        screened = {x["number"]: x for x in self._journal.select("screen") if x["generation"] == generation}
        requests = [self._request(n, g, f.share, "screen") for n, g in new.items() if n not in screened]
        for request, outcome in evaluate_with_retry(self._executor, self._early, requests):
            parts = self._parts(outcome)
            screened[request.number] = self._journal.append(
                "screen",
                number=request.number,
                generation=generation,
                fitness=parts["fitness"],
                reason=parts["reason"],
            )
        usable = sorted((n for n in screened if screened[n]["fitness"] is not None),
                        key=lambda n: (-screened[n]["fitness"], n))  # fmt: skip
        promoted = set(usable[: max(1, round(f.promote * self._setup.population))])
        lines: dict[int, Line] = {}
        for n, genome in new.items():
            line = screened[n]
            if line["fitness"] is None:
                lines[n] = self._write_outcome(generation, n, genome, Outcome(reason=line["reason"]))
            elif n not in promoted:
                nothing = {"fitness": None, "scores": None, "reason": None}
                lines[n] = self._write(
                    generation, n, genome, status="screened", **nothing, screen=line["fitness"]
                )
        chosen = {n: g for n, g in new.items() if n in promoted}
        return chosen, lines, {n: screened[n]["fitness"] for n in promoted}

    def _request(
        self, number: int, genome: Genome, share: float = 1.0, kind: str = "candidate"
    ) -> EvaluationRequest:
        run = self._setup.compose(genome)
        return EvaluationRequest(number, run, self._setup.measures, share, kind)

    def _parts(self, outcome: Outcome) -> dict[str, Any]:
        """Fitness, scores and reason of an outcome."""
        if outcome.scores is None:
            return {"fitness": None, "scores": None, "reason": outcome.reason}
        return {
            "fitness": fitness(outcome.scores, self._setup.measures),
            "scores": outcome.scores,
            "reason": None,
        }

    def _write_outcome(
        self, generation: int, number: int, genome: Genome, outcome: Outcome, **extra: Any
    ) -> Line:
        status = "failed" if outcome.scores is None else "done"
        return self._write(generation, number, genome, status=status, **self._parts(outcome), **extra)

    def _repeat(self, generation: int, number: int, genome: Genome) -> Line:
        """Write the line of a candidate whose genome was evaluated before."""
        line = self._by_genome[_key(genome)]
        same = {k: line[k] for k in ("fitness", "scores", "reason")}
        extra = {"screen": line["screen"]} if "screen" in line else {}
        status = "repeated" if line["fitness"] is not None else line["status"]
        return self._write(generation, number, genome, status=status, of=line["number"], **same, **extra)

    def _write(self, generation: int, number: int, genome: Genome, **parts: Any) -> Line:
        line = self._journal.append("candidate", number=number, generation=generation, genome=genome, **parts)
        self._remember(line)
        self._watch("candidate", line)
        return line

    def _remember(self, line: Line) -> None:
        self._by_genome.setdefault(_key(line["genome"]), line)


def fitness(scores: Scores, measures: Sequence[Measure]) -> float:
    """The mean of scores weighted by share.

    Args:
        scores: each as a mapping.
        measures: what they are of.
    """
    return evaluation.fitness({name: Score(**s) for name, s in scores.items()}, measures)


def _key(genome: Mapping[str, Any]) -> str:
    return json.dumps(genome, sort_keys=True, ensure_ascii=False)
