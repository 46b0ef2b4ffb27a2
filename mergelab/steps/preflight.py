"""preflight: find the models, check everything that can be known, write the recipe."""

from __future__ import annotations

from mergelab.context import make_plan, read_tasks, tell
from mergelab.core.findings import stop_on_errors
from mergelab.core.run_dir import RunDir
from mergelab.core.sizes import format_size
from mergelab.jobs import Step, register
from mergelab.jobs.step import measures, merges
from mergelab.schema import Run


def execute(run: Run, run_dir: RunDir) -> str:
    """Stop with every error at once, or leave plan.json and recipe.yaml."""
    plan = make_plan(run, run_dir, merges=merges(run))
    tell(plan, "warning")
    stop_on_errors(plan.findings)
    if measures(run):
        read_tasks(run)
    e = plan.estimate
    size = f"reads {format_size(e.read)}, writes {format_size(e.write)}" if e else ""
    return ", ".join(t for t in (f"{len(plan.sources)} models", size) if t)


STEP = register(Step("preflight", execute, read_only=True, recorded=False, examines=True))
