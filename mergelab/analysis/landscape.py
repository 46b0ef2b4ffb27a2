"""Models along a line or on a plane, merged in memory one after another and evaluated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab import evaluation
from mergelab.analysis.affine import BASE, Coordinates, Span
from mergelab.core.errors import InputErrors
from mergelab.evaluation import Evaluator, Measure, Score
from mergelab.evaluation.isolation import SMALL
from mergelab.methods import registry
from mergelab.models.checkpoint import ModelMetadata
from mergelab.preflight import engine_selection, reads_file
from mergelab.recipes import recipe as recipes
from mergelab.schema import Method, Run

if TYPE_CHECKING:
    from mergelab.merging.in_memory import Resident

METHOD = Method(
    name="task_arithmetic",
    base="model",
    parameters={"lambda": 1.0, "normalize": False, "rescale": False, "int8_mask": False},
)
"""With the weights of `Span.weights` it gives every affine combination of base and experts. The same as
`method=task_arithmetic`."""


class Unmergeable(Exception):
    """Only mergekit could make these models; the message says why."""


@dataclass(frozen=True)
class Point:
    """A model and its scores."""

    at: Coordinates
    weights: Mapping[str, float]
    """Weights of the task vectors, by expert. The base has the rest to 1."""
    scores: Mapping[str, Score]
    """Scores by measure."""
    fitness: float | None
    """None if a score is not finite, which happens far from the experts."""

    def json(self) -> dict[str, Any]:
        """As result.json has it."""
        scores = {name: asdict(s) for name, s in self.scores.items()}
        return {"weights": dict(self.weights), "fitness": self.fitness, "scores": scores}


class Landscape:
    """Merges and evaluates the models of a line or plane.

    Args:
        run: The composed run: hardware, seed, and the experts.
        span: The models that span it.
        folders: The folders of the base and of the experts, by name.
        facts: Their metadata, by name.

    Raises:
        Unmergeable: Our own kernels cannot make these models.
        InputErrors: The run's settings are wrong.
    """

    def __init__(self, run: Run, span: Span, folders: Mapping[str, Path], facts: Mapping[str, ModelMetadata]):
        self.span, self._run, self._base = span, run, facts[BASE]
        names = (BASE, *(m for m in span.models if m != BASE))
        self._config_source, self._references = folders[BASE], {n: str(folders[n]) for n in names}
        self._facts = {self._references[n]: facts[n] for n in names}
        self._method = registry.get(METHOD.name)
        recipe = self._recipe(span.corners()[0])
        asked = replace(run, method=METHOD)
        engine, findings = engine_selection.choose(asked, recipe, self._facts, self._method)
        if engine.name != "fast":
            raise Unmergeable(engine.why)
        if wrong := [f.text() for f in findings if f.severity == "error"]:
            raise InputErrors(wrong)
        self._live: Resident | None = None

    def measure(
        self, points: Sequence[Coordinates], measures: Sequence[Measure], evaluator: Evaluator
    ) -> Iterator[Point]:
        """Merge and evaluate the model at each point.

        Yields:
            Each point as soon as it has been evaluated.

        Raises:
            StepError: A model cannot be merged or evaluated.
        """
        for at in points:
            model, tokenizer = self._merge(at)
            scores = evaluator.score(model, tokenizer, measures)
            sound = all(math.isfinite(s.value) for s in scores.values())
            fitness = evaluation.fitness(scores, measures) if sound else None
            yield Point(at, self.span.weights(at), scores, fitness)

    def _merge(self, at: Coordinates) -> tuple[Any, Any]:
        """The live model of a point, valid until the next call, and the tokenizer."""
        from mergelab.merging import prepared_merge

        hardware = self._run.hardware
        if self._base.parameters < SMALL and hardware.threads is None:
            hardware = replace(hardware, threads=1)  # more threads would mostly wait for each other
        run = replace(self._run, method=METHOD, hardware=hardware)
        names = {reference: name for name, reference in self._references.items()}
        prepared = prepared_merge.prepare(run, self._recipe(at), self._facts, names)
        if self._live is None:
            self._live = prepared.live_model(self._config_source)
        return prepared.merge_into(self._live)

    def _recipe(self, at: Coordinates) -> dict[str, Any]:
        weights = self.span.weights(at)
        experts = {
            n: replace(self._run.experts[n], weight=w, density=None, parameters={})
            for n, w in weights.items()
        }
        run = replace(self._run, method=METHOD, experts=experts)
        return recipes.build(run, self._references, self._method.used, self._base.dtype)


def reason_for_none(run: Run) -> str | None:
    """Why the run's settings allow no landscape; None if they allow one."""
    if not run.analyze.landscape:
        return "analyze.landscape=false"
    if reads_file(run):
        return f"method={run.method.name} reads a file instead of experts"
    reported = evaluation.measures(run, "validation")
    if not reported and not evaluation.measures(run, "search"):
        return "nothing is measured (eval=none)"
    kind = evaluation.kind_of(run.eval)
    if not kind.in_memory:
        return f"eval.kind={run.eval.kind} measures a model's folder, and its models are in memory"
    if not landscape_measures(run)[0]:
        names = ", ".join(m.task for m in reported)
        remedy = f"{kind.other_data}, or accept it: eval.allow_test_split=true"
        return f"it would be measured on {names}, on which results are reported: {remedy}"
    return None


def landscape_measures(run: Run) -> tuple[list[Measure], str]:
    """What the landscape is made of, and the split that it is on: as of a search, not what results are
    reported on, unless that is allowed, or a text that the user has chosen."""
    found = evaluation.measures(run, "search")
    if found or (evaluation.kind_of(run.eval).validation_is_benchmark and not run.eval.allow_test_split):
        return found, "search"
    return evaluation.measures(run, "validation"), "validation"


def best(points: Sequence[Point]) -> Point | None:
    """The fittest point; of several, the one with the smallest weights. None if no fitness is finite."""
    found = [(p.fitness, -math.hypot(*p.weights.values()), p) for p in points if p.fitness is not None]
    return max(found, key=lambda f: f[:2])[2] if found else None


def overrides(typed: Iterable[str], run: Run, weights: Mapping[str, float]) -> list[str]:
    """The command-line arguments that merge a model of the landscape.

    Args:
        typed: The arguments of this run.
        run: The composed run.
        weights: The weights of the experts.
    """
    kept = [o for o in typed if not _is_replaced(o.lstrip("+~").partition("=")[0].split("."))]
    out = [*kept, f"method={METHOD.name}", *(f"experts.{n}.weight={w:g}" for n, w in weights.items())]
    # Parameters that task_arithmetic does not take, whether they come from a file or were typed.
    out += [f"~experts.{n}.parameters" for n in weights if run.experts[n].parameters]
    return out + [f"~experts.{n}" for n in run.experts if n not in weights]


def _is_replaced(key: list[str]) -> bool:
    """Whether the landscape sets a key itself, or a merge does not use it."""
    if key[0] == "experts" and len(key) > 2:
        return key[2] not in ("path", "revision", "parameters")
    return key[0] in ("job", "method", "analyze", "hydra")
