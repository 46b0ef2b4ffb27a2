"""Pictures of a search as a whole. Each function draws one figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mergelab.report.evolution.data import Evolution
from mergelab.report.evolution.importance import Importance
from mergelab.report.evolution.validation import ValidatedModel, measures
from mergelab.report.pictures import BLUE, INK, MUTED, ORANGE, PLAIN, RED, Fit, notice
from mergelab.search_history import INITIAL, WINNER, objective, row_label

NOTHING_YET = "No candidate has been evaluated yet."


def fitness(evolution: Evolution, fit: Fit) -> Figure:
    """Every candidate, each generation's mean and the best so far, and what there is to beat."""
    measured, generations = evolution.measured, evolution.generations
    if not measured:
        return notice(NOTHING_YET)
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    spots = _spots(evolution)
    merits = [c.merit for c in measured]
    axes.scatter(
        [spots[c.number] for c in measured], merits, s=14, color=PLAIN, linewidths=0, label="candidate"
    )
    known = [(g.number, g.best, g.mean, g.best_so_far) for g in generations if g.best is not None]
    at, bests, means, best_so_far = (list(column) for column in zip(*known, strict=True))
    axes.plot(at, means, color=MUTED, marker="o", ms=3.5, lw=1.2, label="mean of generation")
    axes.plot(at, bests, ls="none", marker="D", ms=4, color=BLUE, label="best of generation")
    # The line ends where the last generation's dots end, so that a single generation has one as well.
    axes.step(
        [*(n - 0.4 for n in at), at[-1] + 0.4], [*best_so_far, best_so_far[-1]],
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
    axes.set_ylabel(fit(evolution.merit_name))
    figure.legend(loc="outside upper left", ncols=5, handletextpad=0.4, columnspacing=1.2)
    return figure


def _spots(evolution: Evolution) -> dict[int, float]:
    """Where each candidate is on the axis of generations: side by side, in order."""
    out: dict[int, float] = {}
    for generation in {c.generation for c in evolution.candidates}:
        own = [c.number for c in evolution.candidates if c.generation == generation]
        out |= {n: generation + 0.7 * ((i + 0.5) / len(own) - 0.5) for i, n in enumerate(own)}
    return out


def _levels(axes: Axes, levels: Mapping[str, float]) -> None:
    """Horizontal lines with their names at the right, apart from each other even where the lines are not."""
    low, high = axes.get_ylim()
    heights = {n: (v - low) / (high - low) for n, v in levels.items()}
    names, taken = sorted(heights, key=lambda n: heights[n]), -1.0
    for i, name in enumerate(names):
        dashes = (0, (5, 3)) if name == INITIAL else (0, (1, 2))
        axes.axhline(levels[name], color=ORANGE, lw=1.2, ls=dashes, zorder=1.5)
        taken = min(max(heights[name], taken + 0.1), 0.98 - 0.1 * (len(names) - 1 - i))
        axes.annotate(
            f"{row_label(name)}\n{levels[name]:.3f}", (1.01, taken), xycoords="axes fraction", va="center",
            color=ORANGE, fontsize=8, linespacing=1.1,
        )  # fmt: skip


def importance(found: Importance, fit: Fit) -> Figure:
    """A bar for each gene, coloured by direction; grey where the forest predicts nothing."""
    if found.reason or found.out_of_bag is None:
        return notice(f"Importance is not shown: {found.reason}.")
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
    axes.set_yticks(range(len(weights)), [fit(w.gene.label) for w in weights], color=INK)
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
"""Below this out-of-bag R² a forest hardly predicts better than the mean does."""


def validation(models: Sequence[ValidatedModel], fit: Fit) -> Figure:
    """A point with its standard error for each model: the mean, and each measure where they are few."""
    if not models:
        return notice("Nothing has been measured on the validation prompts yet.")
    names, meaningful = measures(models), any(m.mean is not None for m in models)
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
        axes.set_title(fit(panel, limit=23))
        axes.set_xlabel("lower is better" if lower else "")
        axes.set_yticks(at, [fit(row_label(m.name)) for m in models], color=INK)
        axes.tick_params(axis="y", length=0, labelleft=i % columns == 0)
        axes.set_ylim(-0.6, len(models) - 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    return figure


def _model_colour(name: str) -> str:
    known = {WINNER: ORANGE, INITIAL: INK, "base": PLAIN, "random": PLAIN}
    return known.get(name, BLUE if name.startswith("candidate ") else "#5f8f7f")


def pareto(evolution: Evolution, fit: Fit) -> Figure:
    """The first two objectives against each other; a front where more of one costs some of the other."""
    first, second = evolution.objectives[:2]

    def spot(found: Mapping[str, Any]) -> tuple[float, float] | None:
        values = [objective(found, o) for o in (first, second)]
        return None if None in values else (found[first]["value"], found[second]["value"])

    spots = {c.number: s for c in evolution.candidates if (s := spot(c.scores))}
    if not spots:
        return notice(NOTHING_YET)
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
        # With more than two objectives the front is not a line in two of them.
        if len(evolution.objectives) == 2:
            less = not evolution.higher_is_better(first)
            axes.step(xs, ys, where="post" if less else "pre", color=BLUE, lw=1, alpha=0.5)
        if len(on) <= 15:
            for (x, y), number in on:
                axes.annotate(
                    str(number), (x, y), xytext=(5, 5), textcoords="offset points", fontsize=7, color=BLUE
                )
    initial = spot(evolution.initial_scores)
    if initial:
        axes.plot(*initial, ls="none", marker="*", ms=13, color=ORANGE, label="initial", zorder=4)
    names = [
        fit(o) + ("" if evolution.higher_is_better(o) else " (lower is better)") for o in (first, second)
    ]
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    axes.margins(0.08)
    figure.legend(loc="outside upper left", ncols=3)
    return figure
