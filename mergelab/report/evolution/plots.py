"""The pictures. Each function draws one figure; `picture` makes it the same bytes every time."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mergelab.report.evolution import data
from mergelab.report.evolution.data import Evolution


class Say(Protocol):
    """Makes a name one that the font can draw, and that fits."""

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
    """What `draw` draws, as PNG: whatever style the user has set, and without date and version."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = draw(*arguments)
        content = io.BytesIO()
        FigureCanvasAgg(figure)
        figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def stand_ins(*texts: Iterable[str]) -> dict[str, str]:
    """For each word that the font has no letters for, a number to draw in its place; the page has the key."""
    font = get_font(findfont("DejaVu Sans"))
    words = dict.fromkeys(w for several in texts for text in several for w in text.split())
    odd = [w for w in words if any(not font.get_char_index(ord(c)) for c in w)]
    return {w: f"#{i}" for i, w in enumerate(odd, 1)}


def say(text: str, *, stand_ins: Mapping[str, str], limit: int = 26) -> str:
    """`text` in letters that the font has, and not longer than a picture can bear."""
    words = [stand_ins.get(w, w) for w in text.split()]
    lengths = [len(w) for w in words]
    while sum(lengths) + len(words) - 1 > limit and max(lengths) > 5:
        lengths[lengths.index(max(lengths))] -= 1
    return " ".join(_cut(w, length) for w, length in zip(words, lengths, strict=True))


def _cut(word: str, length: int) -> str:
    """`word` without its middle: names differ at their ends."""
    head = (length - 1) // 2
    return word if len(word) <= length else f"{word[:head]}…{word[head + 1 - length :]}"


def _notice(text: str) -> Figure:
    """A picture that says why there is none."""
    figure = Figure(figsize=(7.5, 1.0))
    figure.text(0.5, 0.5, text, ha="center", va="center", color=MUTED)
    return figure


NOTHING_YET = "No candidate has been evaluated yet."


