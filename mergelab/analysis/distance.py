"""How far experts are from their base, and what is wrong where that is too far, or nothing at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np

from mergelab.analysis.parameter_groups import Comparison
from mergelab.analysis.statistics import Array, Statistics
from mergelab.core.findings import Finding, warning

UNRELATED = 0.5
"""Below this cosine of its matrices and the base's a model is not a fine-tune of that base.

A base's weights of two trainings are as two random directions: their cosine is about 0, and the distance
from one to the other sqrt(2) = 1.41 times the norm of either. Measured on the tiny family's matrices: 0.037
(1.39) beside the same family of another seed, 0.01 or less (1.41) beside random models. Its experts,
trained hard for their size, have 0.994 and more (0.004 to 0.11), and fine-tunes of large models are nearer
still. So half is far from both. Norms and biases do not take part: they begin at one and at zero in every
model, which makes the cosine of all weights of the two seeds 0.26.
"""

SAME = 1e-7
"""A distance, as a share of the base's norm, that is none: about the last bit of a float32."""


def findings(comparison: Comparison, places: Mapping[str, str]) -> Iterator[Finding]:
    """What is wrong with the base or an expert, in words.

    Args:
        comparison: of the base and the experts.
        places: the key that names each expert.
    """
    names, found, all_of_it = comparison.experts, comparison.matrices.whole, comparison.whole
    strangers = [n for n, c in zip(names, found.to_base, strict=True) if c < UNRELATED]
    if len(strangers) == len(names) > 1 and float(found.between.min()) >= UNRELATED:
        told = f"cosines of their matrices and its {_span(found.to_base)}, among themselves {_pairs(found)}"
        message = f"it is not the base of these experts: {told}"
        yield warning("unrelated", "model.base", message, "Name the model that they were made from.")
        strangers = []
    for i, name in enumerate(names):
        if name in strangers:
            message = (
                f"{found.relative[i]:.2f} times as far from the base as the base is from zero, cosine "
                f"{found.to_base[i]:.3f} (matrices): it is not a fine-tune of this base"
            )
            remedy = f"Name its own base: model.base.path=...{_or_leave_out(places[name])}"
            yield warning("unrelated", places[name], message, remedy)
        elif all_of_it.relative[i] <= SAME:
            yield warning("same", places[name], "its weights are the base's: there is no task vector")
    for i, j in combinations(range(len(names)), 2):
        if all_of_it.relative[j] > SAME and _apart(all_of_it, i, j) <= SAME:
            message = f"its weights are those of {names[i]}: together they count twice"
            yield warning("same", places[names[j]], message)


def _or_leave_out(place: str) -> str:
    return f", or leave it out: '~{place}'" if place.startswith("experts.") else ""


def _apart(sums: Statistics, i: int, j: int) -> float:
    """The distance of two experts, as a share of the base's norm."""
    d = sums.dots[1:, 1:]
    return float(np.sqrt(max(d[i, i] + d[j, j] - 2 * d[i, j], 0.0) / sums.dots[0, 0]))


def _pairs(sums: Statistics) -> str:
    return _span(sums.between[np.triu_indices(len(sums.tops), 1)])


def _span(values: Array) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:.3f}" if round(low, 3) == round(high, 3) else f"{low:.3f} to {high:.3f}"


def record(comparison: Comparison) -> dict[str, Any]:
    """As result.json has it, by part of the model, without norms and biases; null where there is no value."""
    names, found = comparison.experts, comparison.matrices

    def by_expert(values: Array) -> dict[str, float | None]:
        return {n: None if np.isnan(v) else float(v) for n, v in zip(names, values, strict=True)}

    return {
        part: {
            "relative_norm": by_expert(sums.relative),
            "cosine_to_base": by_expert(sums.to_base),
            "cosine": {n: by_expert(own) for n, own in zip(names, sums.cosine, strict=True)},
        }
        for part, sums in {"whole": found.whole, **found.groups}.items()
    }
