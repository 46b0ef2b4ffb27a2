"""From the results of lm_eval's evaluator to a Score."""

from __future__ import annotations

from typing import Any, SupportsFloat, TypeGuard

from mergelab.core.errors import StepError, did_you_mean
from mergelab.evaluation import perplexity
from mergelab.evaluation.measures import Measure
from mergelab.result import Score


def read(found: dict[str, Any], measure: Measure) -> Score:
    """The score of one measure in an evaluation's results.

    lm_eval names a number `metric,filter`. A measure that names no filter takes the first one, and
    one that names no metric the first that the task or group declares.

    Raises:
        StepError: where there is no such number, or nothing says which way is better.
    """
    row: dict[str, Any] = found["results"][measure.task]
    values = {
        key: float(value)
        for key, value in row.items()
        if "," in key and "_stderr," not in key and _is_number(value)
    }
    better: dict[str, bool | None] = found["higher_is_better"].get(measure.task, {})
    # A task's row is in the order of its answers, a group's in the order of its declaration.
    is_group = measure.task in found["group_subtasks"]
    declared = [] if is_group else list(better)
    wanted = [measure.metric] if measure.metric else [*declared, *values]
    key = next((k for name in wanted for k in values if name in (k, k.split(",")[0])), None)
    if key is None:
        names = [_short(name) for name in values]
        raise StepError(
            f"task {measure.task} has no metric '{measure.metric}'; "
            f"it has {', '.join(names) or 'none'}.{did_you_mean(measure.metric or '', names)}"
        )
    metric, _, filter_name = key.partition(",")
    if better.get(metric) is None:
        raise StepError(
            f"task {measure.task} does not say whether more {metric} is better: "
            "add higher_is_better to its metric_list"
        )
    error = row.get(f"{metric}_stderr,{filter_name}")
    if not _is_number(error) and metric in perplexity.METRICS and not is_group:
        answers = [s[metric] for s in found["samples"][measure.task] if s["filter"] == filter_name]
        error = perplexity.stderr(metric, answers)
    return Score(
        value=values[key],
        stderr=float(error) if _is_number(error) else None,
        samples=_samples(found, measure.task),
        metric=_short(key),
        higher_is_better=bool(better[metric]),
        task=measure.task,
        others={_short(name): value for name, value in values.items() if name != key},
    )


def _samples(found: dict[str, Any], name: str) -> int:
    """Documents scored by a task, or by all tasks of a group."""
    parts = found["group_subtasks"].get(name)
    if parts is None:
        return int(found["n-samples"][name]["effective"])
    return sum(_samples(found, part) for part in parts)


def _short(key: str) -> str:
    return key.removesuffix(",none")


def _is_number(value: Any) -> TypeGuard[SupportsFloat]:
    return hasattr(value, "__float__") and not isinstance(value, str)