def fitness(evolution: Evolution, say: Say) -> Figure:
    """Every candidate, each generation's mean and the best so far, and what there is to beat."""
    measured, generations = evolution.measured, data.generations(evolution)
    if not measured:
        return _notice(NOTHING_YET)
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    spots = _spots(evolution)
    merits = [c.merit for c in measured]
    axes.scatter(
        [spots[c.number] for c in measured], merits, s=14, color=PLAIN, linewidths=0, label="candidate"
    )
    told = [g for g in generations if not math.isnan(g.best)]
    at = [g.number for g in told]
    axes.plot(at, [g.mean for g in told], color=MUTED, marker="o", ms=3.5, lw=1.2, label="mean of generation")
    axes.plot(at, [g.best for g in told], ls="none", marker="D", ms=4, color=BLUE, label="best of generation")
    # The line ends where the last generation's dots end, so that a single generation has one too.
    axes.step(
        [*(n - 0.4 for n in at), at[-1] + 0.4],
        [*(g.best_so_far for g in told), told[-1].best_so_far],
        where="post", color=BLUE, lw=1.8, label="best so far",
    )  # fmt: skip
    levels = [*merits, *evolution.baselines.values()]
    room = 0.08 * (max(levels) - min(levels) or 1.0)
    axes.set_ylim(min(levels) - room, max(levels) + room)
    axes.set_xlim(generations[0].number - 0.5, generations[-1].number + 0.5)
    failed = [spots[c.number] for c in evolution.candidates if c.status == "failed"]
    if failed:
        axes.plot(
            failed, [0.02] * len(failed), ls="none", marker="x", ms=4, color=RED, label="failed",
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    _levels(axes, evolution.baselines)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(False, axis="x")
    axes.set_xlabel("generation")
    axes.set_ylabel(say(_merit_name(evolution)))
    figure.legend(loc="outside upper left", ncols=5, handletextpad=0.4, columnspacing=1.2)
    return figure


def _spots(evolution: Evolution) -> dict[int, float]:
    """For each candidate its place on the axis of generations: side by side, in order."""
    out: dict[int, float] = {}
    for generation in {c.generation for c in evolution.candidates}:
        own = [c.number for c in evolution.candidates if c.generation == generation]
        out |= {n: generation + 0.7 * ((i + 0.5) / len(own) - 0.5) for i, n in enumerate(own)}
    return out


def _merit_name(evolution: Evolution) -> str:
    negated = evolution.merit in evolution.objectives and not evolution.higher_is_better(evolution.merit)
    return f"− {evolution.merit}" if negated else evolution.merit


def _levels(axes: Axes, levels: Mapping[str, float]) -> None:
    """Horizontal lines with their names at the right, apart from each other even where the lines are not."""
    low, high = axes.get_ylim()
    heights = {n: (v - low) / (high - low) for n, v in levels.items()}
    names, taken = sorted(heights, key=lambda n: heights[n]), -1.0
    for i, name in enumerate(names):
        dashes = (0, (5, 3)) if name == "preset" else (0, (1, 2))
        axes.axhline(levels[name], color=ORANGE, lw=1.2, ls=dashes, zorder=1.5)
        taken = min(max(heights[name], taken + 0.1), 0.98 - 0.1 * (len(names) - 1 - i))
        axes.annotate(
            f"{name}\n{levels[name]:.3f}", (1.01, taken), xycoords="axes fraction", va="center",
            color=ORANGE, fontsize=8, linespacing=1.1,
        )  # fmt: skip


def _scale(merits: Sequence[float]) -> ScalarMappable:
    low, high = min(merits), max(merits)
    return ScalarMappable(Normalize(low, high if high > low else low + 1e-9), MERITS)


def _winner_name(evolution: Evolution) -> str:
    return "winner" if evolution.finished else "best so far"


def parameters(evolution: Evolution, say: Say) -> Figure:
    """A small picture for each gene: its value from candidate to candidate, darker where they are fitter."""
    measured, genes = evolution.measured, evolution.genes
    if not measured or not genes:
        return _notice(NOTHING_YET)
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
            [c.number for c in order], [gene.place(c.genome) for c in order], s=13,
            c=colours.to_rgba(np.array([c.merit for c in order])), linewidths=0,
        )  # fmt: skip
        preset = gene.place(evolution.preset)
        if not math.isnan(preset):
            axes.axhline(preset, color=MUTED, lw=1, ls=(0, (5, 3)), zorder=1.5)
        if evolution.winner:
            value = gene.place(evolution.winner.genome)
            axes.axhline(value, color=ORANGE, lw=1, zorder=1.5)
            if evolution.winner.number in numbers:
                axes.plot(evolution.winner.number, value, "o", ms=8, mfc="none", mec=ORANGE, mew=1.6)
        _gene_axis(axes, gene, say, limit=13 if columns <= 3 else 8)
        span = 0.04 * (numbers[-1] - numbers[0]) or 0.5
        axes.set_xlim(numbers[0] - span, numbers[-1] + span)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        axes.set_title(say(gene.label, limit=23), fontsize=9 if columns <= 3 else 8)
    figure.supxlabel("candidate", fontsize=9)
    shown: list[Line2D] = []
    if evolution.winner:
        name = _winner_name(evolution)
        shown.append(Line2D([], [], color=ORANGE, marker="o", ms=7, mfc="none", mew=1.6, lw=1, label=name))
    if evolution.preset:
        shown.append(Line2D([], [], color=MUTED, lw=1, ls=(0, (5, 3)), label="preset"))
    if shown:
        figure.legend(handles=shown, loc="outside upper left", ncols=2)
    height = size[1] - 0.8
    bar = figure.colorbar(
        colours, ax=figure.axes, shrink=min(1.0, 3.0 / height), aspect=25, pad=0.02, anchor=(0.0, 1.0)
    )
    _quiet_bar(bar, say(_merit_name(evolution)))
    return figure


def _quiet_bar(bar: Any, name: str) -> None:
    bar.outline.set_visible(False)
    bar.set_label(name)
    bar.ax.grid(False)
    bar.ax.tick_params(length=0)


def _gene_axis(axes: Axes, gene: data.Gene, say: Say, limit: int) -> None:
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
            range(len(gene.categories)), [say(c, limit=limit) for c in gene.categories], fontsize=7
        )
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))


