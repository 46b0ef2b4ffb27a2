"""What the pictures and tables of a search show, out of its journal and result. Nothing here draws."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergelab.report import score_table

Rows = list[list[Any]]
"""A table: its heads, then its lines."""

TREES, SHUFFLES = 200, 10
"""Of the forest that tells importance: enough that another seed hardly moves a bar."""


@dataclass(frozen=True)
class Gene:
    """One parameter of the search."""

    key: str
    label: str
    space: str
    """The values that it may have, as configured; empty where that is unknown."""
    categories: tuple[str, ...]
    """Of a choice, in alphabetical order; none for a number."""
    low: float
    high: float
    logarithmic: bool

    def place(self, genome: Mapping[str, Any]) -> float:
        """Its value in a genome as a number: a choice's place among the categories; NaN where it has none."""
        value = genome.get(self.key)
        if self.categories:
            return float(self.categories.index(str(value))) if str(value) in self.categories else math.nan
        return _known(_number(value))

    def height(self, genome: Mapping[str, Any]) -> float:
        """Where its value lies between its lowest, 0, and its highest, 1."""
        low, high, at = self.low, self.high, self.place(genome)
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(at) if at > 0 else math.nan
        return (at - low) / (high - low)


@dataclass(frozen=True)
class Candidate:
    """One genome that the search tried."""

    number: int
    generation: int
    status: str
    fitness: float | None
    merit: float
    """What candidates are compared by, higher is better, or NaN: see `Evolution.merit`."""
    scores: Mapping[str, Any]
    genome: Mapping[str, Any]
    reason: str
    of: int | None
    """The candidate that this one repeats."""


@dataclass(frozen=True)
class Generation:
    """The candidates of one generation together; NaN where none could be compared."""

    number: int
    best: float
    mean: float
    best_so_far: float
    failed: int
    repeated: int


@dataclass(frozen=True)
class Evolution:
    """A search as the report sees it."""

    genes: list[Gene]
    candidates: list[Candidate]
    merit: str
    """The name of what candidates are compared by: the fitness, or the first objective without one."""
    objectives: list[str]
    winner: Candidate | None
    """The best so far while the search runs; None where several objectives leave no single one."""
    finished: bool
    preset: Mapping[str, Any]
    baselines: dict[str, float]
    """What the search has to beat: their fitness by name."""
    front: list[int]
    preset_scores: Mapping[str, Any]

    @property
    def several(self) -> bool:
        """Whether there is more than one objective, hence a front in the place of a winner."""
        return len(self.objectives) > 1

    @property
    def measured(self) -> list[Candidate]:
        """The candidates that can be compared."""
        return [c for c in self.candidates if not math.isnan(c.merit)]

    def higher_is_better(self, objective: str) -> bool:
        """Of an objective; so it is where nothing has been measured."""
        found = [c.scores[objective] for c in self.candidates if objective in c.scores]
        return all(s.get("higher_is_better", True) for s in found)


