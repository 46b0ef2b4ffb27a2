"""Merges and measures candidates: the experts in memory, one live model, the tasks built once."""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mergelab import context, evaluation
from mergelab.core import heartbeat
from mergelab.core.errors import InputError, InputErrors, MergelabError, StepError, flattened
from mergelab.core.registry import use_extensions
from mergelab.evaluation import Evaluator, Measure
from mergelab.models import blueprint, checkpoint
from mergelab.models.checkpoint import ModelMetadata
from mergelab.preflight import engine_selection, recipe_checks, resolve_inputs
from mergelab.preflight.resolve_inputs import Inputs
from mergelab.schema import Run

if TYPE_CHECKING:
    from mergelab.merging.in_memory import Resident

log = logging.getLogger(__name__)

Scores = dict[str, dict[str, Any]]
"""For each measure its Score as a mapping."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one candidate."""

    scores: Scores | None = None
    reason: str | None = None
    """Why there are none."""


def search_measures(run: Run) -> list[Measure]:
    """The measures that the fitness is the mean of.

    Raises:
        InputError: where there are none, or only those that the result is reported on.
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
    """Merges and measures candidates of one composed run, whatever their weights.

    Args:
        run: any of the candidates.
    """

    def __init__(self, run: Run):
        use_extensions(run.composition)
        self.run = run
        self._evaluators: dict[float, Evaluator] = {}
        self._live: Resident | None = None

    def measure(self, run: Run, measures: Sequence[Measure], share: float = 1.0) -> Scores:
        """The scores of a candidate.

        Args:
            run: the candidate.
            measures: what to measure.
            share: of the prompts of each task, the first ones.
        Raises:
            StepError: where it cannot be merged or measured.
            InputErrors: where its values are not possible.
        """
        model, tokenizer = self.merge(run)
        scores = self._evaluator(share).score(model, tokenizer, measures, progress=_report)
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
            StepError: where the method has no answer for a tensor.
            InputErrors: where the candidate's values are not possible.
        """
        from mergelab.merging import prepared_merge

        inputs, facts = self._inputs
        recipe, findings = recipe_checks.recipe_of(run, inputs, facts, facts[inputs.sources[0].name], [])
        if wrong := [f.text() for f in findings if f.severity == "error"]:
            raise InputErrors(wrong)
        assert recipe is not None
        by_reference = {s.reference: facts[s.name] for s in inputs.sources}
        names = {s.reference: s.name for s in inputs.sources}
        prepared = prepared_merge.prepare(run, recipe, by_reference, names)
        if self._live is None:
            folders = {s.name: s.folder for s in inputs.sources}
            config_source = folders[inputs.config_source] if inputs.config_source else None
            assert config_source is not None
            self._live = prepared.live_model(config_source)
        return prepared.merge_into(self._live)

    @cached_property
    def _inputs(self) -> tuple[Inputs, dict[str, ModelMetadata]]:
        """The models that take part, and what is known of each by its name."""
        from mergelab.merging import node_local_cache

        inputs = resolve_inputs.find(self.run, lambda role: context.family(self.run).checkpoint(role))
        facts = {
            s.name: checkpoint.read(node_local_cache.copy_of(s.folder), s.key)
            for s in inputs.sources
            if s.folder
        }
        return inputs, facts


def _report(what: str, done: int, total: int) -> None:
    heartbeat.report_progress(f"evaluate {what}", done, total)


def run_guarded(work: Callable[[], Scores], timeout: float | None) -> Outcome:
    """Evaluate one candidate. An exception becomes its outcome, except KeyboardInterrupt.

    Args:
        work: gives its scores.
        timeout: seconds that it may take.
    """
    try:
        with time_limit(timeout):
            return Outcome(scores=work())
    except MergelabError as e:
        return Outcome(reason=" ".join(str(e).split()))
    except TimeoutError:
        return Outcome(reason=f"out of time, {timeout:g} s")
    except Exception as e:  # a candidate must not end the search
        log.exception("a candidate failed")
        return Outcome(reason=flattened(e)[:300])


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError in the body after some seconds, in a process's main thread."""
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
    """Check that our kernels can merge the candidates of a run.

    Raises:
        InputError: where only mergekit's own engine can.
    """
    engine: engine_selection.Engine | None = plan.engine
    if engine is not None and engine.name != "fast":
        raise InputError(
            "search: candidates are merged in memory by the fast engine, and it does not apply: "
            f"{engine.why}\n"
            "A sweep of Hydra's merges each to disk: -m hydra/sweeper=nevergrad"
        )
    source = plan.facts.get(plan.config_source or "")
    found = blueprint.of(source) if source else None
    if found and found.packed:
        raise InputError(
            f"search: candidates are merged into a live model, and transformers makes other tensors of "
            f"{min(found.packed)} and its like when it loads one\n"
            "A sweep of Hydra's merges each to disk: -m hydra/sweeper=nevergrad"
        )


def finite(scores: Scores) -> Scores:
    """The scores, if all of them are finite.

    Raises:
        StepError: where one is not.
    """
    for name, score in scores.items():
        if not math.isfinite(score["value"]):
            raise StepError(f"{name} is {score['value']}: the model gives no usable numbers")
    return scores
