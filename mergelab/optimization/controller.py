"""The loop of a sweep: ask a population, have it measured, tell, and write down all of it first.

The journal is the only state. What it knows is not measured again, and the optimizer, which is asked
and told the same once more, comes to the same place: resuming is replaying.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mergelab import evaluation
from mergelab.core.errors import InputError, StepError
from mergelab.evaluation import Measure, Score
from mergelab.optimization.candidate_evaluator import Outcome, Scores
from mergelab.optimization.executors.processes import EvaluationRequest, Executor
from mergelab.optimization.journal import Journal, OutOfOrderResults
from mergelab.optimization.optimizer import Optimizer, generations, objectives
from mergelab.optimization.search_space import Gene, Genome
from mergelab.schema import Run

Compose = Callable[[Genome], Run]
Watch = Callable[[str, Mapping[str, Any]], None]
"""Told of each line of the journal: (event, line)."""


@dataclass(frozen=True)
class Setup:
    """What a sweep is made of."""

    run: Run
    """The composed run that it starts from."""
    genes: Sequence[Gene]
    starts: Genome
    population: int
    measures: Sequence[Measure]
    compose: Compose
    """From a genome to the candidate's run."""

    @property
    def generations(self) -> int:
        """Whole populations that the budget pays for."""
        return generations(self.run.search, self.population)

    @property
    def budget(self) -> int:
        """Candidates in all."""
        return self.generations * self.population


class TooManyFailures(StepError):
    """More of a population has failed than `search.max_failure_rate` allows."""


def evolve(setup: Setup, journal: Journal, workers: Executor, watch: Watch) -> None:
    """Bring the journal to the end of the budget, from wherever it is.

    Raises:
        TooManyFailures: with the reasons.
        InputError: where the journal's genomes are not those that the optimizer asks.
    """
    known = {line["number"]: line for line in journal.select("candidate")}
    optimizer = Optimizer(setup.run.search, setup.genes, setup.starts, setup.population)
    measured = PopulationEvaluator(setup, journal, workers, watch)
    measured.preset()
    for generation in range(setup.generations):
        genomes = optimizer.ask()
        first = generation * setup.population
        for number, genome in enumerate(genomes, start=first):
            if number in known and known[number]["genome"] != genome:
                raise InputError(
                    f"{journal.path}: candidate {number} there is not the one that "
                    f"{setup.run.search.optimizer} asks for now\nIt looks at the budget, which has changed. "
                    "Start anew elsewhere: hydra.sweep.dir=DIR"
                )
        lines = measured.generation(generation, first, genomes, known)
        _stop_on_failures(setup, generation, lines)
        optimizer.tell([_told(setup, line, lines) for line in lines])
        watch("generation", {"generation": generation, "lines": lines})


