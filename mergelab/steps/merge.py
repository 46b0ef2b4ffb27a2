"""merge: the recipe becomes weights, aside; only `check` moves them to their final place."""

from __future__ import annotations

from pathlib import Path

import yaml

from mergelab import identity, zoo
from mergelab.merging import disk
from mergelab.preflight.resources import human
from mergelab.report import terminal
from mergelab.schema import Run
from mergelab.workspace import Workspace, read_json


def execute(run: Run, workspace: Workspace) -> str:
    """Record what goes in, then merge."""
    recipe = yaml.safe_load(workspace.recipe.read_text(encoding="utf-8"))
    with terminal.progress() as progress:
        workspace.record({"inputs": inputs(workspace, progress)})
        with workspace.aside() as out:
            disk.merge(
                recipe,
                out,
                hardware=run.hardware,
                seed=run.seed,
                progress=progress,
            )
    size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    return f"{recipe['merge_method']}, {human(size)}"


def inputs(workspace: Workspace, progress: zoo.Progress) -> list[dict[str, object]]:
    """For result.json: every model, its hub commit, or else the hashes of its files."""
    memo = zoo.home() / "hashes.json"
    out: list[dict[str, object]] = []
    for m in read_json(workspace.plan)["models"]:
        folders = [Path(m[k]) for k in ("folder", "adapter") if m[k]]
        entry = {k: m[k] for k in ("name", "path", "revision", "commit", "folder", "adapter")}
        entry["files"] = {} if m["commit"] and not m["adapter"] else {
            n: h for f in folders for n, h in identity.file_hashes(f, memo, progress).items()
        }  # fmt: skip
        entry["reference"] = m["reference"]
        entry["content"] = identity.digest(m["commit"] or entry["files"])
        out.append(entry)
    return out
