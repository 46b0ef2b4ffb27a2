"""The tables of an analysis in the terminal."""

from __future__ import annotations

import math

from rich.cells import cell_len

from mergelab.report import terminal
from mergelab.report.analysis.data import Compared, Numbers, pairs


def distances(compared: Compared) -> None:
    """A row for each expert: how far it is from the base, and whether in the same direction."""
    found = compared.matrices
    heads = list(found.groups)
    layers = [h for h in heads if h.startswith("layer")]
    heads = [h.split()[-1] if h in layers[1:] else h for h in heads]
    parts = [found.whole, *found.groups.values()]
    rows = [
        [name, number(found.whole.cosine_to_base[i], 4), *(number(p.relative_norm[i]) for p in parts)]
        for i, name in enumerate(found.experts)
    ]
    terminal.gap()
    terminal.say("distance from the base, as a share of its norm, without norms and biases", "bold")
    terminal.table("", ["", "cosine with it", "all", *heads], rows, texts=1)


def cosines(compared: Compared) -> None:
    """The cosine of each pair of task vectors."""
    terminal.gap()
    _matrix("cosine of task vectors", compared, compared.whole.cosine)


def agreement(compared: Compared) -> None:
    """How many signs of each pair are the same, and how many of the largest entries."""
    whole = compared.whole
    _matrix("sign agreement (by chance 0.5)", compared, whole.agreement)
    terminal.gap()
    _matrix(overlap_title(compared), compared, whole.overlap)


def overlap_title(compared: Compared) -> str:
    """What the overlap is of, and what it would be by chance: more than `top` where entries tie."""
    levels = [number(compared.whole.overlap_by_chance[i, j], 2) for i, j in pairs(compared.experts)]
    low, high = min(levels), max(levels)
    chance = low if low == high else f"{low} to {high}"
    return f"overlap of the largest {100 * (compared.top or 0):g} % (by chance {chance})"


def _matrix(title: str, compared: Compared, values: Numbers) -> None:
    """One number for each pair, on either side; columns have numbers where their names do not fit."""
    names, heads = list(compared.experts), list(compared.experts)
    wide = max(map(cell_len, names)) + sum(2 + max(6, cell_len(n)) for n in names)
    if wide > terminal.console.width:
        heads = [str(k) for k in range(1, len(names) + 1)]
        names = [f"{k} {n}" for k, n in zip(heads, names, strict=True)]
    rows = [
        [name, *("" if i == j else number(values[i, j]) for j in range(len(names)))]
        for i, name in enumerate(names)
    ]
    terminal.say(title, "bold")  # a table's own is folded to its width
    terminal.table("", ["", *heads], rows, texts=1)


def number(value: float, digits: int = 3) -> str:
    """`0.123`, an en dash where there is none, and no zero below zero."""
    return "–" if math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}"
