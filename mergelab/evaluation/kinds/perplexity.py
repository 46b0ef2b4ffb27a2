"""`eval.kind=perplexity`: bits per byte and perplexity of a text file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mergelab.core.errors import StepError, none_of
from mergelab.core.findings import Finding, error
from mergelab.core.hashing import file_hash
from mergelab.evaluation import perplexity, tasks, windows
from mergelab.evaluation.kind import Split, register
from mergelab.evaluation.lm_eval_kind import LmEvalKind
from mergelab.evaluation.measures import TEXT, Measure
from mergelab.evaluation.scorer import Conditions
from mergelab.schema import Evaluation, Run


class Perplexity(LmEvalKind):
    """One measure, over the documents of `eval.text`."""

    settings_read = frozenset({"metrics", "text", "num_fewshot"})
    uses_task_files = False
    has_prompts = False
    validation_is_benchmark = False  # the user has chosen the text
    other_data = "choose an evaluation with search data (eval=skills)"

    def measures(self, run: Run, split: Split) -> list[Measure]:
        """None for searches: there is one text."""
        return [Measure(TEXT, TEXT)] if split == "validation" else []

    def check(self, run: Run, tasks_path: Path | None = None) -> Iterator[Finding]:
        """There is a text that can be read, and the metric is one of perplexity's."""
        metric = run.eval.metrics.get(TEXT)
        if metric is not None and metric not in perplexity.METRICS:
            yield error("setting", f"eval.metrics.{TEXT}", none_of(metric, perplexity.METRICS))
        if run.eval.text is None:
            yield error("setting", "eval.text", "is not set; name a text file, as in eval.text=my.txt")
            return
        try:
            perplexity.documents(_text(run.eval))
        except StepError as e:
            yield error("setting", "eval.text", str(e))

    def build(self, names: Sequence[str], conditions: Conditions) -> dict[str, Any]:
        """The text as a task."""
        return {TEXT: tasks.build_config(perplexity.task(_text(conditions.settings)))}

    def content(self, measure: Measure, conditions: Conditions) -> dict[str, Any]:
        """A hash of the file, and how it is cut into windows."""
        return {"text": file_hash(_text(conditions.settings)), "windows": windows.VERSION}

    def data(self, run: Run) -> list[str]:
        """None to be downloaded."""
        return []

    def is_local(self, run: Run) -> bool:
        """A file of this machine."""
        return True


def _text(settings: Evaluation) -> Path:
    return Path(settings.text or "").expanduser()


register("perplexity", Perplexity())
