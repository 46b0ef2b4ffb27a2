"""Where a mixture's routers send the tokens of each task: table, words, numbers, picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.core.run_dir import write_bytes, write_text
from mergelab.report import terminal

if TYPE_CHECKING:  # matplotlib and numpy are not needed for the words
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from mergelab.report.pictures import Fit

PROMPTS_OF = {
    "tasks": "prompts of each task",
    "gates": "prompts that were given to the gates, of each expert",
    "recipe": "prompts of the recipe, whose gates are random, of each expert",
}
"""How the origin of the prompts is described."""

WIDE = 8
"""With more experts than these, a table shows for each task those that get the most."""

TALL = 16
"""With more, a picture has no numbers and does not name each expert."""

HEADS = ["task", "layer", "expert", "share", "weight"]


def show(found: Mapping[str, Any]) -> None:
    """Show the table, what it amounts to, and a warning where the gates do nothing.

    Args:
        found: `routing` of result.json.
    """
    if not terminal.brief:
        what = "mean weight" if _everywhere(found) else "share of tokens"
        terminal.gap()
        terminal.table(f"routing: {what} by expert", *rows(found), texts=1)
        for line in words(found):
            terminal.aside(line)
    if warning := doubt(found):
        terminal.finding("warning", warning)


def rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and a row for each task; `*` where the task's own expert gets the most."""
    experts: list[str] = found["experts"]
    body = []
    for task, of in found["tasks"].items():
        got = _shown(found, of)
        most = sorted(experts, key=lambda e: -got[e])
        marks = {most[0]: " *"} if most[0] in of["own"] else {}
        if len(experts) > WIDE:
            cells = [f"{e} {got[e]:.2f}{marks.get(e, '')}" for e in most[:3]]
        else:
            cells = [f"{got[e]:.2f}{marks.get(e, '  ')}" for e in experts]
        body.append([task, *cells])
    heads = ["most", "second", "third"] if len(experts) > WIDE else [f"{e}  " for e in experts]
    return ["", *heads], body


def words(found: Mapping[str, Any]) -> list[str]:
    """What was measured, and what the table amounts to: beside an even share, for own experts, in bits."""
    n, k, information = len(found["experts"]), found["per_token"], found["information"]
    counts = sorted(of["prompts"] for of in found["tasks"].values())
    asked = f"{counts[0]} to {counts[-1]}" if counts[0] < counts[-1] else f"{counts[0]}"
    highest = "" if k == n else f", the highest {1 / k:.2f}"
    out = [
        f"{PROMPTS_OF[found['prompts_of']]}: {asked}",
        f"each token goes to {k} of {n} experts; even would be {1 / n:.2f}{highest}",
    ]
    if found["own"]:
        out.append(f"a task's own expert gets {found['own']['share']:.2f} on average; * where none gets more")
    if information["at_most"]:
        of = f"{information['bits']:.2f} of at most {_bits(information['at_most'])}"
        out.append(f"the expert tells {of} on the task (shuffled: {information['shuffled']:.2f})")
    return out


def doubt(found: Mapping[str, Any]) -> str:
    """Why the gates may be useless, with a remedy on the next line; empty where they work."""
    own, information = found["own"], found["information"]
    if information["nothing"]:
        n = min(of["prompts"] for of in found["tasks"].values())
        seen = f"nothing that {_plural(n, 'prompt')} of a task could show"
        message = f"the gates do {seen}: all tasks' tokens are shared out alike"
    elif own and own["share"] <= own["even"]:
        message = (
            f"the gates do not know the experts: a task's own gets {own['share']:.2f} of its tokens, "
            f"and even would be {own['even']:.2f}"
        )
    else:
        return ""
    remedy = "Prompts more typical of each expert (experts.ROLE.prompts) may help, or another gate_mode."
    return f"{message}\n{remedy}"


def line(found: Mapping[str, Any]) -> str:
    """The result in a few words."""
    information = found["information"]
    tasks = f"{_plural(len(found['tasks']), 'task')} on {len(found['experts'])} experts"
    return (
        f"{tasks}, {information['bits']:.2g} of {_bits(information['at_most'])}"
        if information["at_most"]
        else tasks
    )


def write(
    folder: Path,
    found: Mapping[str, Any],
    layers: Sequence[int],
    shares: NDArray[np.float64],
    weights: NDArray[np.float64],
) -> None:
    """routing.csv and routing.png, whole or not at all.

    Args:
        folder: where they go.
        found: `routing` of result.json.
        layers: the layers that have experts, from 0.
        shares: (tasks, layers, experts), and so are the weights.
    """
    from mergelab.report import pictures

    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(HEADS)
    for t, task in enumerate(found["tasks"]):
        for i, layer in enumerate(layers):
            for e, expert in enumerate(found["experts"]):
                table.writerow([task, layer, expert, f"{shares[t, i, e]:.6g}", f"{weights[t, i, e]:.6g}"])
    write_text(folder / "routing.csv", text.getvalue())
    values = weights if _everywhere(found) else shares
    fit = partial(pictures.fit, placeholders=pictures.placeholders(found["tasks"], found["experts"]))
    write_bytes(folder / "routing.png", pictures.picture(draw, found, layers, values, fit))


