"""merge: the recipe becomes weights, aside; only `check` moves them to their final place."""

from __future__ import annotations

import yaml

from mergelab.merging import disk
from mergelab.preflight.resources import human
from mergelab.report import terminal
from mergelab.schema import Run
from mergelab.steps.identify import identify
from mergelab.workspace import Workspace


def execute(run: Run, workspace: Workspace) -> str:
    """Record what goes in, then merge."""
    recipe = yaml.safe_load(workspace.recipe.read_text(encoding="utf-8"))
    with terminal.progress() as progress, workspace.aside() as out:
        identify(run, workspace, progress)
        disk.merge(recipe, out, hardware=run.hardware, seed=run.seed, progress=progress)
    size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    return f"{recipe['merge_method']}, {human(size)}"
