"""What the kinds of evaluation have in common that measure by lm_eval's tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mergelab.core.findings import Finding, error
from mergelab.evaluation import tasks
from mergelab.evaluation.kind import SPLITS, EvaluationKind, Split, measures
from mergelab.evaluation.lm_eval_scorer import LmEvalScorer
from mergelab.evaluation.measures import Measure
from mergelab.evaluation.scorer import Conditions
from mergelab.evaluation.task_hash import definition
from mergelab.evaluation.task_index import Catalogue, scan
from mergelab.schema import Run


class LmEvalKind(EvaluationKind):
    """Each measure is an lm_eval task or group."""

    settings_read = frozenset({"metrics", "num_fewshot", "include_path"})
    backends = ("hf", "vllm")
    packages = ("lm_eval", "transformers", "torch")
    language_models = True
    uses_task_files = True
    has_prompts = True

    def check(self, run: Run, tasks_path: Path | None = None) -> Iterator[Finding]:
        """Each task can be measured as one number, and has the metric that is asked for.

        Args:
            run: whose tasks are checked.
            tasks_path: the folder that `run.model.tasks` stands for. None if there is none, or none yet:
                tasks that only it can define are then taken on trust.
        """
        own = run.eval.include_path
        given = {"model.tasks": tasks_path, "eval.include_path": Path(own).expanduser() if own else None}
        folders = {key: folder for key, folder in given.items() if folder is not None}
        for key, folder in folders.items():
            wrong = scan(folder)[1] if folder.is_dir() else [f"{folder} is not a folder"]
            yield from (error("setting", key, message) for message in wrong)
        catalogue = Catalogue(list(folders.values()))
        trusting = run.model.tasks is not None and tasks_path is None
        for split in SPLITS:
            for measure in measures(run, split):
                if not (trusting and catalogue.find(measure.task) is None):
                    for metric_key, message in tasks.wrong(measure, catalogue):
                        yield error("setting", metric_key or self.key_of(measure, split), message)

    def key_of(self, measure: Measure, split: Split) -> str:
        """The key that names a measure's task."""
        return "eval.tasks"

    def build(self, names: Sequence[str], conditions: Conditions) -> dict[str, Any]:
        """lm_eval's tasks by name, their data read.

        Raises:
            StepError: as `tasks.build` does.
        """
        return tasks.build(names, conditions.catalogue, conditions.settings.num_fewshot)

    def content(self, measure: Measure, conditions: Conditions) -> Any | None:
        """What the task asks and how answers are scored."""
        return definition(conditions.catalogue, measure.task)

    def data(self, run: Run) -> list[str]:
        """The data sets of all tasks."""
        return sorted({m.task for split in SPLITS for m in measures(run, split)})

    def scorer(self, conditions: Conditions) -> LmEvalScorer:
        """lm_eval, with the tasks built once."""
        return LmEvalScorer(conditions, lambda names: self.build(names, conditions))
