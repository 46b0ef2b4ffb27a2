"""What the pictures of an analysis have in common: colours, letters, and maps with numbers in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font

from mergelab.report import pictures
from mergelab.report.analysis.data import Numbers
from mergelab.report.analysis.tables import number
from mergelab.report.pictures import BLUE, INK, MUTED, ORANGE, RED, Fit

COLOURS = (BLUE, ORANGE, "#3a9b7a", "#b07aa1", "#e0a526", "#7ec0e0", RED, INK)
"""Of experts, which have different markers as well."""

MARKERS = "osD^vPX*"

AROUND = LinearSegmentedColormap.from_list("around", [ORANGE, "#eeb48f", "#f7f8f8", "#8fb8ca", BLUE])
"""For values on both sides of one that says nothing: orange below, blue above."""

LAST_RESORT = ("Last Resort", "LastResort", ".LastResort")
"""Fonts that have a box for every letter."""

NARROW = 32
"""Columns of a map, up to which there are gaps between them."""

MANY = 6
"""Pairs, up to which each is a line of its own: four experts."""


@dataclass(frozen=True)
class Letters:
    """How names are drawn: in which fonts, and what stands for words that none of them has."""

    families: list[str]
    placeholders: dict[str, str] = field(default_factory=dict)

    @property
    def fit(self) -> Fit:
        """Makes a name one that can be drawn, and that fits."""
        return partial(pictures.fit, placeholders=self.placeholders)


def letters(words: Sequence[str]) -> Letters:
    """How to draw some names: in matplotlib's own font, and in one of the machine's for what it lacks."""
    own = "DejaVu Sans"
    missing = {ord(c) for w in words for c in w if not c.isspace()} - _has(findfont(own))
    if not missing:
        return Letters([own])
    fonts = (f for f in fontManager.ttflist if f.weight == 400 and not f.name.startswith(LAST_RESORT))
    other = next((f.name for f in fonts if missing <= _has(f.fname)), None)
    return Letters([own, other]) if other else Letters([own], pictures.placeholders(words))


def _has(path: str) -> set[int]:
    try:
        return set(get_font(path).get_charmap())
    except RuntimeError:  # a font of a kind that matplotlib cannot read
        return set()


def picture(letters: Letters, draw: Callable[..., Figure], *arguments: Any) -> bytes:
    """What `draw(*arguments, fit)` draws, as PNG."""

    def drawn() -> Figure:
        matplotlib.rcParams["font.family"] = letters.families
        return draw(*arguments, letters.fit)

    return pictures.picture(drawn)


def minus(text: str) -> str:
    """A number as it is printed."""
    return text.replace("-", "−")


def heat(
    axes: Axes, values: Numbers, rows: Sequence[str], columns: Sequence[str], scale: Normalize,
    colours: LinearSegmentedColormap, *, written: bool = True, digits: int = 2,
) -> Any:  # fmt: skip
    """A map of [rows, columns] with its numbers in the cells; NaN is an en dash.

    Returns:
        what a colour bar is made of.
    """
    image = axes.imshow(np.ma.masked_invalid(values), norm=scale, cmap=colours, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, color=INK)
    axes.set_yticks(range(len(rows)), rows, color=INK)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if len(columns) <= NARROW:
        for edge in np.arange(1, len(columns)) - 0.5:
            axes.axvline(edge, color="white", lw=1.5)
    for edge in np.arange(1, len(rows)) - 0.5:
        axes.axhline(edge, color="white", lw=1.5)
    if written:
        for (y, x), value in np.ndenumerate(values):
            ink = MUTED if math.isnan(value) else _ink(colours(scale(value)))
            text = minus(number(value, digits))
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color=ink)
    return image


def _ink(background: Any) -> str:
    """White where the background is dark."""
    red, green, blue = to_rgb(background)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else INK


def slant(axes: Axes, names: Iterable[str]) -> None:
    """Turn the names of columns where they would touch."""
    if max((len(n) for n in names), default=0) > 9:
        for label in axes.get_xticklabels():
            label.set(rotation=35, ha="right", rotation_mode="anchor")


def around(values: Numbers, least: float, middle: float = 0.0) -> Normalize:
    """A scale as far on either side of the middle, `least` at least."""
    known = values[np.isfinite(values)]
    reach = max(least, float(np.abs(known - middle).max()) if known.size else 0.0)
    return Normalize(middle - reach, middle + reach)


def bar(figure: Figure, image: Any, axes: Any, low: float = -math.inf) -> None:
    """A colour bar beside a map, and no more than that; not below `low`."""
    drawn = figure.colorbar(image, cax=axes.inset_axes((1.03, 0.1, 0.02, 0.8)))
    drawn.outline.set_visible(False)
    bottom, top = drawn.ax.get_ylim()
    drawn.ax.set_ylim(max(low, bottom), top)
    drawn.ax.grid(False)
    drawn.ax.tick_params(length=0)
