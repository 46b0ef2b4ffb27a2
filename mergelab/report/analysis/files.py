"""The files of an analysis' report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mergelab.core.run_dir import write_bytes, write_text
from mergelab.report.analysis import plots, style, surface
from mergelab.report.analysis.data import Compared, Land, distance_rows, landscape_rows, similarity_rows
from mergelab.report.csv_files import csv_text


def similarity(folder: Path, compared: Compared) -> Mapping[str, str]:
    """Write how alike the experts are into `folder`.

    Returns:
        what pictures show in the place of words for which this machine has no letters, by word.
    """
    letters = style.letters(compared.experts)
    draw = {"by_layer.png": plots.by_layer} if compared.layers else {}
    tables = {"distance.csv": distance_rows(compared)}
    if len(compared.experts) > 1:
        draw |= {
            "similarity.png": plots.similarity,
            "by_kind.png": plots.by_kind,
            "agreement.png": plots.agreement,
        }
        tables["similarity.csv"] = similarity_rows(compared)
    for name, rows in tables.items():
        write_text(folder / name, csv_text(rows))
    for name, picture in draw.items():
        write_bytes(folder / name, style.picture(letters, picture, compared))
    return letters.placeholders


def landscape(folder: Path, land: Land) -> Mapping[str, str]:
    """Write what was measured along a line or on a plane; see `similarity`."""
    letters = style.letters([*land.models, *land.measures])
    write_text(folder / "landscape.csv", csv_text(landscape_rows(land)))
    write_bytes(folder / "landscape.png", style.picture(letters, surface.landscape, land))
    return letters.placeholders
