"""The distances of experts from their base, and findings where they are too large, or zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np

from mergelab.analysis.parameter_groups import Comparison
from mergelab.analysis.statistics import Array, Statistics
from mergelab.core.findings import Finding, warning

UNRELATED = 0.5
"""The cosine of a model's and the base's matrices below which the model is not a fine-tune of that base.

The weights of two independently trained models are like two random directions: their cosine is about 0,
and their distance sqrt(2) = 1.41 times the norm of either. Measured on the tiny family's matrices: 0.037
(distance 1.39) between families of different seeds, 0.01 or less (1.41) for random models. The experts,
which are trained long for their size, have 0.994 or more (0.004 to 0.11), and fine-tunes of large models
are closer still. So one half is far from both. Norms and biases are excluded because they start at one
and at zero in every model, which raises the cosine of all weights of the two seeds to 0.26.
"""

SAME = 1e-7
"""The distance, in units of the base's norm, below which weights are equal: about float32's last bit."""


def findings(comparison: Comparison, keys: Mapping[str, str]) -> Iterator[Finding]:
    """Findings about the base and the experts.

    Args:
        comparison: The comparison of the base and the experts.
        keys: The key that names each expert.
    """
    names, found, all_of_it = comparison.experts, comparison.matrices.whole, comparison.whole
    unrelated = [n for n, c in zip(names, found.cosine_to_base, strict=True) if c < UNRELATED]
    if len(unrelated) == len(names) > 1 and float(found.cosine_between.min()) >= UNRELATED:
        message = (
            "it is not the base of these experts: the cosines of their matrices and its own are "
            f"{_span(found.cosine_to_base)}, those among the experts are {_pairs(found)}"
        )
        yield warning("unrelated", "model.base", message, "Name the model that they were made from.")
        unrelated = []
    for i, name in enumerate(names):
        if name in unrelated:
            message = (
                "it is not a fine-tune of this base: its matrices differ by "
                f"{found.relative_norm[i]:.2f} times the base's norm, with a cosine of "
                f"{found.cosine_to_base[i]:.3f}"
            )
            remedy = f"Name its own base: model.base.path=...{_or_leave_out(keys[name])}"
            yield warning("unrelated", keys[name], message, remedy)
        elif all_of_it.relative_norm[i] <= SAME:
            yield warning("same", keys[name], "its weights equal the base's, so there is no task vector")
    for i, j in combinations(range(len(names)), 2):
        if all_of_it.relative_norm[j] > SAME and _apart(all_of_it, i, j) <= SAME:
            message = f"its weights equal those of {names[i]}, so they count twice"
            yield warning("same", keys[names[j]], message)


def _or_leave_out(key: str) -> str:
    return f", or leave it out: '~{key}'" if key.startswith("experts.") else ""


def _apart(sums: Statistics, i: int, j: int) -> float:
    """The distance of two experts in units of the base's norm."""
    d = sums.dots[1:, 1:]
    return float(np.sqrt(max(d[i, i] + d[j, j] - 2 * d[i, j], 0.0) / sums.dots[0, 0]))


def _pairs(sums: Statistics) -> str:
    return _span(sums.cosine_between[np.triu_indices(len(sums.tops), 1)])


def _span(values: Array) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:.3f}" if round(low, 3) == round(high, 3) else f"{low:.3f} to {high:.3f}"


def record(comparison: Comparison) -> dict[str, Any]:
    """The entry of result.json, by part of the model, without norms and biases; null for undefined values."""
    names, found = comparison.experts, comparison.matrices

    def by_expert(values: Array) -> dict[str, float | None]:
        return {n: None if np.isnan(v) else float(v) for n, v in zip(names, values, strict=True)}

    return {
        part: {
            "relative_norm": by_expert(sums.relative_norm),
            "cosine_to_base": by_expert(sums.cosine_to_base),
            "cosine": {n: by_expert(own) for n, own in zip(names, sums.cosine, strict=True)},
        }
        for part, sums in {"whole": found.whole, **found.groups}.items()
    }