def read(journal: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> Evolution:
    """The search behind a journal and a result. A candidate told twice counts as told last."""
    search = result.get("search") or {}
    objectives = [str(o) for o in search.get("objectives") or []]
    events = {int(e["number"]): e for e in journal if e.get("event") == "candidate"}
    by_fitness = len(objectives) < 2 or any(_number(e.get("fitness")) is not None for e in events.values())
    candidates = [_candidate(events[n], None if by_fitness else objectives[0]) for n in sorted(events)]
    preset = result.get("preset") or {}
    named = {"preset": preset, "random search": result.get("random") or {}}
    fitnesses = {n: _number(of.get("fitness")) for n, of in named.items()}
    genomes = [c.genome for c in candidates]
    told = result.get("pareto")
    return Evolution(
        genes=_genes(search.get("space") or {}, [*genomes, preset.get("genome") or {}]),
        candidates=candidates,
        merit="fitness" if by_fitness else objectives[0],
        objectives=objectives,
        winner=_winner(candidates, result, len(objectives) > 1),
        finished=result.get("status") == "done",
        preset=preset.get("genome") or {},
        baselines={n: f for n, f in fitnesses.items() if f is not None and by_fitness},
        front=[int(n) for n in told] if told is not None else front(candidates, objectives),
        preset_scores=_preset_scores(preset, result, candidates),
    )


def _number(value: Any) -> float | None:
    """A finite number, or None: a measure may have failed to give one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _known(value: float | None) -> float:
    """NaN in the place of None."""
    return math.nan if value is None else value


def _candidate(event: Mapping[str, Any], objective: str | None) -> Candidate:
    fitness, found = _number(event.get("fitness")), event.get("scores") or {}
    return Candidate(
        number=int(event["number"]),
        generation=int(event.get("generation") or 0),
        status=str(event.get("status", "")),
        fitness=fitness,
        merit=_known(fitness if objective is None else aim(found, objective)),
        scores=found,
        genome=event.get("genome") or {},
        reason=str(event.get("reason") or ""),
        of=event.get("of"),
    )


def aim(found: Mapping[str, Any], objective: str) -> float | None:
    """An objective's value such that higher is better."""
    score = found.get(objective) or {}
    value = _number(score.get("value"))
    return value if value is None or score.get("higher_is_better", True) else -value


def _aims(candidate: Candidate, objectives: Sequence[str]) -> list[float] | None:
    """All objectives of a candidate, higher is better; None unless each was measured."""
    found = [aim(candidate.scores, o) if o in candidate.scores else None for o in objectives]
    known = [f for f in found if f is not None]
    return known if len(known) == len(found) else None


def front(candidates: Sequence[Candidate], objectives: Sequence[str]) -> list[int]:
    """The candidates that no other equals in every objective and surpasses in one."""
    if len(objectives) < 2:
        return []
    known = {c.number: a for c in candidates if c.status == "done" and (a := _aims(c, objectives))}

    def surpassed(own: list[float]) -> bool:
        return any(a != own and all(x >= y for x, y in zip(a, own, strict=True)) for a in known.values())

    return [n for n, own in known.items() if not surpassed(own)]


def _winner(candidates: Sequence[Candidate], result: Mapping[str, Any], several: bool) -> Candidate | None:
    told = result.get("winner")
    if told:
        number = told["number"] if isinstance(told.get("number"), int) else -1
        same = next((c for c in candidates if c.number == number), None)
        if same:
            return same
        fitness = _number(told.get("fitness"))
        generation, genome = int(told.get("generation") or 0), told.get("genome") or {}
        return Candidate(number, generation, "done", fitness, _known(fitness), {}, genome, "", None)
    known = [c for c in candidates if not math.isnan(c.merit)]
    return max(known, key=lambda c: c.merit) if known and not several else None


def _preset_scores(
    preset: Mapping[str, Any], result: Mapping[str, Any], candidates: Sequence[Candidate]
) -> Mapping[str, Any]:
    """What the preset scored on what the search measured: on its prompts, if it had its own."""
    splits = (result.get("metrics") or {}).get("preset") or {}
    same = (c.scores for c in candidates if c.genome and c.genome == preset.get("genome"))
    tried = (preset.get("scores"), next(same, None), splits.get("search"), splits.get("validation"))
    return next((t for t in tried if t), {})


def _genes(space: Mapping[str, Any], genomes: Sequence[Mapping[str, Any]]) -> list[Gene]:
    """The genes in the order of the space, then as they appear."""
    tried = dict.fromkeys(k for genome in genomes for k in genome)
    keys = [k for k in space if k in tried or not tried] + [k for k in tried if k not in space]
    labels = _labels(keys)
    return [
        _gene(key, labels[key], str(space.get(key, "")), [g[key] for g in genomes if g.get(key) is not None])
        for key in keys
    ]


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """Short names: `math weight` for `experts.math.weight`; the keys themselves where two would be one."""
    labels = {k: k.removeprefix("experts.").replace(".", " ") for k in keys}
    return labels if len(set(labels.values())) == len(labels) else {k: k for k in keys}


def _gene(key: str, label: str, space: str, values: Sequence[Any]) -> Gene:
    numbers = [n for v in values if (n := _number(v)) is not None]
    if len(numbers) < len(values):
        categories = tuple(sorted({str(v) for v in values}))
        return Gene(key, label, space, categories, *_apart(0.0, len(categories) - 1.0), False)
    bounds = re.search(r"interval\(([^,()]+),([^,()]+)\)", space)
    ends = numbers
    if bounds:
        with contextlib.suppress(ValueError):
            ends = [*numbers, *(float(b) for b in bounds.groups())]
    ends = ends or [0.0, 1.0]
    low, high = _apart(min(ends), max(ends))
    return Gene(key, label, space, (), low, high, bool(re.search(r"\blog\b", space)) and low > 0)


def _apart(low: float, high: float) -> tuple[float, float]:
    """Two ends that differ, also around a single value."""
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def generations(evolution: Evolution) -> list[Generation]:
    """Every generation in order."""
    out: list[Generation] = []
    best_so_far = math.nan
    for number in sorted({c.generation for c in evolution.candidates}):
        own = [c for c in evolution.candidates if c.generation == number]
        merits = [c.merit for c in own if not math.isnan(c.merit)]
        best = max(merits, default=math.nan)
        # fmax knows how to pass over NaN, max does not.
        best_so_far = float(np.fmax(best_so_far, best))
        mean = math.fsum(merits) / len(merits) if merits else math.nan
        counts = [sum(c.status == s for c in own) for s in ("failed", "repeated")]
        out.append(Generation(number, best, mean, best_so_far, *counts))
    return out


@dataclass(frozen=True)
class Weight:
    """How much one gene matters."""

    gene: Gene
    importance: float
    """How far the forest's R² falls when the gene's values are shuffled among the candidates."""
    deviation: float
    """Of that, over the shuffles."""
    spearman: float | None
    """Rank correlation with the fitness: its sign is the direction. None for a choice, which has none."""


@dataclass(frozen=True)
class Importance:
    """How much each gene matters, the most important first."""

    weights: list[Weight]
    candidates: int
    out_of_bag: float | None
    """R² of the forest's predictions for candidates that a tree has not seen."""
    untold: str
    """Why nothing is told, or empty."""


def importance(evolution: Evolution) -> Importance:
    """Permutation importance of a random forest fitted to the evaluated candidates.

    The forest knows interactions and steps, but no direction; Spearman's correlation adds that.
    """
    genes = evolution.genes
    done = [c for c in evolution.measured if c.status == "done"]
    table = [[*(g.place(c.genome) for g in genes), c.merit] for c in done]
    known = np.array([line for line in table if not any(map(math.isnan, line))])
    needed = max(10, 3 * len(genes))
    if not genes or len(known) < needed:
        untold = f"it takes at least {needed} evaluated candidates, and there are {len(known)}"
        return Importance([], len(known), None, untold)
    inputs, target = known[:, :-1], known[:, -1]
    if np.ptp(target) == 0:
        return Importance([], len(known), None, f"every candidate has the same {evolution.merit}")
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    forest = RandomForestRegressor(TREES, oob_score=True, random_state=0).fit(inputs, target)
    shuffled = permutation_importance(forest, inputs, target, n_repeats=SHUFFLES, random_state=0)
    found = [
        Weight(g, float(m), float(d), None if g.categories else spearman(inputs[:, i], target))
        for i, (g, m, d) in enumerate(
            zip(genes, shuffled.importances_mean, shuffled.importances_std, strict=True)
        )
    ]
    found.sort(key=lambda w: -w.importance)
    return Importance(found, len(known), float(forest.oob_score_), "")


def spearman(one: Any, other: Any) -> float | None:
    """The correlation of ranks; None where one of the two never changes."""
    from scipy.stats import rankdata

    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])


