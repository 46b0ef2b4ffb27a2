"""Which models a run measures: the one that it makes or is pointed at, and its parents."""

from __future__ import annotations

from pathlib import Path

from mergelab import evaluation
from mergelab.core.plan_file import PlanFile, PlannedModel
from mergelab.core.run_dir import RunDir, finished_model
from mergelab.jobs.step import merges
from mergelab.schema import Run

MERGED = "merged"
"""The name of the model that the run made, or that `evaluate.path` names."""


def parents(run: Run, run_dir: RunDir) -> list[PlannedModel]:
    """The models of the plan that are on this machine and are to be measured, too."""
    return [m for m in PlanFile.load(run_dir.plan).models if m.folder] if run.eval.baselines else []


def models(run: Run, run_dir: RunDir) -> dict[str, tuple[Path, Path | None]]:
    """What to measure, by name: the folder of a model, and that of its LoRA. Preflight has checked
    evaluate.path. vLLM, int8 on a CPU, and kinds of evaluation that measure folders cannot use a LoRA."""
    out: dict[str, tuple[Path, Path | None]] = {}
    if run.evaluate.path:
        out[MERGED] = finished_model(run.evaluate.path, "evaluate.path"), None
    elif merges(run):
        out[MERGED] = run_dir.model, None
    whole_only = (
        run.eval.backend != "hf"
        or not evaluation.kind_of(run.eval).in_memory
        or (run.hardware.quantize != "none" and run.hardware.device == "cpu")
    )
    for m in parents(run, run_dir):
        if not (m.adapter and whole_only):
            out[m.name] = m.at, m.adapter
    return out
