"""`EvaluationKind`: what one `eval.kind` measures, and how. Ours are in `kinds/`, and users add their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mergelab import config_errors
from mergelab.core.errors import InputError, MergelabError, StepError, summary
from mergelab.core.findings import Finding
from mergelab.core.library_output import silence_libraries
from mergelab.core.registry import OURS, Registry, explained, line_of
from mergelab.evaluation.isolation import seeded, threads
from mergelab.evaluation.measures import Measure
from mergelab.evaluation.scorer import Conditions, Progress, Scorer
from mergelab.result import Score
from mergelab.schema import Evaluation, Run

Split = Literal["validation", "search"]
SPLITS: tuple[Split, ...] = ("validation", "search")
"""What results are reported on, and what a search uses as fitness: other data."""

SCORE_SETTINGS = ("num_fewshot", "limit", "chat_template", "max_length", "batch_size", "backend")
"""Settings of every evaluation on which its scores depend."""


@dataclass
class NoOptions:
    """Of a kind that has none."""


class EvaluationKind:
    """What one `eval.kind` measures, and how.

    A kind of your own is a subclass with `measures`, and with `score` or `score_folder`. An object of it is
    registered by `register("NAME", ...)`, and then chosen by `eval.kind=NAME`. It keeps no state.
    """

    options: type[Any] = NoOptions
    """A dataclass: the keys of `eval.options`, their types and defaults. A ValueError that its
    `__post_init__` raises is reported to the user."""
    settings_read: frozenset[str] = frozenset()
    """Which settings of `eval` it reads of those that only some kinds read: see `validation.OPTIONAL`."""
    backends: tuple[str, ...] = ("hf",)
    """Values of `eval.backend` that it can work with."""
    packages: tuple[str, ...] = ("transformers", "torch")
    """Installed packages on whose versions scores depend."""
    measures_nothing = False
    language_models = False
    """Whether it measures language models alone, which continue text and have a tokenizer."""
    uses_task_files = False
    """Whether it needs the lm_eval task files of the model's family."""
    has_prompts = False
    """Whether its measures have prompts, which can be followed through a mixture of experts."""
    validation_is_benchmark = True
    """Whether validation scores are reported as a benchmark's, so that nothing else should be measured on
    that split unless `eval.allow_test_split` says so."""
    other_data = "give this kind of evaluation measures for the search split"
    """What a user can do where there is nothing for a search but what results are reported on."""

    def measures(self, run: Run, split: Split) -> Sequence[Measure]:
        """What is measured on a split. Search data must be other data than those of validation: none for
        "search" means that a search has no fitness by this kind.

        `eval.shares` and `eval.metrics` are applied to it afterwards.
        """
        raise NotImplementedError

    def score(self, model: Any, tokenizer: Any, measure: Measure, conditions: Conditions) -> Score:
        """Measure a model that is loaded, on its device, in evaluation mode, and leave it as it is.

        Random generators are seeded before each call. A score that is not a finite number makes a
        candidate of a search fail.
        """
        raise NotImplementedError

    def score_folder(self, folder: Path, measure: Measure, conditions: Conditions) -> Score:
        """Measure the model in a folder, for a kind without `score`. A search cannot use such a kind."""
        raise NotImplementedError

    def check(self, run: Run, tasks_path: Path | None = None) -> Iterable[Finding]:
        """What is wrong with the run's settings for this kind, besides what is checked for all of them."""
        return ()

    def content(self, measure: Measure, conditions: Conditions) -> Any | None:
        """What decides the measure's score besides code, options and `SCORE_SETTINGS`, as JSON can write
        it: hashes of data files. None where it cannot be known; scores are then not cached."""
        return {}

    def data(self, run: Run) -> list[str]:
        """The names of data that `Scorer.build` downloads where they are not on this machine."""
        return []

    def is_local(self, run: Run) -> bool:
        """Whether it needs nothing but files of this machine."""
        return False

    def scorer(self, conditions: Conditions) -> Scorer:
        """What measures models by this kind."""
        return FunctionScorer(conditions, self)

    @property
    def in_memory(self) -> bool:
        """Whether it can measure a loaded model, as a search needs it."""
        return type(self).score_folder is EvaluationKind.score_folder

    def options_of(self, settings: Evaluation) -> Any:
        """`eval.options`, typed.

        Raises:
            InputError: for a key that there is not, and for a value of another type.
        """
        try:
            whole = OmegaConf.create({"eval": {"options": OmegaConf.structured(self.options)}})
            return OmegaConf.to_object(OmegaConf.merge(whole, _nested(settings.options)).eval.options)
        except OmegaConfBaseException as e:
            if not fields(self.options):
                raise InputError(f"eval.options: eval.kind={settings.kind} has no options") from None
            raise InputError(config_errors.explain(e)) from None
        except ValueError as e:
            raise InputError(f"eval.options: {e}") from None


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"eval": {"options": dict(options)}}


