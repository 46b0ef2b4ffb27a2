"""Measuring models under fixed conditions, whatever the kind of evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from mergelab.evaluation.loading import load
from mergelab.evaluation.measures import Measure
from mergelab.evaluation.task_index import Catalogue
from mergelab.result import Score
from mergelab.schema import Evaluation, Hardware

T = TypeVar("T")

Progress = Callable[[str, int, int], None]
"""Called with a measure's name, how many of its requests are answered, and how many there are."""


@dataclass(frozen=True)
class Conditions:
    """All that decides a score besides the model and the measure."""

    settings: Evaluation
    hardware: Hardware
    seed: int = 0
    tasks_path: Path | None = None
    """The folder of the model family's own tasks."""
    trust_remote_code: bool = False

    @cached_property
    def catalogue(self) -> Catalogue:
        """The lm_eval tasks of the family, of `eval.include_path`, and of lm_eval itself."""
        own = self.settings.include_path
        folders = [self.tasks_path, None if own is None else Path(own).expanduser()]
        return Catalogue([folder.resolve() for folder in folders if folder is not None])

    def first(self, items: Sequence[T]) -> Sequence[T]:
        """The first items, as many as `eval.limit` leaves."""
        limit = self.settings.limit
        if limit is None:
            return items
        return items[: math.ceil(len(items) * limit) if limit < 1 else int(limit)]


class Scorer:
    """Measures any number of models under the same conditions."""

    language_models = True
    """Whether each model has to have a tokenizer."""

    def __init__(self, conditions: Conditions):
        self.conditions = conditions

    def build(self, measures: Sequence[Measure]) -> None:
        """Read what the measures need besides a model, so that what is wrong with it shows first.

        Raises:
            StepError: naming the measure and the data.
        """

    def score(
        self, model: Any, tokenizer: Any, measures: Sequence[Measure], progress: Progress | None = None
    ) -> dict[str, Score]:
        """Scores by measure name of a loaded model, which stays as it is.

        Raises:
            StepError: where it cannot be measured.
        """
        raise NotImplementedError

    def score_folder(
        self,
        path: Path,
        measures: Sequence[Measure],
        adapter: Path | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Score]:
        """Scores by measure name of the model in a folder, with the LoRA in `adapter`.

        Raises:
            StepError: where it cannot be loaded or measured.
        """
        c = self.conditions
        model, tokenizer = load(
            path,
            c.hardware,
            adapter=adapter,
            trust_remote_code=c.trust_remote_code,
            needs_tokenizer=self.language_models,
        )
        return self.score(model, tokenizer, measures, progress)

    def prompts(
        self, model: Any, tokenizer: Any, measures: Sequence[Measure], *, most: int
    ) -> dict[str, list[str]]:
        """The first `most` prompts of each measure; none where a kind has no prompts to show."""
        return {}
