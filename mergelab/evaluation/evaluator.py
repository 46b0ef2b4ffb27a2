"""`Evaluator`: what measures a run's models, with scores that are known already from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergelab.evaluation import cache
from mergelab.evaluation.kind import kind_of
from mergelab.evaluation.measures import Measure
from mergelab.evaluation.scorer import Conditions, Progress
from mergelab.result import Score
from mergelab.schema import Evaluation, Hardware


class Evaluator:
    """A kind of evaluation with what it has read, for any number of models.

    Reading a task's data can cost more than measuring a small model by them, so keep one Evaluator for all
    models and splits of a process. Nothing heavy happens when it is made.

    Args:
        settings: `eval`.
        hardware: how models are loaded.
        seed: of everything random.
        tasks_path: the folder of the model family's own tasks.
        home: scores are kept in `home/scores`; without a home, or with `eval.cache=false`, nothing is kept
            or reused.
        trust_remote_code: as `model.trust_remote_code`.
    Raises:
        InputError: for an unknown `eval.kind`.
    """

    def __init__(
        self,
        settings: Evaluation,
        *,
        hardware: Hardware,
        seed: int = 0,
        tasks_path: Path | None = None,
        home: Path | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.conditions = Conditions(settings, hardware, seed, tasks_path, trust_remote_code)
        self.kind = kind_of(settings)
        self._home = home if settings.cache else None
        self._scorer = self.kind.scorer(self.conditions)

    def evaluate(
        self,
        path: Path,
        measures: Sequence[Measure],
        *,
        adapter: Path | None = None,
        fingerprint: str | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Score]:
        """Scores by measure name of the model in a folder, those known already from the cache.

        The model is loaded once, and not at all where every score is known. What the measures need is read
        before, so that what is wrong with it shows first.

        Args:
            path: the model's folder.
            measures: what to measure.
            adapter: the folder of a LoRA to put into the model.
            fingerprint: a hash of the content of both; without one the cache is not used.
            progress: called while requests are answered.
        Raises:
            StepError: where the model cannot be loaded or measured.
        """
        scores: dict[str, Score] = {}
        for measure in measures:
            known = self._known(fingerprint, measure)
            if known is not None:
                scores[measure.name] = known
        todo = [measure for measure in measures if measure.name not in scores]
        if todo:
            self.build(todo)
            scores |= self._scorer.score_folder(path, todo, adapter, progress)
            for measure in todo:
                self._keep(fingerprint, measure, scores[measure.name])
        return {measure.name: scores[measure.name] for measure in measures}

    def build(self, measures: Sequence[Measure]) -> None:
        """Read what the measures need besides a model, where that has not been done yet.

        Raises:
            StepError: naming task and data set, where one is unknown, broken, or not here.
        """
        self._scorer.build(measures)

    def score(
        self,
        model: Any,
        tokenizer: Any,
        measures: Sequence[Measure],
        *,
        progress: Progress | None = None,
    ) -> dict[str, Score]:
        """Scores by measure name of a model in memory, which may be changed in place between calls.

        Each measure is taken on its own and with the same seeds, so its score depends neither on
        the other measures nor on their order. Random generators and thread count are left as found.

        Raises:
            StepError: where it cannot be measured, or a task does not have the metric asked for.
        """
        return self._scorer.score(model, tokenizer, measures, progress)

    def prompts(
        self, model: Any, tokenizer: Any, measures: Sequence[Measure], *, most: int
    ) -> dict[str, list[str]]:
        """What the model is asked, by measure name: with examples and chat template, without answers.

        The first `most` prompts of a task; of a group as many, from the beginnings of all its tasks.

        Raises:
            StepError: as `build` does.
        """
        return self._scorer.prompts(model, tokenizer, measures, most=most)

    def content(self, measure: Measure) -> Any | None:
        """What decides a measure's score besides the model and the settings; None where that is unknown."""
        return self.kind.content(measure, self.conditions)

    def key(self, fingerprint: str, measure: Measure) -> str | None:
        """The name of a score in the cache; None where it cannot be kept."""
        return cache.key(fingerprint, measure, self.content(measure), self.conditions)

    def _known(self, fingerprint: str | None, measure: Measure) -> Score | None:
        if self._home is None or fingerprint is None:
            return None
        key = self.key(fingerprint, measure)
        return None if key is None else cache.read(self._home, key)

    def _keep(self, fingerprint: str | None, measure: Measure, score: Score) -> None:
        if self._home is None or fingerprint is None:
            return
        # The key is made again: a data set that had to be fetched has a commit only now.
        key = self.key(fingerprint, measure)
        if key is not None:
            cache.write(self._home, key, score)
