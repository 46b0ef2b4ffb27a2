"""verify: read the written model back; only a sound one gets its final name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mergelab.core import cache_dir
from mergelab.core.errors import StepError
from mergelab.core.findings import Finding, error
from mergelab.core.run_dir import RunDir, read_json
from mergelab.jobs import STEPS, Step, register, steps_of
from mergelab.merging import resume
from mergelab.merging.verify import Report, verify
from mergelab.report import terminal
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
    try:
        report = look(run_dir.partial, run, inputs(run_dir))
        run_dir.record({"check": report.json()})
        if report.problems:
            raise StepError("the merged model is not sound, and was removed: " + "; ".join(report.problems))
        run_dir.record({"model": str(run_dir.model)})
        write_card(run_dir, run_dir.partial)
        sync(run_dir.partial)
        resume.settle(run_dir.partial, cache_dir.home())
        move(run_dir.partial, run_dir.model)
    except BaseException as e:
        resume.end(run_dir.partial, cache_dir.home(), e)
        raise
    return summary(report)


def inputs(run_dir: RunDir) -> dict[str, Path]:
    """The folders from which the model was made, adapters apart from what they adapt."""
    out: dict[str, Path] = {}
    for m in read_json(run_dir.plan)["models"]:
        out[m["name"]] = Path(m["folder"])
        if m["adapter"]:
            out[f"{m['name']}'s adapter"] = Path(m["adapter"])
    return out


def sync(partial: Path) -> None:
    """See that all of a folder is on the disk, which takes a while."""
    for path in (*partial.rglob("*"), partial):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def move(partial: Path, final: Path) -> None:
    """Give a folder its final name, on whatever disk that is.

    Raises:
        StepError: when something has appeared there since preflight looked, or may not be replaced.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        if partial.stat().st_dev != final.parent.stat().st_dev:
            aside = final.with_name(f".{final.name}.partial")
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(partial, aside)
            sync(aside)
            shutil.rmtree(partial)
            partial = aside
        partial.rename(final)  # an empty folder may be there
    except OSError as e:
        raise StepError(f"cannot put the model at {final}: {e.strerror}") from e


def look(folder: Path, run: Run, inputs: dict[str, Path]) -> Report:
    """`verify` with a bar."""
    with terminal.progress() as progress:
        return verify(
            folder,
            hardware=run.hardware,
            inputs=inputs,
            prompt=run.check.prompt,
            trust_remote_code=run.model.trust_remote_code,
            progress=progress,
        )


def summary(r: Report) -> str:
    """One line on a sound model."""
    tied = ", tied embeddings" if r.trial.tied else ""
    return f"{r.tensors} tensors, all finite{tied}, loads, generates"


STEP = register(Step("verify", execute, needs="merge", settings="check", findings=findings))