def parallel(evolution: Evolution, say: Say) -> Figure:
    """Each candidate as a line through its values, the fitness last, darker where it is fitter."""
    measured, genes = evolution.measured, evolution.genes
    if not measured or not genes:
        return _notice(NOTHING_YET)
    height = 4.0 if len(genes) <= 6 else 4.6 if len(genes) <= UPRIGHT else 6.0
    figure = Figure(figsize=(max(7.5, 1.5 + 0.32 * len(genes)), height), layout="constrained")
    axes = figure.add_subplot()
    colours = _scale([c.merit for c in measured])
    low, high = min(c.merit for c in measured), max(c.merit for c in measured)

    def heights(c: data.Candidate) -> list[float]:
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
            label=_winner_name(evolution), zorder=4, clip_on=False,
        )  # fmt: skip
        figure.legend(loc="outside upper left")
    axes.vlines(at, 0, 1, color=MUTED, lw=0.8, zorder=3)
    merit = say(_merit_name(evolution))
    marks = [*(_marks(g) for g in genes), {0.0: _short(low), 1.0: _short(high)}]
    _columns(axes, [*(say(g.label) for g in genes), merit], marks, say)
    _quiet_bar(figure.colorbar(colours, ax=axes, shrink=0.8, aspect=25, pad=0.02), merit)
    return figure


UPRIGHT = 10
"""With more genes than these, what is written at parallel coordinates stands upright."""