def _told(setup: Setup, line: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """What the optimizer hears of a candidate; of one that was only screened, that it is no better than
    any that was measured on all prompts."""
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
    told = "\n".join(f"{n} times: {r}" if n > 1 else r for r, n in list(reasons.items())[:5])
    raise TooManyFailures(
        f"generation {generation}: {len(failed)} of {len(lines)} candidates failed, more than "
        f"search.max_failure_rate={setup.run.search.max_failure_rate:g} allows\n{told}\n"
        "To go on: raise search.max_failure_rate and run the same command again (what has failed counts "
        "as failed), or mend the cause and start anew in another folder."
    )


class PopulationEvaluator:
    """Measures candidates and writes down what came of it."""

    def __init__(self, setup: Setup, journal: Journal, workers: Executor, watch: Watch):
        self.setup, self.journal, self.workers, self.watch = setup, journal, workers, watch
        self.early = OutOfOrderResults(journal.path.parent)
        self._by_genome: dict[str, Mapping[str, Any]] = {}

    def preset(self) -> None:
        """The composed run as it is, once."""
        if not self.journal.select("preset"):
            run = self.setup.run
            ((_, outcome),) = evaluate_with_retry(
                self.workers, self.early, [EvaluationRequest(-1, run, self.setup.measures, kind="preset")]
            )
            if outcome.scores is None:
                raise StepError(f"the composed run itself cannot be measured: {outcome.reason}")
            self._write("preset", genome=self.setup.starts, **self._parts(outcome))
        self.watch("preset", self.journal.select("preset")[0])

    def generation(
        self, generation: int, first: int, genomes: Sequence[Genome], known: Mapping[int, Mapping[str, Any]]
    ) -> list[Mapping[str, Any]]:
        """The journal's lines of a population, in its order."""
        lines: dict[int, Mapping[str, Any]] = {}
        new: dict[int, Genome] = {}
        twins: dict[int, Genome] = {}
        here: set[str] = set()
        for number, genome in enumerate(genomes, start=first):
            text = _key(genome)
            if number in known:
                lines[number] = known[number]
                self._remember(known[number])
                self.watch("candidate", known[number])
            elif text in self._by_genome or text in here:
                twins[number] = genome
            else:
                new[number] = genome
            here.add(text)
        for number, line in self._measure(generation, new, lines):
            lines[number] = line
        for number, genome in twins.items():
            lines[number] = self._repeat(generation, number, genome)
        return [lines[n] for n in sorted(lines)]

    def _measure(
        self, generation: int, new: Mapping[int, Genome], known: Mapping[int, Mapping[str, Any]]
    ) -> list[tuple[int, Mapping[str, Any]]]:
        share = self.setup.run.search.fidelity.share
        chosen, screens = dict(new), dict[int, float]()
        out: list[tuple[int, Mapping[str, Any]]] = []
        if share < 1 and new:
            chosen, out, screens = self._screened(generation, new, known)
        orders = [EvaluationRequest(n, self.setup.compose(g), self.setup.measures) for n, g in chosen.items()]
        for order, outcome in evaluate_with_retry(self.workers, self.early, orders):
            number = order.number
            extra = {"screen": screens[number]} if number in screens else {}
            out.append((number, self._candidate(generation, number, chosen[number], outcome, **extra)))
        return out

    def _screened(
        self, generation: int, new: Mapping[int, Genome], known: Mapping[int, Mapping[str, Any]]
    ) -> tuple[dict[int, Genome], list[tuple[int, Mapping[str, Any]]], dict[int, float]]:
        """Those worth measuring on all prompts, the lines of the others, and what each had on few.

        What was screened before a kill is in the journal, so that the choice comes out the same.
        """
        f = self.setup.run.search.fidelity
        before = {x["number"]: x for x in self.journal.select("screen") if x["generation"] == generation}
        orders = [EvaluationRequest(n, self.setup.compose(g), self.setup.measures, f.share, "screen")
                  for n, g in new.items() if n not in before]  # fmt: skip
        for order, outcome in evaluate_with_retry(self.workers, self.early, orders):
            number = order.number
            parts = self._parts(outcome)
            before[number] = self._write(
                "screen",
                number=number,
                generation=generation,
                fitness=parts["fitness"],
                reason=parts["reason"],
            )
        sound = sorted((n for n in before if before[n]["fitness"] is not None),
                       key=lambda n: (-before[n]["fitness"], n))  # fmt: skip
        wanted = set(sound[: max(1, round(f.promote * self.setup.population))])
        out: list[tuple[int, Mapping[str, Any]]] = []
        for n, genome in new.items():
            line = before[n]
            if line["fitness"] is None:
                out.append((n, self._candidate(generation, n, genome, Outcome(reason=line["reason"]))))
            elif n not in wanted:
                nothing = {"fitness": None, "scores": None, "reason": None}
                told = self._write_candidate(
                    generation, n, genome, status="screened", **nothing, screen=line["fitness"]
                )
                out.append((n, told))
        chosen = {n: g for n, g in new.items() if n in wanted}
        return chosen, out, {n: before[n]["fitness"] for n in wanted}

    def _candidate(
        self, generation: int, number: int, genome: Genome, outcome: Outcome, **extra: Any
    ) -> dict[str, Any]:
        return self._write_candidate(
            generation, number, genome, status="failed" if outcome.scores is None else "done",
            **self._parts(outcome), **extra,
        )  # fmt: skip

    def _repeat(self, generation: int, number: int, genome: Genome) -> dict[str, Any]:
        line = self._by_genome[_key(genome)]
        same = {k: line[k] for k in ("fitness", "scores", "reason")}
        extra = {"screen": line["screen"]} if "screen" in line else {}
        status = "repeated" if line["fitness"] is not None else line["status"]
        return self._write_candidate(
            generation, number, genome, status=status, of=line["number"], **same, **extra
        )

    def _parts(self, outcome: Outcome) -> dict[str, Any]:
        """Fitness, scores and reason of an outcome."""
        if outcome.scores is None:
            return {"fitness": None, "scores": None, "reason": outcome.reason}
        return {
            "fitness": fitness(outcome.scores, self.setup.measures),
            "scores": outcome.scores,
            "reason": None,
        }

    def _write_candidate(self, generation: int, number: int, genome: Genome, **parts: Any) -> dict[str, Any]:
        line = self._write("candidate", number=number, generation=generation, genome=genome, **parts)
        self._remember(line)
        self.watch("candidate", line)
        return line

    def _remember(self, line: Mapping[str, Any]) -> None:
        self._by_genome.setdefault(_key(line["genome"]), line)

    def _write(self, event: str, **data: Any) -> dict[str, Any]:
        return self.journal.append(event, **data)


def evaluate_with_retry(
    workers: Executor, early: OutOfOrderResults, orders: Sequence[EvaluationRequest]
) -> Iterator[tuple[EvaluationRequest, Outcome]]:
    """The outcome of each order, in their order; what fails is tried once more, when all others are
    done. What comes before its turn waits on the disk, and what waits there is not done again.

    Args:
        early: where it waits.
    """
    ready: dict[int, Outcome] = {}
    for place, order in enumerate(orders):
        if kept := early.found(order.name):
            ready[place] = Outcome(**kept)
    turn = 0
    for place, outcome in _worked(workers, orders, [p for p in range(len(orders)) if p not in ready]):
        ready[place] = outcome
        if place != turn:
            early.keep(orders[place].name, asdict(outcome))
        while turn in ready:
            yield orders[turn], ready.pop(turn)
            turn += 1
    while turn in ready:
        yield orders[turn], ready.pop(turn)
        turn += 1
    early.clear(order.name for order in orders)


def _worked(
    workers: Executor, orders: Sequence[EvaluationRequest], places: Sequence[int]
) -> Iterator[tuple[int, Outcome]]:
    failed: list[int] = []
    for i, outcome in workers.work([orders[p] for p in places]):
        if outcome.scores is None:
            failed.append(places[i])
        else:
            yield places[i], outcome
    failed.sort()
    for i, outcome in workers.work([replace(orders[p], attempt=2) for p in failed]) if failed else ():
        yield failed[i], outcome


def fitness(scores: Scores, measures: Sequence[Measure]) -> float:
    """The mean of scores weighted by share, from their mappings."""
    return evaluation.fitness({name: Score(**s) for name, s in scores.items()}, measures)


def _key(genome: Mapping[str, Any]) -> str:
    return json.dumps(genome, sort_keys=True, ensure_ascii=False)


def best(journal: Journal) -> list[dict[str, Any]]:
    """Candidates that were measured on all prompts, the fittest first, each genome once."""
    measured = [line for line in journal.select("candidate") if line["status"] == "done"]
    return sorted(measured, key=lambda line: (-line["fitness"], line["number"]))


def front(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Mapping[str, Any]]:
    """Those that no other is better than in one objective and no worse in all (the Pareto front)."""
    points = [(line, objectives(line["scores"], names)) for line in lines]
    return [
        line
        for line, mine in points
        if not any(
            all(t >= m for t, m in zip(other, mine, strict=True)) and other != mine for _, other in points
        )
    ]