@dataclass(frozen=True)
class Model:
    """One line of the validation: a model's scores, and their mean weighted by share."""

    name: str
    scores: Mapping[str, Any]
    mean: float | None
    stderr: float | None


def validation(metrics: Mapping[str, Any], shares: Mapping[str, float]) -> list[Model]:
    """The models that were measured on the validation prompts: the winner first, the plain ones last."""
    measured = {name: _sound((splits or {}).get("validation") or {}) for name, splits in metrics.items()}
    names = sorted((n for n, found in measured.items() if found), key=_rank)
    return [Model(n, measured[n], *score_table.mean(measured[n], shares)) for n in names]


def _sound(found: Mapping[str, Any]) -> dict[str, Any]:
    """The scores that have a value: one that was NaN is the text "nan" in result.json."""
    return {
        n: {**s, "stderr": _number(s.get("stderr"))}
        for n, s in found.items()
        if _number(s.get("value")) is not None
    }


def _rank(name: str) -> tuple[int, int]:
    """Winner, preset, finalists by number, experts as they come, base, random."""
    fixed = {"winner": 0, "preset": 1, "base": 4, "random": 5}
    finalist = re.fullmatch(r"candidate (\d+)", name)
    return (2, int(finalist[1])) if finalist else (fixed.get(name, 3), 0)


