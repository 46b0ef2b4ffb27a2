"""Measuring a model with lm_eval, in this process and, where nothing must be fetched, offline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mergelab.core.errors import MergelabError, StepError
from mergelab.evaluation import cache, results, tasks
from mergelab.evaluation.isolation import seeded, silence_lm_eval
from mergelab.evaluation.loading import load
from mergelab.evaluation.measures import Measure
from mergelab.evaluation.task_index import Catalogue
from mergelab.result import Score
from mergelab.schema import Evaluation, Hardware

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with a measure's name, how many of its requests are answered, and how many there are."""

SMALL = 10_000_000
"""Parameters. Below, threads mostly wait for one another: on two busy cores the tiny family took
85 s with two threads and 3 s with one."""

_RESAMPLES = 1000
"""For the metrics whose standard error lm_eval bootstraps: good to 2 % of itself."""


def threads(model: Any, hardware: Hardware) -> int | None:
    """Threads for a model: those asked for, and else one for a model too small to share out."""
    small = hardware.device == "cpu" and model.num_parameters() < SMALL
    return hardware.threads or (1 if small else None)


class Evaluator:
    """lm_eval with its tasks built once, for any number of models.

    Building a task and reading its data can cost more than measuring a small model by it, so keep
    one Evaluator for all the models and splits of a process.
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
        """Nothing heavy happens here.

        `tasks_path` is the folder of the model family's own tasks. Scores are kept under
        `home/scores`; without a home, or with `eval.cache=false`, nothing is kept or reused.
        """
        self.settings = settings
        self.hardware = hardware
        self.seed = seed
        self.trust_remote_code = trust_remote_code
        self.home = home if settings.cache else None
        own = settings.include_path
        folders = [tasks_path, Path(own).expanduser() if own is not None else None]
        self.catalogue = Catalogue([folder.resolve() for folder in folders if folder is not None])
        self._built: dict[str, Any] = {}

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

        `adapter` is the folder of a LoRA to put into it (backend hf). `fingerprint` is a hash of the
        content of both; without one the cache is not used. The model
        is loaded once, and not at all where every score is known; tasks are built before it is,
        so that what is wrong with one shows first.

        Raises StepError as `load` (or `by_vllm.engine`), `build` and `score` do.
        """
        scores: dict[str, Score] = {}
        for measure in measures:
            known = self._known(fingerprint, measure)
            if known is not None:
                scores[measure.name] = known
        todo = [measure for measure in measures if measure.name not in scores]
        if todo:
            self.build(todo)
            scores |= self._evaluate(path, adapter, todo, progress)
            for measure in todo:
                self._keep(fingerprint, measure, scores[measure.name])
        return {measure.name: scores[measure.name] for measure in measures}

    def _evaluate(
        self, path: Path, adapter: Path | None, measures: Sequence[Measure], progress: Progress | None
    ) -> dict[str, Score]:
        """Scores of the model in a folder, whose tasks are built, asked through `eval.backend`."""
        if self.settings.backend == "vllm":
            from mergelab.evaluation import vllm_backend

            with vllm_backend.engine(
                path,
                self.hardware,
                max_length=self.settings.max_length,
                seed=self.seed,
                trust_remote_code=self.trust_remote_code,
            ) as lm:
                self._check_template(lm.tokenizer)
                return {m.name: self._score(lm, m, progress) for m in measures}
        model, tokenizer = load(
            path, self.hardware, adapter=adapter, trust_remote_code=self.trust_remote_code
        )
        return self.score(model, tokenizer, measures, progress=progress)

    def build(self, measures: Sequence[Measure]) -> None:
        """Build the tasks of `measures` that have not been built yet, and read their data.

        Raises StepError, naming task and data set, where one is unknown, broken, or not here.
        """
        new = {measure.task for measure in measures} - set(self._built)
        if new:
            with silence_lm_eval(logging.ERROR), seeded(self.seed):
                self._built |= tasks.build(sorted(new), self.catalogue, self.settings)

    def prompts(
        self, model: Any, tokenizer: Any, measures: Sequence[Measure], *, most: int
    ) -> dict[str, list[str]]:
        """What the model is asked, by measure name: with examples and chat template, without answers.

        The first `most` prompts of a task; of a group as many, from the beginnings of all its tasks.

        Raises StepError as `build` does.
        """
        from mergelab.evaluation.lm_eval_adapter import CountingLM, templates_compiled_once

        self.build(measures)
        with silence_lm_eval(logging.ERROR), seeded(self.seed), templates_compiled_once():
            template = None
            if self.settings.chat_template:
                template = CountingLM(model, tokenizer, 1, self.settings.max_length).apply_chat_template
            return {
                m.name: tasks.prompts(self._built[m.task], self.settings.limit, most, self.seed, template)
                for m in measures
            }

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

        Raises StepError where a task cannot be measured, or has not the metric asked for.
        """
        from mergelab.evaluation.lm_eval_adapter import CountingLM

        self._check_template(tokenizer)
        self.build(measures)
        with silence_lm_eval(logging.ERROR):
            lm = CountingLM(model, tokenizer, self.settings.batch_size, self.settings.max_length)
        many = threads(model, self.hardware)
        return {m.name: self._score(lm, m, progress, many) for m in measures}

    def _check_template(self, tokenizer: Any) -> None:
        if self.settings.chat_template and not getattr(tokenizer, "chat_template", None):
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
            task.set_fewshot_seed(self.seed)
        try:
            with silence_lm_eval(), seeded(self.seed, many), templates_compiled_once():
                found = evaluate(
                    lm,
                    built,
                    limit=self.settings.limit,
                    bootstrap_iters=_RESAMPLES,
                    # Standard errors of perplexities are made from the documents' answers.
                    log_samples=any(t.OUTPUT_TYPE == "loglikelihood_rolling" for t in leaves),
                    apply_chat_template=self.settings.chat_template,
                    fewshot_as_multiturn=self.settings.chat_template,
                )
        except MergelabError:
            raise
        except Exception as error:
            memory = "out of memory" in str(error).lower()
            remedy = "; lower eval.batch_size or set eval.max_length" if memory else ""
            raise StepError(
                f"'{measure.name}' (task {measure.task}) could not be measured: {results.gist(error)}{remedy}"
            ) from error
        return results.read(found, measure)

    def _known(self, fingerprint: str | None, measure: Measure) -> Score | None:
        key = self._key(fingerprint, measure)
        return cache.read(self.home, key) if self.home is not None and key is not None else None

    def _keep(self, fingerprint: str | None, measure: Measure, score: Score) -> None:
        # The key is made again: a data set that had to be fetched has a commit only now.
        key = self._key(fingerprint, measure)
        if self.home is not None and key is not None:
            cache.write(self.home, key, score)

    def _key(self, fingerprint: str | None, measure: Measure) -> str | None:
        if self.home is None or fingerprint is None:
            return None
        return cache.key(
            fingerprint,
            measure,
            self.catalogue,
            self.settings,
            device=self.hardware.device,
            quantize=self.hardware.quantize,
            seed=self.seed,
        )
