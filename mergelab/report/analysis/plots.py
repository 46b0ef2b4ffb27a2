"""Pictures of how alike task vectors are. Each function draws one figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mergelab.report.analysis import style
from mergelab.report.analysis.data import Compared, Numbers, pairs
from mergelab.report.analysis.style import AROUND, COLOURS, MANY, MARKERS
from mergelab.report.analysis.tables import overlap_title
from mergelab.report.pictures import INK, Fit

LEAST = 0.2
"""The cosine at which colours are full, unless there are larger ones: 0.02 shall not look like much."""


def similarity(compared: Compared, fit: Fit) -> Figure:
    """The cosine of each pair of task vectors, over the whole model."""
    names = _names(compared, fit)
    figure = Figure(figsize=_square(len(names)), layout="constrained")
    axes = figure.add_subplot()
    values = _off_diagonal(compared.whole.cosine)
    image = style.heat(axes, values, names, names, style.around(values, LEAST), AROUND, digits=3)
    style.slant(axes, names)
    axes.set_title("cosine of task vectors", pad=10)
    style.bar(figure, image, axes)
    return figure


def agreement(compared: Compared, fit: Fit) -> Figure:
    """The shares of equal signs, and of largest entries in common, of each pair."""
    names = _names(compared, fit)
    width, height = _square(len(names))
    figure = Figure(figsize=(2 * width, height), layout="constrained")
    signs, tops = (_off_diagonal(m) for m in (compared.whole.agreement, compared.whole.overlap))
    chance = float(np.nanmean(_off_diagonal(compared.whole.overlap_by_chance)))
    panels = (
        ("sign agreement (by chance 0.5)", signs, 0.5, 0.1),
        (overlap_title(compared), tops, chance, 0.1),
    )
    for i, (title, values, middle, least) in enumerate(panels):
        axes = figure.add_subplot(1, 2, i + 1)
        image = style.heat(axes, values, names, names, style.around(values, least, middle), AROUND)
        style.slant(axes, names)
        axes.set_title(title, pad=10)
        style.bar(figure, image, axes, 0.0)
    return figure


def by_layer(compared: Compared, fit: Fit) -> Figure:
    """How long each task vector is in each layer, and how alike each pair."""
    layers, found = list(compared.layers), list(compared.layers.values())
    lengths = list(compared.matrices.layers.values())
    two = pairs(compared.experts)
    names = _pair_names(compared, fit)
    tall = len(two) > MANY
    heights = [2.4, 0.8 + 0.2 * len(two) if tall else 2.6] if two else [2.4]
    figure = Figure(figsize=(8.5, sum(heights) + 0.9), layout="constrained")
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    axes = figure.add_subplot(grid[0])
    for i, name in enumerate(_names(compared, fit)):
        axes.plot(layers, [p.relative_norm[i] for p in lengths], **_look(i, len(layers)), label=name)
    axes.set_ylim(0, 1.08 * axes.dataLim.y1 or 1)
    axes.set_title("norm of the task vector, as a share of the base's (without norms and biases)")
    _beside(axes)
    _layers(axes, layers)
    if not two:
        axes.set_xlabel("layer")
        return figure
    below = figure.add_subplot(grid[1], sharex=None if tall else axes)
    below.set_title("cosine of task vectors")
    below.set_xlabel("layer")
    values = np.array([[p.cosine[i, j] for p in found] for i, j in two])
    if tall:
        image = style.heat(
            below, values, names, [str(n) for n in layers], style.around(values, LEAST), AROUND, written=False
        )
        below.set_xticks(*_thinned(layers))
        style.bar(figure, image, below)
        return figure
    below.axhline(0, color=INK, lw=0.8)
    for k, row in enumerate(values):
        below.plot(layers, row, **_look(k, len(layers)), label=names[k])
    _beside(below)
    _layers(below, layers)
    return figure


def by_kind(compared: Compared, fit: Fit) -> Figure:
    """How long each task vector is in each kind of tensor, and how alike each pair."""
    kinds, found = list(compared.kinds), list(compared.kinds.values())
    two = pairs(compared.experts)
    names = _pair_names(compared, fit)
    written = len(two) <= 2 * MANY
    widths = [3.2, 0.6 + (0.52 if written else 0.3) * len(two)]
    figure = Figure(figsize=(sum(widths) + 1.8, 1.8 + 0.32 * len(kinds)), layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=widths)
    axes = figure.add_subplot(grid[0])
    at = range(len(kinds))
    for i, name in enumerate(_names(compared, fit)):
        look = _look(i, 1) | {"ls": "none", "clip_on": False, "zorder": 3}
        axes.plot([p.relative_norm[i] for p in found], at, **look, label=name)
    axes.set_yticks(at, [fit(k) for k in kinds], color=INK)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_xlim(0, 1.08 * axes.dataLim.x1 or 1)
    axes.tick_params(axis="y", length=0, pad=9)  # room for markers at zero
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_title("norm, as a share of the base's")
    figure.legend(loc="outside upper left", ncols=8, handletextpad=0.2, columnspacing=1.0)
    values = np.array([[p.cosine[i, j] for i, j in two] for p in found])
    beside = figure.add_subplot(grid[1])
    image = style.heat(
        beside, values, [""] * len(kinds), names, style.around(values, LEAST), AROUND, written=written
    )
    for label in beside.get_xticklabels():
        label.set(rotation=35, ha="right", rotation_mode="anchor")
    beside.set_title("cosine of task vectors")
    style.bar(figure, image, beside)
    return figure


def _names(compared: Compared, fit: Fit) -> list[str]:
    return [fit(n, limit=14) for n in compared.experts]


def _pair_names(compared: Compared, fit: Fit) -> list[str]:
    names = [fit(n, limit=10) for n in compared.experts]
    return [f"{names[i]} · {names[j]}" for i, j in pairs(names)]


def _off_diagonal(values: Numbers) -> Numbers:
    """Without what each has in common with itself."""
    return np.where(np.eye(len(values), dtype=bool), np.nan, values)


def _square(count: int) -> tuple[float, float]:
    return 2.6 + 0.6 * count, 1.7 + 0.5 * count


def _look(i: int, points: int) -> dict[str, Any]:
    return {
        "color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)],
        "ms": 5 if points <= 40 else 3, "lw": 1.4,
    }  # fmt: skip


def _beside(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)


def _layers(axes: Axes, layers: Sequence[int]) -> None:
    axes.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _thinned(layers: Sequence[int]) -> tuple[list[int], list[str]]:
    """Ticks of a map's columns: as many as can be read."""
    step = max(1, -(-len(layers) // 16))
    places = list(range(0, len(layers), step))
    return places, [str(layers[p]) for p in places]