def measures(models: Sequence[Model]) -> list[str]:
    """What was measured, in the order in which it appears."""
    return list(dict.fromkeys(n for m in models for n in m.scores))


def spoken(evolution: Evolution, models: Sequence[Model]) -> Iterable[list[str]]:
    """The names besides the genes' that pictures show."""
    yield [c for g in evolution.genes for c in g.categories]
    yield [m.name for m in models]
    yield [*evolution.objectives, *measures(models)]


def csv_text(rows: Rows) -> str:
    """The table as CSV: numbers in full, nothing where there is no value."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def candidate_rows(evolution: Evolution) -> Rows:
    """candidates.csv."""
    names = list(dict.fromkeys(n for c in evolution.candidates for n in c.scores))
    keys = [g.key for g in evolution.genes]
    heads = ["number", "generation", "status", "fitness"]
    heads += [f"score.{n}" for n in names] + [f"stderr.{n}" for n in names] + keys + ["of", "reason"]

    def cells(c: Candidate) -> list[Any]:
        own = [(c.scores.get(n) or {}).get(part) for part in ("value", "stderr") for n in names]
        genome = [c.genome.get(k) for k in keys]
        return [c.number, c.generation, c.status, c.fitness, *own, *genome, c.of, c.reason]

    return [heads, *(cells(c) for c in evolution.candidates)]


def generation_rows(evolution: Evolution) -> Rows:
    """generations.csv."""
    heads = ["generation", "best", "mean", "best so far", "failed", "repeated"]
    found = generations(evolution)
    values = [[_number(v) for v in (g.best, g.mean, g.best_so_far)] for g in found]
    return [heads, *([g.number, *v, g.failed, g.repeated] for g, v in zip(found, values, strict=True))]


def importance_rows(found: Importance) -> Rows:
    """importance.csv; without lines where importance is not told."""
    heads = ["gene", "importance", "deviation", "spearman", "candidates", "out-of-bag r2"]
    return [
        heads,
        *(
            [w.gene.key, w.importance, w.deviation, w.spearman, found.candidates, found.out_of_bag]
            for w in found.weights
        ),
    ]


def validation_rows(models: Sequence[Model]) -> Rows:
    """validation.csv: a line for each model and measure, and for each model's mean."""
    parts = ["value", "stderr", "samples", "metric", "higher_is_better", "task"]
    out: Rows = [["model", "measure", *parts]]
    for m in models:
        out += [[m.name, n, *(s.get(p) for p in parts)] for n, s in m.scores.items()]
        if m.mean is not None:
            out.append([m.name, "mean", m.mean, m.stderr, None, None, None, None])
    return out


def pareto_rows(evolution: Evolution) -> Rows:
    """pareto.csv: the candidates on the front."""
    keys = [g.key for g in evolution.genes]
    on = [c for c in evolution.candidates if c.number in evolution.front]
    return [
        ["number", "generation", *evolution.objectives, *keys],
        *(
            [
                c.number,
                c.generation,
                *((c.scores.get(o) or {}).get("value") for o in evolution.objectives),
                *(c.genome.get(k) for k in keys),
            ]
            for c in on
        ),
    ]