class FunctionScorer(Scorer):
    """Measures by the functions of a kind."""

    def __init__(self, conditions: Conditions, kind: EvaluationKind):
        super().__init__(conditions)
        self._kind = kind
        self.language_models = kind.language_models

    def score(
        self, model: Any, tokenizer: Any, measures: Sequence[Measure], progress: Progress | None = None
    ) -> dict[str, Score]:
        """Each measure by itself, with the same seeds."""
        many = threads(model, self.conditions.hardware)
        return self._each(
            measures, lambda m: self._kind.score(model, tokenizer, m, self.conditions), progress, many
        )

    def score_folder(
        self,
        path: Path,
        measures: Sequence[Measure],
        adapter: Path | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Score]:
        """Load the model where the kind measures loaded ones."""
        if self._kind.in_memory:
            return super().score_folder(path, measures, adapter, progress)
        return self._each(
            measures, lambda m: self._kind.score_folder(path, m, self.conditions), progress, None
        )

    def _each(
        self,
        measures: Sequence[Measure],
        score: Callable[[Measure], Score],
        progress: Progress | None,
        many: int | None,
    ) -> dict[str, Score]:
        import torch

        kind, out = self.conditions.settings.kind, {}
        for measure in measures:
            try:
                with silence_libraries(), torch.inference_mode(), seeded(self.conditions.seed, many):
                    out[measure.name] = score(measure)
            except MergelabError:
                raise
            except Exception as e:
                file = KINDS.origin(kind).label
                at = line_of(e, file)
                where = f"{file}{at}: " if at else ""
                what = f"'{measure.name}' (eval.kind={kind})"
                raise StepError(f"{what} could not be measured: {where}{summary(e)}") from e
            if not isinstance(out[measure.name], Score):
                raise StepError(f"eval.kind={kind}: it returned {out[measure.name]!r}, which is not a Score")
            if progress is not None:
                progress(measure.name, 1, 1)
        return out


# ---------------------------------------------------------------- which kinds there are

KINDS: Registry[EvaluationKind] = Registry(
    "evaluations",
    "kind of evaluation",
    tuple(f"mergelab.evaluation.kinds.{name}" for name in ("skills", "tasks", "perplexity", "none")),
)


def register(name: str, kind: EvaluationKind) -> EvaluationKind:
    """Make a kind known by a name, from the module that is being imported.

    Raises:
        InputError: where the name is taken by a kind from elsewhere.
        TypeError: where it is not an EvaluationKind, or its options are not a dataclass.
    """
    if not isinstance(kind, EvaluationKind):
        raise TypeError(f"'{name}' is not an object of a subclass of EvaluationKind: {kind!r}")
    if not is_dataclass(kind.options):
        raise TypeError(f"the options of '{name}' are not a dataclass: {kind.options!r}")
    return KINDS.add(name, kind)


def kind_of(settings: Evaluation) -> EvaluationKind:
    """The kind that `eval.kind` names.

    Raises:
        InputError: where there is no such kind.
    """
    try:
        return KINDS.get(settings.kind)
    except LookupError as e:
        raise InputError(f"eval.kind: {e.args[0]}") from None


def known_kind(settings: Evaluation) -> EvaluationKind | None:
    """The kind that `eval.kind` names, or None where `check` has to report it."""
    return KINDS.get(settings.kind) if settings.kind in KINDS else None


def measures_anything(settings: Evaluation) -> bool:
    """Whether models are measured at all."""
    kind = known_kind(settings)
    return kind is None or not kind.measures_nothing


def measures(run: Run, split: str = "validation") -> list[Measure]:
    """The measures of a run on one split, "validation" or "search", with the shares and metrics that
    `eval.shares` and `eval.metrics` give them.

    Raises:
        ValueError: for another split.
        InputError: for an unknown `eval.kind`, or wrong `eval.options`.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; choose validation or search")
    kind, metrics, shares = kind_of(run.eval), run.eval.metrics, run.eval.shares
    origin = KINDS.origin(run.eval.kind)
    with nullcontext() if origin is OURS else explained(origin.label):
        return [
            replace(m, metric=metrics.get(m.name, m.metric), share=shares.get(m.name, m.share))
            for m in kind.measures(run, split)
        ]


def score_settings(settings: Evaluation) -> dict[str, Any]:
    """All settings on which scores depend: a part of the keys of scores, runs and sweeps. A user's own kind
    adds its options, and a hash of its code.

    Raises:
        InputError: for an unknown `eval.kind`, or wrong `eval.options`.
    """
    out = {name: getattr(settings, name) for name in SCORE_SETTINGS}
    kind = kind_of(settings)
    origin = KINDS.origin(settings.kind)
    if origin is OURS:
        return out
    return out | {
        "kind": settings.kind,
        "options": asdict(kind.options_of(settings)),
        "code": origin.digest,
    }
