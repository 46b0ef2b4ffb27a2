"""The report of a search: tables, pictures, and one page that shows them all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mergelab.core.run_dir import write_bytes
from mergelab.report import pictures
from mergelab.report.csv_files import csv_text
from mergelab.report.evolution import data, gene_plots, page, plots, tables
from mergelab.report.evolution.data import Evolution
from mergelab.report.evolution.importance import importance
from mergelab.report.evolution.validation import ValidatedModel, measures, validation
from mergelab.search_history import row_label


def write_report(folder: Path, journal: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> None:
    """Write the report into `folder`/report, also of a search that is still running.

    Args:
        folder: of the search.
        journal: its lines, in their order.
        result: its result.json; every key but `search` may be missing.
    """
    for name, content in files(journal, result).items():
        write_bytes(folder / "report" / name, content)


def files(journal: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> dict[str, bytes]:
    """The report's files by name. The same journal and result give the same bytes."""
    evolution = data.read(journal, result)
    weights = importance(evolution)
    models = validation(result.get("metrics") or {}, result.get("shares") or {})
    placeholders = pictures.placeholders([g.label for g in evolution.genes], *_names(evolution, models))
    fit = partial(pictures.fit, placeholders=placeholders)
    drawn = {
        "fitness.png": pictures.picture(plots.fitness, evolution, fit),
        "validation.png": pictures.picture(plots.validation, models, fit),
        "importance.png": pictures.picture(plots.importance, weights, fit),
        "parameters.png": pictures.picture(gene_plots.parameters, evolution, fit),
        "parallel.png": pictures.picture(gene_plots.parallel, evolution, fit),
    }
    rows = {
        "candidates.csv": tables.candidate_rows(evolution),
        "generations.csv": tables.generation_rows(evolution),
        "importance.csv": tables.importance_rows(weights),
        "validation.csv": tables.validation_rows(models),
    }
    if evolution.several:
        rows["pareto.csv"] = tables.pareto_rows(evolution)
        drawn = {"pareto.png": pictures.picture(plots.pareto, evolution, fit), **drawn}
    text = page.page(evolution, result, weights, drawn, placeholders)
    csvs = {name: csv_text(table).encode() for name, table in rows.items()}
    return {**csvs, **drawn, "index.html": text.encode()}


def _names(evolution: Evolution, models: Sequence[ValidatedModel]) -> Iterable[list[str]]:
    """The names that pictures show, besides those of the genes."""
    yield [c for g in evolution.genes for c in g.categories]
    yield [row_label(m.name) for m in models]
    yield [*evolution.objectives, *measures(models)]
