"""What can be known to be wrong with an evaluation before any model, or lm_eval, is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mergelab.core.errors import StepError, did_you_mean
from mergelab.evaluation import perplexity, tasks
from mergelab.evaluation.measures import TEXT, Measure, measures
from mergelab.evaluation.task_index import Catalogue, scan
from mergelab.schema import Evaluation, Run

KINDS = ("skills", "tasks", "perplexity", "none")

Problem = tuple[str, str]
"""The key whose value is wrong, and what is wrong with it."""


def check_tasks(run: Run, *, tasks_path: Path | None = None) -> list[Problem]:
    """Everything wrong with `run.eval` and the skills it measures, all at once.

    `tasks_path` is the folder that `run.model.tasks` stands for; None if there is none, or none
    yet, in which case tasks that only it can define are taken on trust. Reads YAML files and the
    user's text; takes two seconds where a task is not in the user's own folders, else nothing.
    """
    settings = run.eval
    if settings.kind not in KINDS:
        choices = ", ".join(KINDS)
        wrong = f"'{settings.kind}' is unknown; choose {choices}."
        return [("eval.kind", wrong + did_you_mean(settings.kind, KINDS))]
    if settings.kind == "none":
        return []
    problems = [*_numbers(settings), *_unused(run)]
    folders = {"model.tasks": tasks_path, "eval.include_path": _path(settings.include_path)}
    for key, folder in folders.items():
        if folder is not None:
            problems += [(key, wrong) for wrong in _folder(folder)]
    validation, search = measures(run), measures(run, "search")
    problems += _shares(run, validation, search)
    if settings.kind == "perplexity":
        problems += _text(settings)
    else:
        catalogue = Catalogue([folder for folder in folders.values() if folder is not None])
        trusting = run.model.tasks is not None and tasks_path is None
        for key, measure in _keys(run, validation, search):
            if not (trusting and catalogue.find(measure.task) is None):
                problems += _measure(key, measure, catalogue)
    return list(dict.fromkeys(problems))


def _numbers(settings: Evaluation) -> Iterator[Problem]:
    """Settings outside their range."""
    if settings.batch_size < 1:
        yield "eval.batch_size", f"{settings.batch_size} is too small; at least 1"
    if settings.num_fewshot is not None and settings.num_fewshot < 0:
        yield "eval.num_fewshot", f"{settings.num_fewshot} is negative; null is the task's own"
    if settings.max_length is not None and settings.max_length < 2:
        yield "eval.max_length", f"{settings.max_length} is too small; null is the model's own"
    limit = settings.limit
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and float(limit).is_integer())):
        yield (
            "eval.limit",
            f"{limit:g} is neither a number of prompts (1, 2, ...) nor a share of them below 1; "
            "null is all of them",
        )


def _unused(run: Run) -> Iterator[Problem]:
    """What is asked for in vain, and what is missing."""
    settings = run.eval
    if settings.kind == "tasks" and not settings.tasks:
        yield "eval.tasks", "is empty; name lm_eval tasks, such as 'eval.tasks=[gsm8k]'"
    if settings.kind != "tasks" and settings.tasks:
        yield "eval.tasks", f"has no effect with eval.kind={settings.kind}; use eval=lm_eval"
    if settings.kind != "perplexity" and settings.text is not None:
        yield "eval.text", f"has no effect with eval.kind={settings.kind}; use eval=perplexity"
    if settings.kind == "skills" and not run.model.skills:
        yield (
            "eval.kind",
            f"model '{run.model.name}' names no skills to measure; use eval=lm_eval, "
            "eval=perplexity or eval=none, or add model.skills",
        )
    for name in sorted({n for n in settings.tasks if settings.tasks.count(n) > 1}):
        yield "eval.tasks", f"names '{name}' twice"


def _folder(folder: Path) -> list[str]:
    """What is wrong with a folder of task files."""
    return scan(folder)[1] if folder.is_dir() else [f"{folder} is not a folder"]


def _shares(run: Run, validation: Sequence[Measure], search: Sequence[Measure]) -> Iterator[Problem]:
    """Shares and metrics for what is not measured, and shares that make no mean."""
    names = [measure.name for measure in validation]
    for key, given in (("eval.shares", run.eval.shares), ("eval.metrics", run.eval.metrics)):
        for name in given:
            if name not in names:
                known = f"measured are {', '.join(names) or 'none'}."
                yield (
                    f"{key}.{name}",
                    f"nothing of this name is measured; {known}" + did_you_mean(name, names),
                )
    for measure in validation:
        own = measure.name in run.eval.shares or run.eval.kind != "skills"
        key = f"eval.shares.{measure.name}" if own else f"model.skills.{measure.name}.share"
        if not 0 <= measure.share < math.inf:
            yield key, f"{measure.share:g} is not a share; 0 or a positive number"
    for split, those in (("validation", validation), ("search", search)):
        if those and all(measure.share == 0 for measure in those):
            yield "eval.shares", f"all shares of the {split} split are 0, which makes no fitness"


def _text(settings: Evaluation) -> Iterator[Problem]:
    """What is wrong with the text of kind=perplexity, and its metric."""
    metric = settings.metrics.get(TEXT)
    if metric is not None and metric not in perplexity.METRICS:
        choices = ", ".join(perplexity.METRICS)
        yield (
            f"eval.metrics.{TEXT}",
            f"'{metric}' is unknown; choose {choices}.{did_you_mean(metric, perplexity.METRICS)}",
        )
    path = _path(settings.text)
    if path is None:
        yield "eval.text", "is not set; name a text file, as in eval.text=my.txt"
        return
    try:
        perplexity.documents(path)
    except StepError as error:
        yield "eval.text", str(error)


def _keys(
    run: Run, validation: Sequence[Measure], search: Sequence[Measure]
) -> Iterator[tuple[str, Measure]]:
    """Each measure with the key that names its task."""
    skills = run.eval.kind == "skills"
    for split, those in (("validation", validation), ("search", search)):
        for measure in those:
            yield (f"model.skills.{measure.name}.{split}" if skills else "eval.tasks"), measure


def _measure(key: str, measure: Measure, catalogue: Catalogue) -> Iterator[Problem]:
    """What is wrong with one measure's task or metric."""
    if reason := tasks.unusable(measure.task, catalogue):
        yield key, reason
        return
    definition = catalogue.find(measure.task)
    declared = None if definition is None else _declared(definition.config)
    if measure.metric is None or declared is None:
        return
    metric, _, filter_name = measure.metric.partition(",")
    metrics, filters = declared
    if metric not in metrics or (filter_name and filters and filter_name not in filters):
        names = [f"{m},{f}" for m in metrics for f in filters] if filter_name else metrics
        yield (
            f"eval.metrics.{measure.name}",
            f"task '{measure.task}' has no metric '{measure.metric}'; it has "
            f"{', '.join(names)}.{did_you_mean(measure.metric, names)}",
        )


def _declared(config: dict[str, Any]) -> tuple[list[str], list[str]] | None:
    """The metrics and filters a task's YAML declares; None where its code may name others."""
    listed = config.get("metric_list", config.get("aggregate_metric_list"))
    if not isinstance(listed, list) or "process_results" in config or "class" in config:
        return None
    metrics = [item["metric"] for item in listed if type(item.get("metric")) is str]
    if len(metrics) < len(listed):
        return None
    if "aggregate_metric_list" in config:
        return metrics, []
    filters = config.get("filter_list")
    named = [f["name"] for f in filters if "name" in f] if isinstance(filters, list) else ["none"]
    return metrics, named


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value).expanduser()
