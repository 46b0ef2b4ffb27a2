"""Measuring a model with lm_eval, in this process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mergelab.core.errors import MergelabError, StepError, summary
from mergelab.evaluation import results, tasks
from mergelab.evaluation.isolation import seeded, silence_lm_eval, threads
from mergelab.evaluation.measures import Measure
from mergelab.evaluation.scorer import Conditions, Progress, Scorer
from mergelab.result import Score

_RESAMPLES = 1000
"""For the metrics whose standard error lm_eval bootstraps: good to 2 % of itself."""


class LmEvalScorer(Scorer):
    """lm_eval with its tasks built once, for any number of models.

    Args:
        conditions: what models are measured under.
        build: lm_eval's tasks by name, from their names.
    """

    def __init__(self, conditions: Conditions, build: Callable[[Sequence[str]], dict[str, Any]]):
        super().__init__(conditions)
        self._build = build
        self._built: dict[str, Any] = {}

    def build(self, measures: Sequence[Measure]) -> None:
        """Build the tasks of `measures` that have not been built yet, and read their data.

        Raises:
            StepError: naming task and data set, where one is unknown, broken, or not here.
        """
        new = {measure.task for measure in measures} - set(self._built)
        if new:
            with silence_lm_eval(logging.ERROR), seeded(self.conditions.seed):
                self._built |= self._build(sorted(new))

    def score_folder(
        self,
        path: Path,
        measures: Sequence[Measure],
        adapter: Path | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Score]:
        """The model is asked through `eval.backend`, its tasks being built before it is loaded.

        Raises:
            StepError: where it cannot be loaded or measured.
        """
        c = self.conditions
        self.build(measures)
        if c.settings.backend != "vllm":
            return super().score_folder(path, measures, adapter, progress)
        from mergelab.evaluation import vllm_backend

        with vllm_backend.engine(
            path,
            c.hardware,
            max_length=c.settings.max_length,
            seed=c.seed,
            trust_remote_code=c.trust_remote_code,
        ) as lm:
            self._check_template(lm.tokenizer)
            return {m.name: self._score(lm, m, progress) for m in measures}

    def prompts(
        self, model: Any, tokenizer: Any, measures: Sequence[Measure], *, most: int
    ) -> dict[str, list[str]]:
        """What the model is asked, by measure name: with examples and chat template, without answers.

        The first `most` prompts of a task; of a group as many, from the beginnings of all its tasks.

        Raises:
            StepError: as `build` does.
        """
        from mergelab.evaluation.lm_eval_adapter import CountingLM, templates_compiled_once

        settings, seed = self.conditions.settings, self.conditions.seed
        self.build(measures)
        with silence_lm_eval(logging.ERROR), seeded(seed), templates_compiled_once():
            template = None
            if settings.chat_template:
                template = CountingLM(model, tokenizer, 1, settings.max_length).apply_chat_template
            return {
                m.name: tasks.prompts(self._built[m.task], settings.limit, most, seed, template)
                for m in measures
            }

    def score(
        self,
        model: Any,
        tokenizer: Any,
        measures: Sequence[Measure],
        progress: Progress | None = None,
    ) -> dict[str, Score]:
        """Scores by measure name of a model in memory, which may be changed in place between calls.

        Each measure is taken on its own and with the same seeds, so its score depends neither on
        the other measures nor on their order. Random generators and thread count are left as found.

        Raises:
            StepError: where a task cannot be measured, or does not have the metric asked for.
        """
        from mergelab.evaluation.lm_eval_adapter import CountingLM

        settings = self.conditions.settings
        self._check_template(tokenizer)
        self.build(measures)
        with silence_lm_eval(logging.ERROR):
            lm = CountingLM(model, tokenizer, settings.batch_size, settings.max_length)
        many = threads(model, self.conditions.hardware)
        return {m.name: self._score(lm, m, progress, many) for m in measures}

    def _check_template(self, tokenizer: Any) -> None:
        if self.conditions.settings.chat_template and not getattr(tokenizer, "chat_template", None):
            raise StepError(
                "eval.chat_template=true, but the model's tokenizer has no chat template; "
                "set eval.chat_template=false, or give the merged model one by model.chat_template"
            )

    def _score(self, lm: Any, measure: Measure, progress: Progress | None, many: int | None = None) -> Score:
        """One measure's score; `many` threads, or as many as there are."""
        from lm_eval.evaluator import evaluate

        from mergelab.evaluation.lm_eval_adapter import templates_compiled_once

        built = self._built[measure.task]
        leaves = built["tasks"].values()
        lm.watch(
            lambda: (request for task in leaves for request in task.instances),
            None if progress is None else lambda done, total: progress(measure.name, done, total),
        )
        for task in leaves:
            task.set_fewshot_seed(self.conditions.seed)
        try:
            with silence_lm_eval(), seeded(self.conditions.seed, many), templates_compiled_once():
                found = evaluate(
                    lm,
                    built,
                    limit=self.conditions.settings.limit,
                    bootstrap_iters=_RESAMPLES,
                    # Standard errors of perplexities are made from the documents' answers.
                    log_samples=any(t.OUTPUT_TYPE == "loglikelihood_rolling" for t in leaves),
                    apply_chat_template=self.conditions.settings.chat_template,
                    fewshot_as_multiturn=self.conditions.settings.chat_template,
                )
        except MergelabError:
            raise
        except Exception as e:
            memory = "out of memory" in str(e).lower()
            remedy = "; lower eval.batch_size or set eval.max_length" if memory else ""
            raise StepError(
                f"'{measure.name}' (task {measure.task}) could not be measured: {summary(e)}{remedy}"
            ) from e
        return results.read(found, measure)
