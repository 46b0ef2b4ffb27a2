"""What is measured, what came out, and the one number a search goes by. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergelab.core.errors import StepError
from mergelab.result import Score
from mergelab.schema import Run

TEXT = "text"
"""The name of kind=perplexity's only measure, and of the task made for it."""


@dataclass(frozen=True)
class Measure:
    """One number to be measured."""

    name: str
    """The skill or task: the column of a table."""
    task: str
    """The lm_eval task or group."""
    metric: str | None = None
    """As lm_eval names it, `exact_match` or `exact_match,strict-match`; None: the first that the
    task declares."""
    share: float = 1.0
    """How much it counts in the fitness."""


def measures(run: Run, split: str = "validation") -> list[Measure]:
    """The measures of a run on one split, "validation" or "search".

    A skill without a search task has no measure on the search split, kind=tasks has those that
    `search_tasks` names, and kind=perplexity has none.

    Raises ValueError for another split and StepError for an unknown `eval.kind`.
    """
    if split not in ("validation", "search"):
        raise ValueError(f"no split {split!r}; choose validation or search")
    settings = run.eval
    if settings.kind == "skills":
        tasks = {
            name: skill.validation if split == "validation" else skill.search
            for name, skill in run.model.skills.items()
        }
        return [
            Measure(
                name,
                task,
                settings.metrics.get(name, run.model.skills[name].metric),
                settings.shares.get(name, run.model.skills[name].share),
            )
            for name, task in tasks.items()
            if task is not None
        ]
    if settings.kind in ("tasks", "perplexity"):
        validation = settings.tasks if settings.kind == "tasks" else [TEXT]
        return [
            Measure(name, name, settings.metrics.get(name), settings.shares.get(name, 1.0))
            for name in (validation if split == "validation" else settings.search_tasks)
        ]
    if settings.kind == "none":
        return []
    raise StepError(f"eval.kind={settings.kind}: choose skills, tasks, perplexity or none")


def other_data(run: Run) -> str:
    """What to do where there is nothing to climb but what results are reported on."""
    where = "eval.search_tasks" if run.eval.kind == "tasks" else "a search task for each skill"
    return f"name tasks over other data ({where}), or accept it: eval.allow_test_split=true"


def fitness(scores: Mapping[str, Score], measures: Sequence[Measure]) -> float:
    """The mean of the measures' scores weighted by their shares; higher is better.

    A metric of which less is better (perplexity, bits per byte) enters negated. Metrics are not
    rescaled: give measures on different scales shares to match.

    Raises StepError, naming the measure, if a score is missing, NaN or infinite, and if the shares
    do not add up to a positive number.
    """
    total = sum(measure.share for measure in measures)
    if not total > 0:
        raise StepError(f"the shares of {len(measures)} measures add up to {total:g}: no fitness")
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
