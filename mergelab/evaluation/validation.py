"""What can be known to be wrong with an evaluation before any model, or lm_eval, is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mergelab.core.errors import InputError, did_you_mean
from mergelab.core.findings import Finding, error
from mergelab.evaluation.kind import SPLITS, EvaluationKind, kind_of, measures
from mergelab.evaluation.measures import Measure
from mergelab.schema import Evaluation, Run

OPTIONAL = {
    "tasks": "use eval=lm_eval",
    "search_tasks": "use eval=lm_eval",
    "text": "use eval=perplexity",
    "metrics": "the kind has metrics of its own",
    "num_fewshot": "use eval=lm_eval",
    "include_path": "use eval=lm_eval",
}
"""Settings that only some kinds read, and what to do where another kind is chosen."""


def check(run: Run, *, tasks_path: Path | None = None) -> list[Finding]:
    """Everything that is wrong with `run.eval` and what it measures, all at once.

    Reads YAML files and the user's text; takes two seconds where a task is not in the user's own folders,
    else nothing.

    Args:
        run: the composed run.
        tasks_path: the folder that `run.model.tasks` stands for; None if there is none, or none yet.
    """
    try:
        kind = kind_of(run.eval)
        kind.options_of(run.eval)
    except InputError as e:
        key, _, message = str(e).partition(": ")
        return [error("setting", key, message)]
    if kind.measures_nothing:
        return []
    return list(dict.fromkeys([*_settings(run.eval, kind), *_shares(run), *kind.check(run, tasks_path)]))


def _settings(settings: Evaluation, kind: EvaluationKind) -> Iterator[Finding]:
    """Settings that this kind does not read, or cannot work with."""
    for name, remedy in OPTIONAL.items():
        if name not in kind.settings_read and getattr(settings, name) not in (None, [], {}):
            message = f"has no effect with eval.kind={settings.kind}; {remedy}"
            yield error("setting", f"eval.{name}", message)
    if settings.backend == "vllm" and settings.backend not in kind.backends:
        message = f"{settings.backend} cannot be used with eval.kind={settings.kind}; set it to hf"
        yield error("setting", "eval.backend", message)


def _shares(run: Run) -> Iterator[Finding]:
    """Shares and metrics for what is not measured, and shares that do not add up to a mean."""
    measured: dict[str, Sequence[Measure]] = {split: measures(run, split) for split in SPLITS}
    names = [measure.name for measure in measured["validation"]]
    for key, given in (("eval.shares", run.eval.shares), ("eval.metrics", run.eval.metrics)):
        for name in given:
            if name not in names:
                known = f"measured are {', '.join(names) or 'none'}."
                message = f"nothing of this name is measured; {known}{did_you_mean(name, names)}"
                yield error("setting", f"{key}.{name}", message)
    for split, those in measured.items():
        if those and all(measure.share == 0 for measure in those):
            message = f"all shares of the {split} split are 0, which makes no fitness"
            yield error("setting", "eval.shares", message)
