"""preflight: find the models, check everything that can be known, write the recipe."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mergelab import preflight, zoo
from mergelab.merging.disk import write_recipe
from mergelab.preflight.findings import Finding, Severity, error, stop_on_errors
from mergelab.preflight.resources import human
from mergelab.report import terminal
from mergelab.schema import Run
from mergelab.workspace import Workspace, read_json, write_json


def execute(run: Run, workspace: Workspace) -> str:
    """Stop with every error at once, or leave plan.json and recipe.yaml."""
    plan = make_plan(run, workspace, merges="merge" in run.job.steps)
    for f in plan.findings:
        if f.severity == "warning":
            terminal.finding(f.severity, f.text())
    stop_on_errors(plan.findings)
    e = plan.estimate
    size = f"reads {human(e.read)}, writes {human(e.write)}" if e else ""
    return ", ".join(t for t in (f"{len(plan.sources)} models", size) if t)


def make_plan(run: Run, workspace: Workspace, *, merges: bool, lacking: Severity = "error") -> preflight.Plan:
    """Examine the run, and leave plan.json and, where there is one, recipe.yaml in its folder."""
    overrides = read_json(workspace.result)["overrides"]
    plan = plan_of(run, workspace.model, overrides, merges=merges, lacking=lacking)
    write_json(workspace.plan, plan.json())
    if plan.recipe:
        write_recipe(workspace.recipe, plan.recipe)
    return plan


def plan_of(
    run: Run, output: Path, overrides: Iterable[str], *, merges: bool, lacking: Severity = "error"
) -> preflight.Plan:
    """`preflight.examine` with a bar, together with what evaluation and tracking have to say."""
    with terminal.progress() as progress:
        return preflight.examine(
            run,
            output=output,
            overrides=overrides,
            zoo=lambda role: family(run, progress).checkpoint(role),
            merges=merges,
            lacking=lacking,
            more=other_findings(run, progress),
        )


def family(run: Run, progress: zoo.Progress | None = None) -> zoo.Family:
    """The tiny family of the run's seed, built if it has to be."""
    return zoo.open_family(run.model.zoo_seed, progress)


def tasks_folder(run: Run, progress: zoo.Progress | None = None) -> Path | None:
    """The folder of the family's own lm_eval tasks."""
    if run.model.tasks == "zoo:tasks":
        return family(run, progress).tasks
    return Path(run.model.tasks).expanduser().resolve() if run.model.tasks else None


def other_findings(run: Run, progress: zoo.Progress | None = None) -> list[Finding]:
    """What evaluation and tracking have to say before anything starts."""
    from mergelab import evaluation, tracking

    tasks = tasks_folder(run, progress) if run.eval.kind in ("skills", "tasks") else None
    problems = [*evaluation.check_tasks(run, tasks_path=tasks), *tracking.problems(run.tracking)]
    return [error("setting", key, message) for key, message in problems]
