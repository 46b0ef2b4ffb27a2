"""preflight: find the models, check everything that can be known, write the recipe."""

from __future__ import annotations

from mergelab.preflight.findings import stop_on_errors
from mergelab.preflight.resources import human
from mergelab.schema import Run
from mergelab.steps.planning import make_plan, read_tasks, tell
from mergelab.workspace import Workspace


def execute(run: Run, workspace: Workspace) -> str:
    """Stop with every error at once, or leave plan.json and recipe.yaml."""
    plan = make_plan(run, workspace, merges="merge" in run.job.steps)
    tell(plan, "warning")
    stop_on_errors(plan.findings)
    if "evaluate" in run.job.steps:
        read_tasks(run)
    e = plan.estimate
    size = f"reads {human(e.read)}, writes {human(e.write)}" if e else ""
    return ", ".join(t for t in (f"{len(plan.sources)} models", size) if t)
