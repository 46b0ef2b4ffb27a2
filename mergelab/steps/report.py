"""report: the table, the card, and the last words in result.json."""

from __future__ import annotations

from mergelab.core.run_dir import RunDir, read_json
from mergelab.jobs import Step, register
from mergelab.jobs.step import merges
from mergelab.provenance import identify
from mergelab.report import score_table, terminal
from mergelab.report.model_card import write_card
from mergelab.schema import Run


def execute(run: Run, run_dir: RunDir) -> str:
    """Finish the record of a run, and show what came of it."""
    if "key" not in read_json(run_dir.result):
        with terminal.progress() as progress:
            identify(run, run_dir, progress)
    result = read_json(run_dir.result)
    if merges(run):
        write_card(run_dir, run_dir.model)
    show(result)
    fitness = result.get("fitness")
    return f"fitness {fitness['value']:.3f} on the {fitness['split']} split" if fitness else "result.json"


def show(result: dict[str, object]) -> None:
    """The table of the validation split, the merged row first."""
    metrics = result.get("metrics")
    if not isinstance(metrics, dict) or terminal.brief:
        return
    heads, body = score_table.rows(metrics, "validation", result.get("shares") or {})  # type: ignore[arg-type]
    if not body:
        return
    terminal.gap()
    how = score_table.how(result.get("measured") or {})  # type: ignore[arg-type]
    terminal.table(f"validation{how}", heads, body, first_bold="merged" in metrics, texts=1)
    terminal.gap()


STEP = register(Step("report", execute, needs="preflight"))
