"""Pictures of the genes: each from candidate to candidate, and all of them together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mergelab.report.evolution.data import Candidate, Evolution, Gene
from mergelab.report.evolution.plots import NOTHING_YET
from mergelab.report.pictures import INK, MERITS, MUTED, ORANGE, Fit, notice, plain_bar


def _scale(merits: Sequence[float]) -> ScalarMappable:
    low, high = min(merits), max(merits)
    return ScalarMappable(Normalize(low, high if high > low else low + 1e-9), MERITS)


def parameters(evolution: Evolution, fit: Fit) -> Figure:
    """A small picture for each gene: its value from candidate to candidate, darker where they are fitter."""
    measured, genes = evolution.measured, evolution.genes
    if not measured or not genes:
        return notice(NOTHING_YET)
    columns = 1 if len(genes) == 1 else 2 if len(genes) <= 4 else 3 if len(genes) <= 12 else 5
    lines = math.ceil(len(genes) / columns)
    size = (7.5, 1.0 + lines * 1.75) if columns <= 3 else (11.0, 1.0 + lines * 1.45)
    figure = Figure(figsize=size, layout="constrained")
    colours = _scale([c.merit for c in measured])
    order = sorted(measured, key=lambda c: c.merit)
    numbers = [c.number for c in evolution.candidates]
    for i, gene in enumerate(genes):
        axes = figure.add_subplot(lines, columns, i + 1)
        axes.scatter(
            [c.number for c in order], [gene.position(c.genome) for c in order], s=13,
            c=colours.to_rgba(np.array([c.merit for c in order])), linewidths=0,
        )  # fmt: skip
        initial = gene.position(evolution.initial)
        if not math.isnan(initial):
            axes.axhline(initial, color=MUTED, lw=1, ls=(0, (5, 3)), zorder=1.5)
        if evolution.winner:
            value = gene.position(evolution.winner.genome)
            axes.axhline(value, color=ORANGE, lw=1, zorder=1.5)
            if evolution.winner.number in numbers:
                axes.plot(evolution.winner.number, value, "o", ms=8, mfc="none", mec=ORANGE, mew=1.6)
        _gene_axis(axes, gene, fit, limit=13 if columns <= 3 else 8)
        span = 0.04 * (numbers[-1] - numbers[0]) or 0.5
        axes.set_xlim(numbers[0] - span, numbers[-1] + span)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        axes.set_title(fit(gene.label, limit=23), fontsize=9 if columns <= 3 else 8)
    figure.supxlabel("candidate", fontsize=9)
    shown: list[Line2D] = []
    if evolution.winner:
        name = evolution.winner_name
        shown.append(Line2D([], [], color=ORANGE, marker="o", ms=7, mfc="none", mew=1.6, lw=1, label=name))
    if evolution.initial:
        shown.append(Line2D([], [], color=MUTED, lw=1, ls=(0, (5, 3)), label="initial"))
    if shown:
        figure.legend(handles=shown, loc="outside upper left", ncols=2)
    height = size[1] - 0.8
    bar = figure.colorbar(
        colours, ax=figure.axes, shrink=min(1.0, 3.0 / height), aspect=25, pad=0.02, anchor=(0.0, 1.0)
    )
    plain_bar(bar, fit(evolution.merit_name))
    return figure


def _gene_axis(axes: Axes, gene: Gene, fit: Fit, limit: int) -> None:
    """The gene's whole range, so that one sees how much of it was searched."""
    if gene.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        axes.set_ylim(gene.low / 1.1, gene.high * 1.1)
        return
    room = 0.5 if len(gene.categories) > 1 else 0.06 * (gene.high - gene.low)
    axes.set_ylim(gene.low - room, gene.high + room)
    if gene.categories:
        axes.set_yticks(
            range(len(gene.categories)), [fit(c, limit=limit) for c in gene.categories], fontsize=7
        )
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))


def parallel(evolution: Evolution, fit: Fit) -> Figure:
    """Each candidate as a line through its values, the fitness last, darker where it is fitter."""
    measured, genes = evolution.measured, evolution.genes
    if not measured or not genes:
        return notice(NOTHING_YET)
    height = 4.0 if len(genes) <= 6 else 4.6 if len(genes) <= UPRIGHT else 6.0
    figure = Figure(figsize=(max(7.5, 1.5 + 0.32 * len(genes)), height), layout="constrained")
    axes = figure.add_subplot()
    colours = _scale([c.merit for c in measured])
    low, high = min(c.merit for c in measured), max(c.merit for c in measured)

    def heights(c: Candidate) -> list[float]:
        merit = (c.merit - low) / (high - low) if high > low else 0.5
        return [*(g.height(c.genome) for g in genes), merit]

    at = range(len(genes) + 1)
    alpha = min(0.85, max(0.25, 60 / len(measured)))
    order = sorted(measured, key=lambda c: c.merit)
    for c, colour in zip(order, colours.to_rgba(np.array([c.merit for c in order])), strict=True):
        axes.plot(at, heights(c), color=tuple(colour), lw=1.0, alpha=alpha, clip_on=False)
    if evolution.winner:
        axes.plot(
            at, heights(evolution.winner), color=ORANGE, lw=2.6, marker="o", ms=4,
            label=evolution.winner_name, zorder=4, clip_on=False,
        )  # fmt: skip
        figure.legend(loc="outside upper left")
    axes.vlines(at, 0, 1, color=MUTED, lw=0.8, zorder=3)
    merit = fit(evolution.merit_name)
    marks = [*(_marks(g) for g in genes), {0.0: _short(low), 1.0: _short(high)}]
    _columns(axes, [*(fit(g.label) for g in genes), merit], marks, fit)
    plain_bar(figure.colorbar(colours, ax=axes, shrink=0.8, aspect=25, pad=0.02), merit)
    return figure


UPRIGHT = 10
"""With more genes than these, what is written at parallel coordinates stands upright."""


def _columns(axes: Axes, names: Sequence[str], marks: Sequence[Mapping[float, str]], fit: Fit) -> None:
    """The names below parallel coordinates, and what is at their ends and, of a choice, between."""
    upright = len(names) > UPRIGHT + 1
    limit = 10 if upright or len(names) > 7 else 13
    turn: dict[str, Any] = {"rotation": 90} if upright else {}
    for i, own in enumerate(marks):
        for height, mark in own.items():
            place = {0.0: (i, -0.02, "center", "top"), 1.0: (i, 1.02, "center", "bottom")}
            x, y, across, along = place.get(height, (i + 0.06, height, "left", "center"))
            axes.text(
                x, y, fit(mark, limit=limit), ha=across, va=along, fontsize=7, color=MUTED, zorder=5, **turn
            )
    slant: dict[str, Any] = (
        {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if len(names) > 7 else {}
    )
    axes.set_xticks(range(len(names)), names, color=INK, **(turn or slant))
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    # In points: one line of text, or one upright text as long as the longest.
    longest = max(len(fit(own[0.0], limit=limit)) for own in marks)
    axes.tick_params(length=0, pad=9 + 4.6 * longest if upright else 14)
    axes.set_ylim(-0.01, 1.01)
    axes.set_xlim(-0.3, len(names) - 0.7)


def _marks(gene: Gene) -> dict[float, str]:
    """What stands where along a gene's line: a choice's categories, or the ends of a number."""
    if len(gene.categories) > 1:
        return {i / (len(gene.categories) - 1): c for i, c in enumerate(gene.categories)}
    if gene.categories:
        return {0.0: "", 0.5: gene.categories[0]}
    return {0.0: _short(gene.low), 1.0: _short(gene.high)}


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")
