"""verify: read the written model back; only a sound one gets its final name, and no other is lost."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from mergelab.context import verify_model
from mergelab.core import cache_dir
from mergelab.core.errors import StepError, typed_line
from mergelab.core.findings import Finding, error
from mergelab.core.folders import free_name, move, sync
from mergelab.core.plan_file import PlanFile
from mergelab.core.run_dir import RunDir, short_path
from mergelab.jobs import STEPS, Step, register, steps_of
from mergelab.merging import resume
from mergelab.merging.verify import Report
from mergelab.report import terminal
from mergelab.report.model_card import write_card
from mergelab.schema import Run

log = logging.getLogger(__name__)


def findings(run: Run) -> Iterator[Finding]:
    """What only a check of a finished model reads."""
    for key in ("path", "text"):
        if getattr(run.check, key) is not None and STEPS.get("check") not in steps_of(run):
            yield error("unused", f"check.{key}", f"job={run.job.name} does not look at it", "Set job=check.")


def execute(run: Run, run_dir: RunDir) -> str:
    """Verify what `merge` left aside, and move it into place.

    A model that is not sound, or that could not be checked to the end, is kept under a name that says so:
    what is wrong can be looked at, a check may err, and a long merge is not repeated for a missing package.

    Raises:
        StepError: when it is not sound, or that is not known. An interrupted check keeps it where it is, so
            that it need not be merged again.
    """
    partial = run_dir.partial
    with resume.kept_if_interrupted(partial, cache_dir.home(), whole=True):
        try:
            report = _verified(run, run_dir)
            run_dir.record({"check": report.json()})
            place = run_dir.model
            if report.sound:
                run_dir.record({"model": str(place)})
                write_card(run_dir, partial)
            else:
                place = free_name(place, "unsound" if report.problems else "unchecked")
                run_dir.record({"set_aside": str(place)})
            sync(partial)
            resume.complete(partial, cache_dir.home())
            move(partial, place)
        except (OSError, StepError) as e:  # the disk, or something that has appeared at its place
            reason = f"{e.strerror}: {e.filename}" if isinstance(e, OSError) else str(e)
            raise StepError(f"{reason}\nThe merged model is kept in {partial}.") from e
    if not report.sound:
        raise StepError(_kept(report, place))
    for note in report.notes:
        terminal.finding("note", note)
    return report.summary()


def _verified(run: Run, run_dir: RunDir) -> Report:
    """The report on what was merged; a failure of the verification itself is part of it."""
    try:
        plan = PlanFile.load(run_dir.plan)
        by = "float32" if plan.engine == "fast" else (plan.recipe or {}).get("dtype")
        return verify_model(run_dir.partial, run, inputs(plan), computed=by)
    except Exception as e:  # whatever it is, it says nothing against the model
        log.exception("the verification failed")
        return Report(run_dir.partial, unchecked=[f"the verification failed: {typed_line(e)}"])


def _kept(report: Report, place: Path) -> str:
    """What has become of a model that did not get its name, and what can be done."""
    kept = short_path(place)
    said = f"the merged model {report.verdict(f' and is kept in {kept}')}"
    if report.problems:
        return f"{said}\nLook at it there, or remove it."
    return (
        f"{said}\nNothing was found against it. When the reason is gone, check it:\n"
        f"  python -m mergelab job=check check.path={kept}\nTo use it as it is, give it another name."
    )


def inputs(plan: PlanFile) -> dict[str, Path]:
    """The folders from which the model was made, adapters apart from what they adapt."""
    out: dict[str, Path] = {}
    for m in plan.models:
        out[m.name] = m.at
        if m.adapter:
            out[f"{m.name}'s adapter"] = m.adapter
    return out


STEP = register(Step("verify", execute, needs="merge", settings="check", findings=findings))
