"""`eval.kind=tasks`: lm_eval tasks by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mergelab.core.findings import Finding, error
from mergelab.evaluation.kind import Split, register
from mergelab.evaluation.lm_eval_kind import LmEvalKind
from mergelab.evaluation.measures import Measure
from mergelab.schema import Run


class Tasks(LmEvalKind):
    """A measure for each of `eval.tasks`, and for a search each of `eval.search_tasks`."""

    settings_read = LmEvalKind.settings_read | {"tasks", "search_tasks"}
    other_data = "name tasks over other data (eval.search_tasks)"

    def measures(self, run: Run, split: Split) -> list[Measure]:
        """Named as the tasks are."""
        names = run.eval.tasks if split == "validation" else run.eval.search_tasks
        return [Measure(name, name) for name in names]

    def check(self, run: Run, tasks_path: Path | None = None) -> Iterator[Finding]:
        """There are tasks, each once, that can be measured."""
        tasks = run.eval.tasks
        if not tasks:
            message = "is empty; name lm_eval tasks, such as 'eval.tasks=[gsm8k]'"
            yield error("setting", "eval.tasks", message)
        for name in sorted({n for n in tasks if tasks.count(n) > 1}):
            yield error("setting", "eval.tasks", f"names '{name}' twice")
        yield from super().check(run, tasks_path)


register("tasks", Tasks())