def draw(found: Mapping[str, Any], layers: Sequence[int], values: NDArray[np.float64], fit: Fit) -> Figure:
    """A map for each task, layers across and experts down: pale is even, blue more, orange less.

    Args:
        found: `routing` of result.json.
        layers: the layers that have experts, from 0.
        values: (tasks, layers, experts), summing to 1 over the experts.
        fit: turns a name into a label.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
    from matplotlib.figure import Figure

    from mergelab.report.pictures import BLUE, INK, MUTED, ORANGE

    tasks, experts, few = found["tasks"], found["experts"], len(layers) <= 6
    columns = min(len(tasks), 4 if few else 3 if len(layers) <= 20 else 2)
    lines = math.ceil(len(tasks) / columns)
    columns = math.ceil(len(tasks) / lines)
    height = 0.26 * max(4, len(experts)) if len(experts) <= TALL else 3.2
    width = {1: 5.5, 2: 6.6 if few else 9.0}.get(columns, 9.0)
    figure = Figure(figsize=(width, 0.9 + lines * (height + 0.62)), layout="constrained")
    even, top = 1 / len(experts), 1.0 if _everywhere(found) else 1 / found["per_token"]
    colours = [
        (0, ORANGE),
        (0.3, "#f0d2bf"),
        (0.5, "#eff2f3"),
        (0.65, "#a9c8d6"),
        (0.85, BLUE),
        (1, "#01263f"),
    ]
    scale = ScalarMappable(TwoSlopeNorm(even, 0.0, top), LinearSegmentedColormap.from_list("shares", colours))
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for n, (axes, (name, of)) in enumerate(zip(grid.flat, tasks.items(), strict=False)):
        own = [e in of["own"] for e in experts]
        _map(axes, values[n].T, scale)
        _means(axes, values[n].mean(0), own, head=n < columns)
        axes.set_title(fit(name), fontweight="bold")
        axes.tick_params(axis="y", labelcolor=INK)
        if n + columns >= len(tasks):
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("layer", fontsize=8, color=MUTED)
    for axes in list(grid.flat)[len(tasks) :]:
        axes.set_visible(False)
    _ticks(grid[0, 0], [fit(e, limit=18) for e in experts], layers)
    bar = figure.colorbar(
        scale,
        ax=list(grid.flat),
        shrink=min(1.0, 2.2 / (lines * height)),
        aspect=15,
        pad=0.02,
        anchor=(0.0, 1.0),
    )
    bar.outline.set_visible(False)
    bar.set_ticks([0.0, even, top], labels=["0", f"{_decimal(even)} even", _decimal(top)])
    bar.ax.grid(False)
    bar.ax.tick_params(length=0)
    what = "Mean weight by expert" if _everywhere(found) else "Share of tokens by expert"
    framed = "; a task's own expert is framed" if found["own"] else ""
    figure.suptitle(f"{what}, task and layer{framed}", x=0.01, ha="left", fontsize=10, color=INK)
    return figure


def _map(axes: Axes, shares: NDArray[np.float64], scale: Any) -> None:
    """Cells of (experts, layers), with their numbers where there is room."""
    from mergelab.report.pictures import INK

    experts, layers = shares.shape
    gap = 0.0 if experts > TALL else 0.4 if layers > 20 else 1.2
    axes.pcolormesh(shares, cmap=scale.cmap, norm=scale.norm, edgecolors="white", lw=gap)
    axes.set_ylim(experts, 0)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if layers > 4 or experts > TALL:
        return
    for e, row in enumerate(shares):
        for i, value in enumerate(row):
            ink = "white" if sum(scale.to_rgba(value)[:3]) < 1.6 else INK
            axes.text(i + 0.5, e + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=ink)


def _means(axes: Axes, means: NDArray[np.float64], own: Sequence[bool], *, head: bool) -> None:
    """The means over the layers at the right, and a frame around the task's own expert."""
    from matplotlib.patches import Rectangle

    from mergelab.report.pictures import INK, MUTED

    right = axes.get_xlim()[1]
    for e, (mean, mine) in enumerate(zip(means, own, strict=True)):
        if mine:
            axes.add_patch(Rectangle((0, e), right, 1, fill=False, ec=INK, lw=1.4, clip_on=False, zorder=4))
        if len(means) <= TALL:
            axes.text(
                1.03, e + 0.5, f"{mean:.2f}", transform=axes.get_yaxis_transform(), va="center", fontsize=8,
                color=INK if mine else MUTED, fontweight="bold" if mine else "normal",
            )  # fmt: skip
    if head and len(means) <= TALL:
        axes.text(1.03, 1.03, "mean", transform=axes.transAxes, fontsize=7, color=MUTED)


def _ticks(axes: Axes, experts: Sequence[str], layers: Sequence[int]) -> None:
    """Names of the experts, and numbers of the layers, as many as there is room for; all maps share them."""
    every = math.ceil(len(experts) / TALL)
    axes.set_yticks([e + 0.5 for e in range(0, len(experts), every)], experts[::every])
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128) if len(layers) / s <= 12)
    axes.set_xticks([i + 0.5 for i in range(0, len(layers), step)], [str(n) for n in layers[::step]])


def _everywhere(found: Mapping[str, Any]) -> bool:
    return bool(found["per_token"] == len(found["experts"]))


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _bits(amount: float) -> str:
    """`1 bit`, `1.58 bits`."""
    return f"{amount:.3g} bit{'' if amount == 1 else 's'}"


def _decimal(value: float) -> str:
    """`0.25`, `0.125`, `0.008`, `1`."""
    return f"{value:.3f}".rstrip("0").rstrip(".")


def _shown(found: Mapping[str, Any], of: Mapping[str, Any]) -> Mapping[str, float]:
    """Shares, or weights where every token goes to every expert."""
    shown: Mapping[str, float] = of["weights" if _everywhere(found) else "shares"]
    return shown
