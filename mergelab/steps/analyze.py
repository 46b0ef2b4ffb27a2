"""analyze: how alike the experts are, and what lies between them, before weights are chosen."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from mergelab.analysis.comparison import BASE, Subjects, compared
from mergelab.context import evaluator
from mergelab.core.errors import InputError, StepError, did_you_mean
from mergelab.core.findings import Finding, error
from mergelab.core.run_dir import RunDir, short_path
from mergelab.evaluation import KINDS, Evaluator, Measure
from mergelab.jobs import Step, register
from mergelab.report import score_table, terminal
from mergelab.schema import Run

if TYPE_CHECKING:
    from mergelab.analysis.landscape import Landscape, Point
    from mergelab.analysis.parameter_groups import Comparison


def findings(run: Run) -> Iterator[Finding]:
    """What is wrong with the settings of this step."""
    a, names = run.analyze, (BASE, *run.experts)
    if a.landscape:
        why = "a landscape is measured on a model in memory whose weights are moved about"
        for key, value, only in (("hardware.quantize", run.hardware.quantize, "none"),
                                 ("eval.backend", run.eval.backend, "hf")):  # fmt: skip
            if value != only:
                remedy = f"Set {key}={only}, or analyze.landscape=false."
                yield error("setting", key, f"{value} is not possible, because {why}", remedy)
    if not a.models or run.eval.kind not in KINDS:
        return
    from mergelab.analysis.landscape import reason_for_none

    if reason := reason_for_none(run):
        yield error("setting", "analyze.models", f"it has no effect, because {reason}")
        return
    for name in a.models:
        if name not in names:
            near = did_you_mean(name, names)
            yield error(
                "setting", "analyze.models", f"there is no '{name}'.{near} There are {', '.join(names)}."
            )
    if len(set(a.models)) != len(a.models):
        yield error("setting", "analyze.models", f"it names one model twice: {', '.join(a.models)}")
    if len(a.models) not in (2, 3):
        yield error(
            "setting", "analyze.models", f"it names {len(a.models)}; two models span a line, three a plane"
        )


def execute(run: Run, run_dir: RunDir) -> str:
    """Show how alike the experts are, measure what lies between them, and leave pictures and numbers."""
    report = run_dir.folder / "report"
    subjects = Subjects.of(run, run_dir)
    landscape = prepare(run, subjects)
    comparison = compared(run, run_dir, subjects, top=run.analyze.top)
    if comparison is None:
        return "nothing to compare"
    from mergelab.report.analysis import files, tables

    if len(comparison.experts) > 1:
        tables.agreement(comparison)
        terminal.gap()
    stand_ins = dict(files.similarity(report, comparison))
    if landscape is not None:
        stand_ins |= survey(run, run_dir, landscape, comparison)
    if stand_ins:
        terminal.aside("in the pictures " + ", ".join(f"{short} = {w}" for w, short in stand_ins.items()))
    count = len(comparison.experts)
    return f"{count} expert{'s' * (count > 1)}, {short_path(report)}"


def prepare(run: Run, subjects: Subjects) -> Prepared | None:
    """All that has to be in order before anything is read; None where there is no landscape, and why is said.

    Raises:
        InputError: for a model that cannot take part, and data that are not here.
    """
    from mergelab.analysis.affine import Span
    from mergelab.analysis.landscape import Landscape, Unmergeable, landscape_measures, reason_for_none

    if reason := reason_for_none(run):
        if run.analyze.landscape:
            terminal.aside(f"no landscape, for {reason}")
        return None
    if not subjects.comparable:
        return None
    names = run.analyze.models or _usual(subjects.experts)
    if lacking := [n for n in names if n not in subjects.folders]:
        raise InputError(f"analyze.models: {', '.join(lacking)} has an adapter, and cannot span a landscape")
    try:
        landscape = Landscape(run, Span(tuple(names)), subjects.folders, subjects.facts)
    except Unmergeable as e:
        terminal.aside(f"no landscape because its models cannot be merged in memory: {e}")
        return None
    measures, split = landscape_measures(run)
    bench = evaluator(run)
    try:
        bench.build(measures)  # data that are not here must not show after all weights have been read
    except StepError as e:
        raise InputError(f"eval: {e}") from e
    return Prepared(landscape, measures, split, bench)


@dataclass(frozen=True)
class Prepared:
    """A landscape that can be measured."""

    landscape: Landscape
    measures: list[Measure]
    split: str
    bench: Evaluator


def _usual(experts: list[str]) -> list[str]:
    """What spans a landscape unless it is said: see `schema.Analyze.models`."""
    return experts if len(experts) == 2 else [BASE, *experts[:2]]


def survey(run: Run, run_dir: RunDir, ready: Prepared, comparison: Comparison) -> Mapping[str, str]:
    """Measure a landscape, and tell what is best in it.

    Returns:
        what the picture shows in the place of words (see `report.analysis.files`).
    Raises:
        InputError: where models that were named span nothing.
        StepError: where none of them gives usable numbers.
    """
    from mergelab.analysis.affine import position
    from mergelab.analysis.landscape import best, overrides
    from mergelab.report.analysis import files
    from mergelab.report.analysis.data import Land

    a, span = run.analyze, ready.landscape.span
    try:
        spots = span.positions(comparison.whole.dots, comparison.experts)
    except ValueError as e:
        if a.models:
            raise InputError(f"analyze.models: {e}") from e
        terminal.aside(f"no landscape, for {e}")
        return {}
    places = span.grid(a.points, a.margin)
    points: list[Point] = []
    with terminal.progress() as progress:
        progress("landscape", 0, len(places))
        for point in ready.landscape.measure(places, ready.measures, ready.bench):
            points.append(point)
            run_dir.event("point", weights=dict(point.weights), fitness=point.fitness)
            progress("landscape", len(points), len(places))
    top = best(points)
    if top is None:
        raise StepError("no model of the landscape gives usable numbers")
    arguments = overrides(run.overrides, run, top.weights)
    by_place = {p.at: p for p in points}
    corners = dict(zip(span.models, (by_place[at] for at in span.corners()), strict=True))
    run_dir.record(
        {
            "landscape": {
                "models": {n: p.json() for n, p in corners.items()},
                "split": ready.split,
                "points": len(points),
                "best": top.json(),
                "overrides": arguments,
            }
        }
    )
    land = Land(
        span.models, span.corners(), span.ticks(a.points, a.margin), points,
        lambda at: position(at, spots), top,
        {m.name: top.scores[m.name].higher_is_better for m in ready.measures},
        {m.name: m.share for m in ready.measures}, ready.split,
    )  # fmt: skip
    _tell(top, corners, ready, land.ticks)
    if all(a.isascii() for a in arguments):
        terminal.command(shlex.join(["python", "-m", "mergelab", *arguments]))
    else:
        terminal.aside("merge it with method=task_arithmetic and these weights in your experts' file")
    terminal.gap()
    return files.landscape(run_dir.folder / "report", land)


def _tell(top: Point, corners: Mapping[str, Point], ready: Prepared, ticks: Sequence[float]) -> None:
    """Where the best model of a landscape is."""
    shares = {m.name: m.share for m in ready.measures}

    def line(point: Point, what: str) -> None:
        _, error = score_table.mean({n: asdict(s) for n, s in point.scores.items()}, shares)
        terminal.say(f"  {score_table.number(point.fitness, error)}  {what}")

    what = "line" if len(corners) == 2 else "plane"
    terminal.say(f"best of the {what} through {', '.join(corners)}, on the {ready.split} split", "bold")
    line(top, ", ".join(f"{n} {w:g}" for n, w in top.weights.items()))
    known = {n: p.fitness for n, p in corners.items() if p.fitness is not None}
    if known:
        first = max(known, key=lambda n: known[n])
        line(corners[first], f"{first}, the fittest of its models")
    if {ticks[0], ticks[-1]} & {*top.at}:
        terminal.aside("it is at the edge: analyze.margin says how far to look")


STEP = register(
    Step("analyze", execute, needs="preflight", settings="analyze", findings=findings, loads_models=True)
)
