"""Where candidates are made and measured: the experts in memory, one live model, the tasks built once."""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from mergelab import context, evaluation
from mergelab.core import heartbeat
from mergelab.core.errors import InputError, InputErrors, MergelabError, StepError, flattened
from mergelab.core.registry import use_extensions
from mergelab.evaluation import Evaluator, Measure
from mergelab.methods import registry
from mergelab.models import checkpoint
from mergelab.preflight import engine_selection, recipe_checks, resolve_inputs
from mergelab.recipes import tensor_plan
from mergelab.schema import Run

log = logging.getLogger(__name__)

Scores = dict[str, dict[str, Any]]
"""For each measure its Score as a mapping."""


@dataclass(frozen=True)
class Outcome:
    """What came of one candidate."""

    scores: Scores | None = None
    reason: str | None = None
    """Why there are none."""


def search_measures(run: Run) -> list[Measure]:
    """What the fitness is made of.

    Raises:
        InputError: where there is nothing to measure, or nothing but what the result is reported on.
    """
    kind = evaluation.kind_of(run.eval)
    if kind.measures_nothing:
        raise InputError("eval: a search needs an evaluation\nChoose one, such as eval=skills.")
    if not kind.in_memory:
        raise InputError(
            f"eval: eval.kind={run.eval.kind} measures a model's folder, and a search measures candidates in "
            "memory\nA sweep of Hydra's merges each to disk: -m hydra/sweeper=nevergrad"
        )
    found = evaluation.measures(run, "search")
    if found:
        return found
    reported = evaluation.measures(run, "validation")
    if not run.eval.allow_test_split:
        names = ", ".join(m.task for m in reported)
        remedy = f"{kind.other_data}, or accept it: eval.allow_test_split=true"
        raise InputError(
            f"eval: the search would optimize {names}, on which its result is reported\n"
            f"{remedy[0].upper()}{remedy[1:]}"
        )
    return reported


class CandidateEvaluator:
    """Makes and measures candidates of one composed run, whatever their weights.

    Raises:
        InputErrors: where the run cannot be merged in memory.
    """

    def __init__(self, run: Run):
        use_extensions(run.composition)
        self.run = run
        self._evaluators: dict[float, Evaluator] = {}
        self._resident: Any = None
        self._asked: Any = None

    def measure(self, run: Run, measures: Sequence[Measure], share: float = 1.0) -> Scores:
        """The scores of a candidate.

        Args:
            run: the candidate.
            measures: what to measure.
            share: of the prompts of each task, the first ones.
        Raises:
            StepError, InputErrors: where it cannot be merged or measured.
        """
        model, tokenizer = self.merge(run)
        scores = self._evaluator(share).score(model, tokenizer, measures, progress=_told)
        return {name: asdict(score) for name, score in scores.items()}

    def _evaluator(self, share: float) -> Evaluator:
        if share not in self._evaluators:
            limit = self.run.eval.limit
            if share < 1:
                limit = (
                    share if limit is None else max(1, int(limit * share)) if limit >= 1 else limit * share
                )
            settings = replace(self.run, eval=replace(self.run.eval, limit=limit, cache=False))
            self._evaluators[share] = context.evaluator(settings)
        return self._evaluators[share]

    def merge(self, run: Run) -> tuple[Any, Any]:
        """A candidate as the live model, and the tokenizer.

        Raises:
            StepError, InputErrors: where it cannot be merged.
        """
        from mergelab.merging import backends, node_local_cache
        from mergelab.merging.in_memory import Resident

        if self._asked is None:
            self._asked = resolve_inputs.find(run, lambda role: context.family(run).checkpoint(role))
            self._facts = {
                s.name: checkpoint.read(node_local_cache.copy_of(s.folder), s.key)
                for s in self._asked.sources
                if s.folder
            }
            self._by_reference = {s.reference: self._facts[s.name] for s in self._asked.sources}
        shape = self._facts[self._asked.sources[0].name]
        recipe, findings = recipe_checks.recipe_of(run, self._asked, self._facts, shape, [])
        if wrong := [f.text() for f in findings if f.severity == "error"]:
            raise InputErrors(wrong)
        assert recipe is not None
        outputs = tensor_plan.assemble(recipe, self._by_reference, registry.get(recipe["merge_method"]))
        if self._resident is None:
            sources = self._asked.sources
            config_source = next(s.folder for s in sources if s.name == self._asked.config_source)
            self._resident = Resident(
                config_source,
                outputs,
                {s.reference: s.name for s in sources},
                hardware=run.hardware,
                template=backends.template(recipe),
            )
        model = self._resident.merge(
            recipe["merge_method"],
            outputs,
            seed=run.seed,
            rescale=run.method.rescale,
            dtype=backends.arithmetic(recipe, shape.dtype),
        )
        return model, self._resident.tokenizer


def _told(what: str, done: int, total: int) -> None:
    heartbeat.report_progress(f"evaluate {what}", done, total)


def run_guarded(work: Callable[[], Scores], timeout: float | None) -> Outcome:
    """Do the work of one candidate; what goes wrong is its outcome, but for Ctrl-C."""
    try:
        with time_limit(timeout):
            return Outcome(scores=work())
    except MergelabError as e:
        return Outcome(reason=" ".join(str(e).split()))
    except TimeoutError:
        return Outcome(reason=f"out of time, {timeout:g} s")
    except Exception as e:  # a candidate must not end the sweep
        log.exception("a candidate failed")
        return Outcome(reason=flattened(e)[:300])


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError after a while, in a process's main thread."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_engine(run: Run, plan: Any) -> None:
    """Raise InputError where only mergekit's own path could merge a run."""
    engine: engine_selection.Engine | None = plan.engine
    if engine is not None and engine.name != "fast":
        raise InputError(
            f"search: candidates are merged in memory by our own kernels, and cannot be: {engine.why}\n"
            "A sweep of Hydra's merges each to disk: -m hydra/sweeper=nevergrad"
        )


def finite(scores: Scores) -> Scores:
    """Raise StepError where a score is no number."""
    for name, score in scores.items():
        if not math.isfinite(score["value"]):
            raise StepError(f"{name} is {score['value']}: the model gives no usable numbers")
    return scores
