"""How much each gene of a search matters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mergelab.report.evolution.data import Evolution, Gene
from mergelab.search_history import rank_correlation

TREES, SHUFFLES = 200, 10
"""Of the forest: enough that another seed hardly moves a bar."""


@dataclass(frozen=True)
class Weight:
    """How much one gene matters."""

    gene: Gene
    importance: float
    """How far the forest's R² falls when the gene's values are shuffled among the candidates."""
    deviation: float
    """Its standard deviation over the shuffles."""
    spearman: float | None
    """Rank correlation with the fitness; its sign is the direction, which a choice does not have."""


@dataclass(frozen=True)
class Importance:
    """How much each gene matters, the most important first."""

    weights: list[Weight]
    candidates: int
    out_of_bag: float | None
    """R² of the forest's predictions for candidates that a tree was not fitted to."""
    reason: str
    """Why there is none; empty where there is."""


def importance(evolution: Evolution) -> Importance:
    """Permutation importance of a random forest fitted to the evaluated candidates.

    The forest captures interactions and steps but no direction, which Spearman's correlation adds.
    """
    genes = evolution.genes
    done = [c for c in evolution.measured if c.status == "done"]
    table = [[*(g.position(c.genome) for g in genes), c.merit] for c in done]
    usable = np.array([line for line in table if not any(map(math.isnan, line))])
    needed = max(10, 3 * len(genes))
    if not genes or len(usable) < needed:
        reason = f"it takes at least {needed} evaluated candidates, and there are {len(usable)}"
        return Importance([], len(usable), None, reason)
    inputs, target = usable[:, :-1], usable[:, -1]
    if np.ptp(target) == 0:
        return Importance([], len(usable), None, f"every candidate has the same {evolution.merit}")
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    forest = RandomForestRegressor(TREES, oob_score=True, random_state=0).fit(inputs, target)
    shuffled = permutation_importance(forest, inputs, target, n_repeats=SHUFFLES, random_state=0)
    directions = [
        None if g.categories else rank_correlation(inputs[:, i].tolist(), target.tolist())
        for i, g in enumerate(genes)
    ]
    found = [
        Weight(g, float(mean), float(deviation), direction)
        for g, mean, deviation, direction in zip(
            genes, shuffled.importances_mean, shuffled.importances_std, directions, strict=True
        )
    ]
    found.sort(key=lambda w: -w.importance)
    return Importance(found, len(usable), float(forest.oob_score_), "")
