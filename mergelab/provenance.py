"""What a run is: its inputs by content, the versions that take part, and the key made of it all."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from mergelab import __version__, evaluation, zoo
from mergelab.context import hashes
from mergelab.core import hashing
from mergelab.core.plan_file import PlanFile, PlannedModel
from mergelab.core.run_dir import RunDir
from mergelab.evaluation import SPLITS, windows
from mergelab.evaluation.cache import packages
from mergelab.jobs.step import merges as makes_model
from mergelab.methods import registry
from mergelab.recipes import recipe as recipes
from mergelab.schema import Run

PACKAGES = ("mergekit", "torch", "transformers", "lm_eval", "safetensors", "hydra-core")


def identify(run: Run, run_dir: RunDir, progress: zoo.Progress) -> None:
    """Record inputs, versions, method and key; reads inputs that are not hub snapshots once."""
    merges = makes_model(run)
    recipe = yaml.safe_load(run_dir.recipe.read_text(encoding="utf-8")) if merges else None
    plan = PlanFile.load(run_dir.plan)
    inputs = [_input(m, progress) for m in plan.models]
    versions = {"mergelab": __version__, "python": platform.python_version()}
    versions |= {p: version(p) for p in (*PACKAGES, *_measuring(run))}
    engine = plan.engine if merges else None
    code = registry.code_of([recipes.method_of(recipe)]) if recipe and not recipes.is_mixture(recipe) else {}
    settings = {
        "seed": run.seed,
        "merge": {"engine": engine, "rescale": run.method.rescale, **code} if engine else None,
        "device": run.hardware.device.partition(":")[0],
        "measures": [
            (split, m.name, m.task, m.metric, m.share)
            for split in SPLITS
            for m in evaluation.measures(run, split)
        ],
        "evaluation": evaluation.score_settings(run.eval) | {"quantize": run.hardware.quantize},
        "text": _text(Path(run.eval.text).expanduser()) if run.eval.text else None,
        "versions": versions,
    }
    run_dir.record(
        {
            "inputs": inputs,
            "versions": versions,
            "merge_method": recipes.method_of(recipe) if recipe else None,
            **({"method_code": code} if code else {}),
            "engine": engine,
            "key": hashing.run_key(recipe, {m["reference"]: m["content"] for m in inputs}, settings),
        }
    )


def _text(path: Path) -> list[Any]:
    return [hashing.file_hash(path), windows.VERSION]


def _measuring(run: Run) -> list[str]:
    """The packages that measure besides those that always do."""
    if not evaluation.measures(run, "validation"):
        return []
    return [p for p in packages(run.eval, run.hardware) if p not in PACKAGES]


def _input(m: PlannedModel, progress: zoo.Progress) -> dict[str, Any]:
    """A model of the plan with its hub commit, or else the hashes of its files."""
    files: dict[str, str] = {}
    if not m.commit:
        files |= hashes(m.at, progress)
    if m.adapter:
        files |= {f"adapter/{name}": h for name, h in hashes(m.adapter, progress).items()}
    return {**m.json(), "files": files, "content": hashing.digest([m.commit, files])}
