"""Building lm_eval's task objects, with errors that say what to do."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mergelab.core.errors import StepError, did_you_mean, summary
from mergelab.evaluation.measures import Measure
from mergelab.evaluation.task_index import Catalogue

log = logging.getLogger(__name__)


def build(names: Sequence[str], catalogue: Catalogue, num_fewshot: int | None) -> dict[str, Any]:
    """lm_eval's tasks by the names given, each as TaskManager.load returns it, data read.

    Raises:
        StepError: for a name that is unknown or only a tag, for a task that asks for what a language model
            under evaluation must not do (run code) or cannot do (see, hear), and for data that are not here.
    """
    from lm_eval.tasks import TaskManager

    for name in names:
        if reason := unusable(name, catalogue):
            raise StepError(reason)
    manager = TaskManager(include_defaults=False, include_path=catalogue.include_path(names))
    built = {name: _load(manager, name) for name in names}
    for loaded in built.values():
        for task in loaded["tasks"].values():
            _prepare(task, num_fewshot)
    return built


def build_config(config: dict[str, Any]) -> Any:
    """The task of a configuration, as TaskManager.load returns it."""
    from lm_eval.tasks import TaskManager

    return _load(TaskManager(include_defaults=False), config)


def wrong(measure: Measure, catalogue: Catalogue) -> Iterator[tuple[str | None, str]]:
    """What is wrong with a measure's metric, with its key; or with its task, whose key the caller knows."""
    if reason := unusable(measure.task, catalogue):
        yield None, reason
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
    """The metrics and filters that a task's YAML declares; None where its code may name others."""
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


def unusable(name: str, catalogue: Catalogue) -> str | None:
    """Why `name` cannot be measured as one number, or None."""
    definition = catalogue.find(name)
    if definition is None:
        return f"no lm_eval task '{name}'.{did_you_mean(name, catalogue.names())}"
    several = definition.kind == "tag" or (
        definition.kind == "group" and not definition.config.get("aggregate_metric_list")
    )
    if several:
        return (
            f"'{name}' stands for several tasks and has no score of its own; "
            f"name its tasks: {', '.join(definition.members)}"
        )
    for part in catalogue.closure(name):
        if part.config.get("unsafe_code"):
            return f"task '{part.name}' runs code that the model writes, which is not supported"
        if part.config.get("doc_to_image") or part.config.get("doc_to_audio"):
            return f"task '{part.name}' shows images or plays sound, which is not supported"
        for member in part.members:
            if part.kind == "group" and not _defined(member, part.config, catalogue):
                return f"group '{part.name}' lists '{member}', which is not a task"
    return None


def _defined(member: str, group: dict[str, Any], catalogue: Catalogue) -> bool:
    """Whether a group's member is a known name, or defined on the spot as a mapping."""
    names = group.get("task")
    return catalogue.find(member) is not None or member not in (names if isinstance(names, list) else [names])


def _load(manager: Any, spec: str | dict[str, Any]) -> Any:
    try:
        return manager.load([spec])
    except Exception as e:
        name = spec if isinstance(spec, str) else spec["task"]
        raise StepError(_explained(e, name)) from e


def _explained(e: Exception, name: str) -> str:
    """Why a task could not be built.

    The frames of the traceback tell which task of a group failed, and whether its data were the cause.
    """
    for frame, _ in traceback.walk_tb(e.__traceback__):
        task: Any = frame.f_locals.get("self")
        if frame.f_code.co_name != "download" or not hasattr(task, "DATASET_PATH"):
            continue
        options = task.config.dataset_kwargs or {}
        where = f"task '{task.config.task}' cannot read its data"
        if task.DATASET_PATH is None or "data_files" in options:
            return f"{where} {options.get('data_files', '')}: {summary(e)}"
        arguments = ", ".join(repr(a) for a in (task.DATASET_PATH, task.DATASET_NAME) if a)
        return (
            f"{where}, {arguments}: {summary(e)} Fetch them once where there is a network: "
            f'python -c "import datasets; datasets.load_dataset({arguments})"'
        )
    return f"task '{name}' cannot be built: {summary(e)}"


def _prepare(task: Any, num_fewshot: int | None) -> None:
    """Set how many examples precede each question, and keep the question out of them.

    As in lm_eval's own command, a task whose YAML says 0 keeps 0.
    """
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own == 0 and num_fewshot > 0:
        log.warning(
            "task %s asks for no examples; eval.num_fewshot=%d has no effect on it",
            task.config.task,
            num_fewshot,
        )
    elif num_fewshot is not None or own is None:
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    examples = getattr(task, "fewshot_cfg", None)
    if not task.get_config("num_fewshot") or examples is None:
        return
    # lm_eval keeps a question out of its own examples only where the split of the examples is literally
    # `test_split`, although both may be the same split by default or under another name.
    config = task.config
    tested = config.test_split or config.validation_split
    drawn = examples.split
    if drawn is None and not examples.samples:
        drawn = config.training_split or config.validation_split or config.test_split
    if drawn == tested:
        examples.split = config.test_split


def prompts(
    built: dict[str, Any], limit: float | None, most: int, seed: int, template: Callable[..., str] | None
) -> list[str]:
    """The prompts of the first documents of what `build` returned: `most` in all, evenly from all tasks of a
    group, and no more than `limit` (as `eval.limit`) of each.

    Of a document with several requests, such as one for each answer to choose from, the first request counts.
    """
    from lm_eval.evaluator_utils import get_sample_size

    leaves = built["tasks"].values()
    found: dict[tuple[str, int], str] = {}
    for task in leaves:
        task.set_fewshot_seed(seed)
        own, allowed = max(1, most // len(leaves)), get_sample_size(task, limit)
        task.build_all_requests(
            limit=own if allowed is None else min(own, allowed),
            apply_chat_template=template is not None,
            fewshot_as_multiturn=template is not None,
            chat_template=template,
        )
        for request in task.instances:
            found.setdefault((request.task_name, request.doc_id), request.args[0])
    return list(found.values())[:most]
