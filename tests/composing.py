"""A run as the command line composes it, and its model as the engine writes it, without the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mergelab import compose as composed
from mergelab import plan as planned
from mergelab.core.conf_dir import CONF
from mergelab.merging import fast_backend
from mergelab.methods import registry
from mergelab.recipes import recipe as recipes
from mergelab.schema import Run

__all__ = ["METHODS", "composed", "experts_for", "merged"]

METHODS: dict[str, dict[str, Any]] = {
    p.stem: yaml.safe_load(p.read_text(encoding="utf-8"))
    for p in sorted((CONF / "method").glob("*.yaml"))
    if p.stem not in ("mergekit", "mergekit_moe", "moe")
}
"""What the file of each method says."""


def experts_for(name: str, few: int = 3) -> int:
    """How many experts to merge by a method: so many, or the most that it takes."""
    return min(few, registry.get(name).inputs.experts(METHODS[name]["base"])[1] or few)


def merged(run: Run, folder: Path) -> Path:
    """Merge a run with our own engine: planned as always, not tried out. Leaves `recipe.yaml` and `model`
    in the folder, as the command does; the model's folder."""
    out = folder / "model"
    plan = planned(run, folder)
    assert [f.text() for f in plan.errors] == []
    assert plan.engine is not None and plan.engine.name == "fast" and plan.recipe is not None
    models = {s.reference: (s.name, s.folder) for s in plan.sources if s.folder}
    config_source = next(s.folder for s in plan.sources if s.name == plan.config_source and s.folder)
    out.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipes.dump(plan.recipe), encoding="utf-8")
    prepared = fast_backend.prepare(run, plan.recipe, models)
    fast_backend.merge(prepared, plan.recipe, out, run, config_source, lambda what, done, total: None)
    return out
