"""A run as the command line composes it, and its model as the engine writes it, without the command."""

from __future__ import annotations

from pathlib import Path

from mergelab import compose as composed
from mergelab import plan as planned
from mergelab.merging import backends
from mergelab.recipes import recipe as recipes
from mergelab.schema import Run

__all__ = ["EXPERTS", "composed", "merged"]

EXPERTS = {"slerp": 2, "nuslerp": 2, "nearswap": 2, "arcee_fusion": 2, "passthrough": 1}
"""How many a method takes; three for any other."""


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
    prepared = backends.prepare(run, plan.recipe, models)
    backends.merge(prepared, plan.recipe, out, run, config_source, lambda what, done, total: None)
    return out
