"""The tables of a search's report, as rows of CSV files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergelab.report.csv_files import Rows
from mergelab.report.evolution.data import Candidate, Evolution
from mergelab.report.evolution.importance import Importance
from mergelab.report.evolution.validation import ValidatedModel


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
    lines = [[g.number, g.best, g.mean, g.best_so_far, g.failed, g.repeated] for g in evolution.generations]
    return [heads, *lines]


def importance_rows(found: Importance) -> Rows:
    """importance.csv; without lines where there is no importance."""
    heads = ["gene", "importance", "deviation", "spearman", "candidates", "out-of-bag r2"]
    return [
        heads,
        *(
            [w.gene.key, w.importance, w.deviation, w.spearman, found.candidates, found.out_of_bag]
            for w in found.weights
        ),
    ]


def validation_rows(models: Sequence[ValidatedModel]) -> Rows:
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
