"""`eval.kind=skills`: the skills of the model's family, by the lm_eval tasks that the family names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mergelab.core.findings import Finding, error
from mergelab.evaluation.kind import Split, register
from mergelab.evaluation.lm_eval_kind import LmEvalKind
from mergelab.evaluation.measures import Measure
from mergelab.schema import Run


class Skills(LmEvalKind):
    """A measure for each of `model.skills`."""

    other_data = "name tasks over other data (a search task for each skill)"

    def measures(self, run: Run, split: Split) -> list[Measure]:
        """A skill without a search task has no measure on the search split."""
        tasks = {
            name: skill.validation if split == "validation" else skill.search
            for name, skill in run.model.skills.items()
        }
        skills = run.model.skills
        return [
            Measure(name, task, skills[name].metric, skills[name].share)
            for name, task in tasks.items()
            if task is not None
        ]

    def check(self, run: Run, tasks_path: Path | None = None) -> Iterator[Finding]:
        """There are skills, and their tasks can be measured."""
        if not run.model.skills:
            message = f"model '{run.model.name}' names no skills to measure"
            remedy = "Use eval=lm_eval, eval=perplexity or eval=none, or add model.skills."
            yield error("setting", "eval.kind", message, remedy)
        yield from super().check(run, tasks_path)

    def key_of(self, measure: Measure, split: Split) -> str:
        """The key of the family's file."""
        return f"model.skills.{measure.name}.{split}"

    def is_local(self, run: Run) -> bool:
        """Where the family has task files of its own."""
        return run.model.tasks is not None


register("skills", Skills())
