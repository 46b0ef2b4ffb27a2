"""What all pictures have in common: colours, style, labels that the font can draw, and fixed bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font


class Fit(Protocol):
    """Turns a name into a label that the font can draw and the picture has room for."""

    def __call__(self, text: str, *, limit: int = 26) -> str: ...


INK, MUTED, GRID = "#22303a", "#6b7a85", "#e4e9ec"
BLUE, ORANGE, RED, PLAIN = "#2a6f97", "#d1662a", "#b23a48", "#9db2bf"
MERITS = LinearSegmentedColormap.from_list("merits", ["#dbe4e9", "#8fb8ca", "#2a6f97", "#01263f"])

STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": PLAIN,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.dpi": 144,
    "savefig.dpi": 144,
}


def picture(draw: Callable[..., Figure], *arguments: Any) -> bytes:
    """Draw a figure as PNG, the same bytes whatever style the user has set, without date and version.

    Args:
        draw: makes the figure.
        arguments: of `draw`.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = draw(*arguments)
        content = io.BytesIO()
        FigureCanvasAgg(figure)
        figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def placeholders(*texts: Iterable[str]) -> dict[str, str]:
    """A number to draw in place of each word whose letters the font lacks; the page lists them."""
    font = get_font(findfont("DejaVu Sans"))
    words = dict.fromkeys(w for several in texts for text in several for w in text.split())
    odd = [w for w in words if any(not font.get_char_index(ord(c)) for c in w)]
    return {w: f"#{i}" for i, w in enumerate(odd, 1)}


def fit(text: str, *, placeholders: Mapping[str, str], limit: int = 26) -> str:
    """A name as a label, see `Fit`.

    Args:
        text: the name.
        placeholders: for words that the font cannot draw.
        limit: letters that there is room for.
    """
    words = [placeholders.get(w, w) for w in text.split()]
    lengths = [len(w) for w in words]
    while sum(lengths) + len(words) - 1 > limit and max(lengths) > 5:
        lengths[lengths.index(max(lengths))] -= 1
    return " ".join(_cut(w, length) for w, length in zip(words, lengths, strict=True))


def _cut(word: str, length: int) -> str:
    """A word without its middle, because names differ at their ends."""
    head = (length - 1) // 2
    return word if len(word) <= length else f"{word[:head]}…{word[head + 1 - length :]}"


def notice(text: str) -> Figure:
    """A picture that says why there is nothing to draw."""
    figure = Figure(figsize=(7.5, 1.0))
    figure.text(0.5, 0.5, text, ha="center", va="center", color=MUTED)
    return figure


def plain_bar(bar: Any, name: str) -> None:
    """Reduce a colour bar to its colours and its name."""
    bar.outline.set_visible(False)
    bar.set_label(name)
    bar.ax.grid(False)
    bar.ax.tick_params(length=0)
