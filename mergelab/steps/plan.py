"""plan: say exactly what would run, and what it needs."""

from __future__ import annotations

from mergelab import plan_page
from mergelab.context import make_plan
from mergelab.core.findings import stop_on_errors
from mergelab.core.run_dir import RunDir
from mergelab.jobs import Step, register
from mergelab.schema import Run


def execute(run: Run, run_dir: RunDir) -> str:
    """Print the models, the recipe, the findings and the estimate."""
    plan = make_plan(run, run_dir, merges=True, missing_severity="warning")
    plan_page.show(run, plan)
    stop_on_errors(plan.findings)
    warnings = sum(f.severity == "warning" for f in plan.findings)
    return "nothing was run" + (f"; {warnings} warnings" if warnings else "")


STEP = register(
    Step("plan", execute, read_only=True, recorded=False, on_login_node=True, elsewhere=True, measures=True)
)
