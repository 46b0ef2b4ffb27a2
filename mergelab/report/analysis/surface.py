"""Pictures of a landscape: a line between two models, or the plane through three."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from mergelab.report.analysis import style
from mergelab.report.analysis.data import Land, Numbers
from mergelab.report.pictures import BLUE, INK, MERITS, MUTED, ORANGE, PLAIN, Fit

COLUMNS = 3
LEVELS = 12
HALO, THIN = ([withStroke(linewidth=w, foreground="white")] for w in (2.5, 1.8))


def landscape(land: Land, fit: Fit) -> Figure:
    """A panel for the fitness and for each measure, the models and the best place marked."""
    line = len(land.models) == 2
    panels = land.shown
    columns = min(COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    width = 3.3 if line else 3.6
    height = 2.3 if line else 0.5 + 2.6 * min(1.5, max(0.4, _slope(land)))
    figure = Figure(figsize=(width * columns + 0.4, height * lines + 0.9), layout="constrained")
    for i, (name, higher) in enumerate(panels.items()):
        axes = figure.add_subplot(lines, columns, i + 1)
        (_line if line else _plane)(figure, axes, land, name, fit)
        axes.set_title(fit(name, limit=23) + ("" if higher else " (lower is better)"))
    star = Line2D([], [], ls="none", marker="*", ms=12, color=ORANGE, mec="white", label=_best(land, fit))
    figure.legend(handles=[star], loc="outside upper left", handletextpad=0.3)
    if line:
        figure.supxlabel(f"from {fit(land.models[0])} (0) to {fit(land.models[1])} (1)", fontsize=9)
    else:
        figure.supxlabel("distances in weight space, as shares of the base's norm", fontsize=9)
    return figure


def _slope(land: Land) -> float:
    """Height of the plane's picture over its width."""
    x, y = np.array([land.place(p.at) for p in land.points]).T
    return float(np.ptp(y) / np.ptp(x))


def _best(land: Land, fit: Fit) -> str:
    """What the star is."""
    weights = ", ".join(f"{fit(n)} {style.minus(f'{w:g}')}" for n, w in land.best.weights.items())
    value, _ = land.value(land.best, next(iter(land.shown)))
    return f"best of {len(land.points)} models: {weights}: {style.minus(f'{value:.3f}')} ({land.split})"


def _line(figure: Figure, axes: Axes, land: Land, name: str, fit: Fit) -> None:
    """The value along a line, with its standard errors."""
    at = [p.at[0] for p in land.points]
    values, errors = np.array([land.value(p, name) for p in land.points]).T
    for place, model in zip((0.0, 1.0), land.models, strict=True):
        axes.axvline(place, color=PLAIN, lw=1, ls=(0, (4, 3)))
        axes.annotate(
            fit(model, limit=12), (place, 1), xycoords=axes.get_xaxis_transform(), xytext=(3, -2),
            textcoords="offset points", va="top", fontsize=8, color=MUTED, path_effects=HALO,
        )  # fmt: skip
    if np.isfinite(errors).any():
        axes.fill_between(at, values - errors, values + errors, color=BLUE, alpha=0.15, lw=0)
    axes.plot(at, values, color=BLUE, marker="o", ms=4, lw=1.6)
    axes.plot(*_spot(land, name), ls="none", marker="*", ms=13, color=ORANGE, mec="white", zorder=4)
    axes.margins(y=0.22)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _spot(land: Land, name: str) -> tuple[list[float], list[float]]:
    return [land.best.at[0]], [land.value(land.best, name)[0]]


def _plane(figure: Figure, axes: Axes, land: Land, name: str, fit: Fit) -> None:
    """The value over a plane, drawn as it lies in weight space; dots are what was measured."""
    by_place = {p.at: p for p in land.points}
    ticks = land.ticks
    grid = [[by_place[a, b] for a in ticks] for b in ticks]
    values = np.array([[land.value(p, name)[0] for p in row] for row in grid])
    x, y = np.moveaxis(np.array([[land.place(p.at) for p in row] for row in grid]), -1, 0)
    colours = MERITS if land.shown[name] else MERITS.reversed()
    known = np.isfinite(values)
    if known.any():
        errors = np.array([[land.value(p, name)[1] for p in row] for row in grid])
        levels = MaxNLocator(LEVELS).tick_values(*_range(values[known], errors[known]))
        masked = np.ma.masked_invalid(values)
        image = axes.contourf(x, y, masked, levels, cmap=colours)
        axes.contour(x, y, masked, levels, colors="white", linewidths=0.5, alpha=0.5)
        style.bar(figure, image, axes)
    axes.scatter(x, y, s=3, color="white", alpha=0.7, linewidths=0)
    spots = [land.place(at) for at in land.corners]
    ring = [*spots, spots[0]]
    axes.plot(
        [p for p, _ in ring], [q for _, q in ring], color=INK, lw=0.9, ls=(0, (4, 3)), path_effects=THIN
    )
    middle = [sum(c) / 3 for c in zip(*spots, strict=True)]
    for (px, py), model in zip(spots, land.models, strict=True):
        axes.plot(px, py, marker="o", ms=6, color="white", mec=INK, mew=1.2)
        right, up = px >= middle[0], py >= middle[1]
        axes.annotate(
            fit(model, limit=12), (px, py), xytext=(5 if right else -5, 5 if up else -5),
            textcoords="offset points", ha="left" if right else "right", va="bottom" if up else "top",
            fontsize=8, color=INK, path_effects=HALO,
        )  # fmt: skip
    axes.plot(*land.place(land.best.at), marker="*", ms=14, color=ORANGE, mec="white", mew=0.8, zorder=4)
    axes.use_sticky_edges = False
    axes.margins(0.04)
    axes.set_aspect("equal")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(4))


def _range(values: Numbers, errors: Numbers) -> tuple[float, float]:
    """From the lowest value to the highest, and wide enough that noise does not look like hills."""
    low, high = float(values.min()), float(values.max())
    known = errors[np.isfinite(errors)]
    least = 4 * float(np.median(known)) if known.size else 0.0
    room = max(least - (high - low), 1e-6 - (high - low), 0.0) / 2
    return low - room, high + room
