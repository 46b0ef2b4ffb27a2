"""verify: read the written model back; only a sound one gets its final name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mergelab.context import verify_model
from mergelab.core import cache_dir
from mergelab.core.errors import StepError
from mergelab.core.findings import Finding, error
from mergelab.core.folders import move, sync
from mergelab.core.plan_file import PlanFile
from mergelab.core.run_dir import RunDir
from mergelab.jobs import STEPS, Step, register, steps_of
from mergelab.merging import resume
from mergelab.report.model_card import write_card
from mergelab.schema import Run


def findings(run: Run) -> Iterator[Finding]:
    """What only a check of a finished model reads."""
    for key in ("path", "text"):
        if getattr(run.check, key) is not None and STEPS.get("check") not in steps_of(run):
            yield error("unused", f"check.{key}", f"job={run.job.name} does not look at it", "Set job=check.")


def execute(run: Run, run_dir: RunDir) -> str:
    """Verify what `merge` left aside, and move it into place.

    Raises:
        StepError: when it is not sound; what was written is then removed. An interrupted check keeps
            it, so that it need not be merged again.
    """
    with resume.kept_if_interrupted(run_dir.partial, cache_dir.home()):
        report = verify_model(run_dir.partial, run, inputs(run_dir))
        run_dir.record({"check": report.json()})
        if report.problems:
            raise StepError("the merged model is not sound, and was removed: " + "; ".join(report.problems))
        run_dir.record({"model": str(run_dir.model)})
        write_card(run_dir, run_dir.partial)
        sync(run_dir.partial)
        resume.complete(run_dir.partial, cache_dir.home())
        move(run_dir.partial, run_dir.model)
    return report.summary()


def inputs(run_dir: RunDir) -> dict[str, Path]:
    """The folders from which the model was made, adapters apart from what they adapt."""
    out: dict[str, Path] = {}
    for m in PlanFile.load(run_dir.plan).models:
        out[m.name] = m.at
        if m.adapter:
            out[f"{m.name}'s adapter"] = m.adapter
    return out


STEP = register(Step("verify", execute, needs="merge", settings="check", findings=findings))