def _columns(axes: Axes, names: Sequence[str], marks: Sequence[Mapping[float, str]], say: Say) -> None:
    """The names below parallel coordinates, and what is at their ends and, of a choice, between."""
    upright = len(names) > UPRIGHT + 1
    limit = 10 if upright or len(names) > 7 else 13
    turn: dict[str, Any] = {"rotation": 90} if upright else {}
    for i, own in enumerate(marks):
        for height, mark in own.items():
            place = {0.0: (i, -0.02, "center", "top"), 1.0: (i, 1.02, "center", "bottom")}
            x, y, across, along = place.get(height, (i + 0.06, height, "left", "center"))
            axes.text(
                x, y, say(mark, limit=limit), ha=across, va=along, fontsize=7, color=MUTED, zorder=5, **turn
            )
    slant: dict[str, Any] = (
        {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if len(names) > 7 else {}
    )
    axes.set_xticks(range(len(names)), names, color=INK, **(turn or slant))
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    # In points: one line of text, or one upright text as long as the longest.
    longest = max(len(say(own[0.0], limit=limit)) for own in marks)
    axes.tick_params(length=0, pad=9 + 4.6 * longest if upright else 14)
    axes.set_ylim(-0.01, 1.01)
    axes.set_xlim(-0.3, len(names) - 0.7)


def _marks(gene: data.Gene) -> dict[float, str]:
    """What stands where along a gene's line: a choice's categories, or the ends of a number."""
    if len(gene.categories) > 1:
        return {i / (len(gene.categories) - 1): c for i, c in enumerate(gene.categories)}
    if gene.categories:
        return {0.0: "", 0.5: gene.categories[0]}
    return {0.0: _short(gene.low), 1.0: _short(gene.high)}


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def importance(found: data.Importance, say: Say) -> Figure:
    """A bar for each gene, coloured by direction; grey where the forest has understood nothing."""
    if found.untold or found.out_of_bag is None:
        return _notice(f"Importance is not told: {found.untold}.")
    weights = found.weights[::-1]
    figure = Figure(figsize=(7.5, 1.4 + 0.27 * len(weights)), layout="constrained")
    axes = figure.add_subplot()
    trusted = found.out_of_bag >= LEAST_TRUSTED

    def colour(rho: float | None) -> str:
        if rho is None or not trusted:
            return PLAIN
        return BLUE if rho > 0 else ORANGE

    lengths = [max(w.importance, 0.0) for w in weights]
    axes.barh(range(len(weights)), lengths, height=0.62, color=[colour(w.spearman) for w in weights])
    axes.errorbar(
        lengths,
        range(len(weights)),
        xerr=[w.deviation for w in weights],
        fmt="none",
        ecolor=INK,
        elinewidth=1,
    )
    axes.set_yticks(range(len(weights)), [say(w.gene.label) for w in weights], color=INK)
    for i, w in enumerate(weights):
        text = "–" if w.spearman is None else f"{w.spearman:+.2f}".replace("-", "−")
        axes.text(1.02, i, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=MUTED)
    axes.text(
        1.02,
        1.0,
        "rank\ncorr.",
        transform=axes.transAxes,
        va="bottom",
        fontsize=8,
        color=MUTED,
        linespacing=1.0,
    )
    axes.set_xlim(0, None)
    axes.set_ylim(-0.6, len(weights) - 0.4)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("importance: fall of R² when the values are shuffled")
    trust = "" if trusted else ": too low, do not read the bars"
    of_bag = f"{found.out_of_bag:.2f}".replace("-", "−")
    axes.set_title(f"{found.candidates} candidates, out-of-bag R² {of_bag}{trust}", pad=10)
    if trusted:
        shown = [(BLUE, "more is better"), (ORANGE, "less is better")]
        if any(w.spearman is None for w in weights):
            shown.append((PLAIN, "no direction"))
        handles = [Line2D([], [], color=c, lw=6, label=text) for c, text in shown]
        figure.legend(handles=handles, loc="outside upper left", ncols=3, handlelength=1.2)
    return figure


LEAST_TRUSTED = 0.1
"""Below this out-of-bag R² a forest predicts hardly better than the mean does."""


def validation(models: Sequence[data.Model], say: Say) -> Figure:
    """A point with its standard error for each model: the mean, and each measure where they are few."""
    if not models:
        return _notice("Nothing has been measured on the validation prompts yet.")
    names, meaningful = data.measures(models), any(m.mean is not None for m in models)
    own = names if len(names) <= 4 or not meaningful else []
    panels = [*(["mean"] if meaningful and len(names) > 1 else []), *own]
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(7.5, lines * (1.0 + 0.27 * len(models))), layout="constrained")
    at = range(len(models) - 1, -1, -1)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(lines, columns, i + 1)
        for y, model in zip(at, models, strict=True):
            score = model.scores.get(panel) or {}
            mean = panel == "mean" and i == 0 and len(names) > 1
            value, error = (model.mean, model.stderr) if mean else (score.get("value"), score.get("stderr"))
            if value is not None:
                colour = _model_colour(model.name)
                axes.errorbar(value, y, xerr=error, fmt="o", ms=5, color=colour, elinewidth=1.4, capsize=0)
        lower = any(not (m.scores.get(panel) or {}).get("higher_is_better", True) for m in models)
        axes.set_title(say(panel, limit=23))
        axes.set_xlabel("lower is better" if lower else "")
        axes.set_yticks(at, [say(m.name) for m in models], color=INK)
        axes.tick_params(axis="y", length=0, labelleft=i % columns == 0)
        axes.set_ylim(-0.6, len(models) - 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    return figure


def _model_colour(name: str) -> str:
    known = {"winner": ORANGE, "preset": INK, "base": PLAIN, "random": PLAIN}
    return known.get(name, BLUE if name.startswith("candidate ") else "#5f8f7f")


def pareto(evolution: Evolution, say: Say) -> Figure:
    """The first two objectives against each other; a front where more of one costs some of the other."""
    first, second = evolution.objectives[:2]

    def spot(found: Mapping[str, Any]) -> tuple[float, float] | None:
        values = [data.aim(found, o) for o in (first, second)]
        return None if None in values else (found[first]["value"], found[second]["value"])

    spots = {c.number: s for c in evolution.candidates if (s := spot(c.scores))}
    if not spots:
        return _notice(NOTHING_YET)
    figure = Figure(figsize=(7.5, 5.0), layout="constrained")
    axes = figure.add_subplot()
    rest = [s for n, s in spots.items() if n not in evolution.front]
    if rest:
        axes.scatter(
            [x for x, _ in rest], [y for _, y in rest], s=18, color=PLAIN, linewidths=0, label="candidate"
        )
    on = sorted((spots[n], n) for n in evolution.front if n in spots)
    if on:
        xs, ys = [s[0] for s, _ in on], [s[1] for s, _ in on]
        axes.plot(xs, ys, ls="none", marker="o", ms=6, color=BLUE, label="front", zorder=3)
        # With more objectives the front is no line in two of them.
        if len(evolution.objectives) == 2:
            less = not evolution.higher_is_better(first)
            axes.step(xs, ys, where="post" if less else "pre", color=BLUE, lw=1, alpha=0.5)
        if len(on) <= 15:
            for (x, y), number in on:
                axes.annotate(
                    str(number), (x, y), xytext=(5, 5), textcoords="offset points", fontsize=7, color=BLUE
                )
    preset = spot(evolution.preset_scores)
    if preset:
        axes.plot(*preset, ls="none", marker="*", ms=13, color=ORANGE, label="preset", zorder=4)
    names = [
        say(o) + ("" if evolution.higher_is_better(o) else " (lower is better)") for o in (first, second)
    ]
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    axes.margins(0.08)
    figure.legend(loc="outside upper left", ncols=3)
    return figure
