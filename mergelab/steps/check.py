"""check: read the written model back; only a sound one gets its final name."""

from __future__ import annotations

import shutil
from pathlib import Path

from mergelab.errors import StepError
from mergelab.merging.verify import Report, verify
from mergelab.report import terminal
from mergelab.schema import Run
from mergelab.workspace import Workspace, read_json


def execute(run: Run, workspace: Workspace) -> str:
    """Verify what `merge` left aside, and move it into place.

    Raises:
        StepError: when it is not sound; what was written is then removed.
    """
    folders = {m["name"]: Path(m["folder"]) for m in read_json(workspace.plan)["models"]}
    try:
        report = look(workspace.partial, run, folders)
        workspace.record({"check": report.json()})
        if report.problems:
            raise StepError("the merged model is not sound, and was removed: " + "; ".join(report.problems))
        if workspace.model.exists():
            workspace.model.rmdir()  # preflight saw that it is empty; if it no longer is, this fails
        workspace.partial.rename(workspace.model)
    except BaseException:
        shutil.rmtree(workspace.partial, ignore_errors=True)
        raise
    return summary(report)


def look(folder: Path, run: Run, inputs: dict[str, Path]) -> Report:
    """`verify` with a bar."""
    with terminal.progress() as progress:
        return verify(
            folder, hardware=run.hardware, inputs=inputs, prompt=run.check.prompt, progress=progress
        )


def summary(r: Report) -> str:
    """One line on a sound model."""
    tied = ", tied embeddings" if r.tied else ""
    return f"{r.tensors} tensors, all finite{tied}, loads, generates"
