"""The live table of a search: a line a generation, and below them how far it is."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mergelab import search_history
from mergelab.report import terminal

ROWS = 12
"""Generations that are shown at once, to fit a terminal."""


class ProgressTable:
    """The live table of a search.

    Args:
        budget: candidates in all.
        population: candidates of a generation.
        before: candidates that an earlier process has measured; they do not count in the rate.
    """

    def __init__(self, budget: int, population: int, before: int):
        self.budget, self.population, self.before = budget, population, before
        self.rows: list[list[str]] = []
        self.done = 0
        self.best: Mapping[str, Any] | None = None
        self._start = time.monotonic()
        self._now: list[Mapping[str, Any]] = []
        self.live: Live | None = None
        self._status = ""

    def show_status(self, text: str) -> None:
        """Set the status line below the table, such as the state of Slurm's queue."""
        self._status = text
        if self.live is not None:
            self.live.update(self.view())

    def update(self, event: str, line: Mapping[str, Any]) -> None:
        """Take in a line of the journal, or the end of a generation."""
        if event == "candidate":
            self.done += 1
            self._now.append(line)
            if line["fitness"] is not None and (self.best is None or line["fitness"] > self.best["fitness"]):
                self.best = line
        elif event == "generation":
            self._now = []
            self._generation(line["generation"], line["lines"])
        if self.live is not None:
            self.live.update(self.view())

    def _generation(self, number: int, lines: Sequence[Mapping[str, Any]]) -> None:
        self.rows.append(self._row(number, lines))
        if self.live is None:
            terminal.say("  ".join(t.rjust(w) for t, w in zip(self.rows[-1], WIDTHS, strict=True)))

    def _row(self, number: int, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        best = self.best["fitness"] if self.best else None
        g = search_history.generation(number, ((x["fitness"], x["status"]) for x in lines), best)
        values = ["–" if v is None else f"{v:.3f}" for v in (g.best, g.mean, g.best_so_far)]
        return [str(number), *values, *(str(n) if n else "" for n in (g.failed, g.repeated))]

    @property
    def per_minute(self) -> float | None:
        """Candidates a minute in this process, None before the first."""
        own = self.done - self.before
        return own / (time.monotonic() - self._start) * 60 if own > 0 else None

    def view(self) -> Group:
        """The table, the bar, the best genome."""
        t = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
        for name in HEADS:
            t.add_column(name, justify="right")
        for row in self.rows[-ROWS:]:
            t.add_row(*row)
        if self._now:
            t.add_row(*self._row(len(self.rows), self._now), style="dim")
        bar = Table.grid(padding=(0, 2, 0, 0))
        bar.add_row(
            ProgressBar(self.budget, self.done, width=30), f"{self.done} of {self.budget}", self._pace()
        )
        parts: list[Any] = [t, bar]
        if self._status:
            parts.append(Text(self._status, style="dim"))
        if self.best is not None:
            parts.append(
                Text(f"best {self.best['fitness']:.3f}  {genome_text(self.best['genome'])}", style="dim")
            )
        return Group(*parts)

    def _pace(self) -> str:
        rate = self.per_minute
        if rate is None:
            return ""
        left = (self.budget - self.done) / rate * 60
        return (
            f"{rate:.3g} a minute, {duration(left)} left"
            if self.done < self.budget
            else f"{rate:.3g} a minute"
        )


HEADS = ("generation", "best", "mean", "best so far", "failed", "repeated")
WIDTHS = tuple(len(h) for h in HEADS)


def genome_text(genome: Mapping[str, Any], most: int = 8) -> str:
    """A genome on one line; of a long one the first few genes."""
    parts = []
    for key, value in list(genome.items())[:most]:
        name = key.removeprefix("experts.").removeprefix("method.parameters.")
        name = name.replace(".parameters.", " ").replace(".", " ")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        parts.append(f"{name} {value:.3g}" if number else f"{name} {value}")
    more = f" · and {len(genome) - most} more" if len(genome) > most else ""
    return " · ".join(parts) + more


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def table(budget: int, population: int, before: int) -> Iterator[ProgressTable]:
    """Show the live table until the body ends; without a terminal, a line a generation."""
    shown = ProgressTable(budget, population, before)
    if not terminal.console.is_terminal:
        terminal.say("  ".join(HEADS), "dim")
        yield shown
        return
    with Live(shown.view(), console=terminal.console, refresh_per_second=4) as live:
        shown.live = live
        yield shown
