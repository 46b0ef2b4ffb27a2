"""report: the table, the card, and the last words in result.json."""

from __future__ import annotations

import platform
from importlib.metadata import version

import yaml

from mergelab import __version__, evaluation, identity
from mergelab.report import scores, terminal
from mergelab.report.card import card
from mergelab.schema import Run
from mergelab.steps.merge import inputs
from mergelab.workspace import Workspace, read_json, write_text

PACKAGES = ("mergekit", "torch", "transformers", "lm_eval", "safetensors", "hydra-core")


def execute(run: Run, workspace: Workspace) -> str:
    """Finish the record of a run, and show what came of it."""
    result = read_json(workspace.result)
    if "inputs" not in result:
        with terminal.progress() as progress:
            result = workspace.record({"inputs": inputs(workspace, progress)})
    merged = "merge" in run.job.steps
    text = workspace.recipe.read_text(encoding="utf-8") if merged else ""
    recipe = yaml.safe_load(text) if text else None
    versions = {"mergelab": __version__, "python": platform.python_version()}
    versions |= {p: version(p) for p in PACKAGES}
    settings = {
        "seed": run.seed,
        "device": run.hardware.device.partition(":")[0],
        "measures": [
            (m.name, m.task, m.metric, m.share)
            for split in ("validation", "search")
            for m in evaluation.measures(run, split)
        ],
        "evaluation": {
            k: getattr(run.eval, k) for k in ("num_fewshot", "limit", "chat_template", "max_length")
        },
        "versions": versions,
    }
    contents = {m["reference"]: m["content"] for m in result["inputs"]}
    result = workspace.record(
        {
            "versions": versions,
            "merge_method": recipe["merge_method"] if recipe else None,
            "model": str(workspace.model) if merged else result.get("model"),
            "key": identity.run_key(recipe, contents, settings),
            "status": "done",
        }
    )
    if merged:
        write_text(workspace.model / "README.md", card(result, text, workspace.model.name))
    show(result)
    fitness = result.get("fitness")
    if not fitness:
        return "result.json" + (", model card" if merged else "")
    return f"fitness {fitness['value']:.3f} on the {fitness['split']} split"


def show(result: dict[str, object]) -> None:
    """The table of the validation split, the merged row first."""
    metrics = result.get("metrics")
    if not isinstance(metrics, dict) or terminal.brief:
        return
    heads, body = scores.rows(metrics, "validation", result.get("shares") or {})  # type: ignore[arg-type]
    if not body:
        return
    terminal.console.print()
    terminal.table("validation", heads, body, first_bold="merged" in metrics, texts=1)
    terminal.console.print()
