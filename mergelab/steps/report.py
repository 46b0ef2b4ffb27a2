"""report: the table, the card, and the last words in result.json."""

from __future__ import annotations

from mergelab.report import scores, terminal
from mergelab.report.card import write_card
from mergelab.schema import Run
from mergelab.steps.identify import identify
from mergelab.workspace import Workspace, read_json


def execute(run: Run, workspace: Workspace) -> str:
    """Finish the record of a run, and show what came of it."""
    if "key" not in read_json(workspace.result):
        with terminal.progress() as progress:
            identify(run, workspace, progress)
    result = read_json(workspace.result)
    if "merge" in run.job.steps:
        write_card(workspace, workspace.model)
    show(result)
    fitness = result.get("fitness")
    return f"fitness {fitness['value']:.3f} on the {fitness['split']} split" if fitness else "result.json"


def show(result: dict[str, object]) -> None:
    """The table of the validation split, the merged row first."""
    metrics = result.get("metrics")
    if not isinstance(metrics, dict) or terminal.brief:
        return
    heads, body = scores.rows(metrics, "validation", result.get("shares") or {})  # type: ignore[arg-type]
    if not body:
        return
    terminal.gap()
    how = scores.how(result.get("measured") or {})  # type: ignore[arg-type]
    terminal.table(f"validation{how}", heads, body, first_bold="merged" in metrics, texts=1)
    terminal.gap()
