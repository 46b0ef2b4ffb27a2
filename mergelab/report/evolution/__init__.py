"""The report of an evolutionary search: tables, pictures, and one page that shows them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mergelab.core.run_dir import write_bytes
from mergelab.report.evolution import data, page, plots


def write_report(folder: Path, journal: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> None:
    """Write the report into `folder`/report, also of a search that still runs.

    Args:
        folder: of the search.
        journal: its events, in the order in which they happened.
        result: what has come out; every key but `search` may be missing.
    """
    for name, content in files(journal, result).items():
        write_bytes(folder / "report" / name, content)


def files(journal: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> dict[str, bytes]:
    """The report's files by name. The same journal and result give the same bytes."""
    evolution = data.read(journal, result)
    importance = data.importance(evolution)
    validation = data.validation(result.get("metrics") or {}, result.get("shares") or {})
    tables = {
        "candidates.csv": data.candidate_rows(evolution),
        "generations.csv": data.generation_rows(evolution),
        "importance.csv": data.importance_rows(importance),
        "validation.csv": data.validation_rows(validation),
    }
    stand_ins = plots.stand_ins([g.label for g in evolution.genes], *data.spoken(evolution, validation))
    say = partial(plots.say, stand_ins=stand_ins)
    pictures = {
        "fitness.png": plots.picture(plots.fitness, evolution, say),
        "validation.png": plots.picture(plots.validation, validation, say),
        "importance.png": plots.picture(plots.importance, importance, say),
        "parameters.png": plots.picture(plots.parameters, evolution, say),
        "parallel.png": plots.picture(plots.parallel, evolution, say),
    }
    if evolution.several:
        tables["pareto.csv"] = data.pareto_rows(evolution)
        pictures = {"pareto.png": plots.picture(plots.pareto, evolution, say), **pictures}
    text = page.page(evolution, result, importance, pictures, stand_ins)
    csvs = {name: data.csv_text(rows).encode() for name, rows in tables.items()}
    return {**csvs, **pictures, "index.html": text.encode()}
