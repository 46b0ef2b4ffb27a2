"""What is measured, and the one number that a search maximises. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergelab.core.errors import StepError
from mergelab.result import Score

TEXT = "text"
"""The name of kind=perplexity's only measure, and of the task made for it."""


@dataclass(frozen=True)
class Measure:
    """One number to be measured."""

    name: str
    """The skill or task: the column of a table."""
    task: str
    """The lm_eval task or group; of a user's own kind of evaluation whatever the kind calls it."""
    metric: str | None = None
    """As lm_eval names it, `exact_match` or `exact_match,strict-match`; None: the first that the
    task declares."""
    share: float = 1.0
    """How much it counts in the fitness."""


def fitness(scores: Mapping[str, Score], measures: Sequence[Measure]) -> float:
    """The mean of the measures' scores weighted by their shares; higher is better.

    A metric where lower is better (perplexity, bits per byte) enters negated. Metrics are not
    rescaled: give measures on different scales shares to match.

    Raises:
        StepError: naming the measure, where a score is missing, NaN or infinite; and where the shares do not
            add up to a positive number.
    """
    total = sum(measure.share for measure in measures)
    if not total > 0:
        raise StepError(
            f"the shares of the {len(measures)} measures add up to {total:g}, so there is no fitness; "
            "one must be above 0"
        )
    worth = 0.0
    for measure in measures:
        score = scores.get(measure.name)
        if score is None:
            raise StepError(f"'{measure.name}' (task {measure.task}) has not been measured")
        if not math.isfinite(score.value):
            raise StepError(
                f"'{measure.name}' (task {measure.task}): {score.metric} is {score.value}; "
                "the model gives no usable numbers"
            )
        worth += measure.share * (score.value if score.higher_is_better else -score.value)
    return worth / total


def mean_score(values: Sequence[float], measure: Measure, *, metric: str, higher_is_better: bool) -> Score:
    """The mean of independent values and its standard error, as the score of a measure.

    Raises:
        StepError: where there are no values.
    """
    n = len(values)
    if n == 0:
        raise StepError(f"'{measure.name}': there is nothing to take the mean of")
    mean = sum(values) / n
    variance = sum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else None
    error = None if variance is None else math.sqrt(variance / n)
    return Score(mean, error, n, metric, higher_is_better, measure.task)
