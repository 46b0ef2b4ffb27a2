"""What a run prints: on the terminal, and line by line in the run's log.

The consoles are those of the process; `shown_on` gives a run another one, or none.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from mergelab.core import heartbeat
from mergelab.core.errors import InputError, one_line

console = Console(highlight=False, markup=False, emoji=False)
errors = Console(stderr=True, highlight=False, markup=False, emoji=False)

MARKS = {"error": ("✗", "bold red"), "warning": ("!", "yellow"), "note": ("·", "dim")}

Callback = Callable[[str, int, int], None]

brief = False
"""Of many runs in a row: the tables wait for the comparison at the end."""

log = logging.getLogger("mergelab.run")

_shown = [(console, errors)]
"""The terminal, then the consoles of the `shown_on` blocks in progress; the last ones are in use."""


@contextmanager
def shown_on(target: Console | bool = True) -> Iterator[None]:
    """Show what is narrated on a console until the body ends.

    Args:
        target: the console; True: the terminal; False: nowhere. The run's log has it in any case.
    """
    global console, errors, brief
    before = brief
    shown = Console(quiet=True) if target is False else target
    mine = (console, errors) if isinstance(shown, bool) else (shown, shown)
    _shown.append(mine)
    console, errors = mine
    try:
        yield
    finally:
        # Of two threads the first to enter may be the first to leave, so each removes only its own.
        _shown[:] = [other for other in _shown if other is not mine]
        console, errors = _shown[-1]
        brief = before


def say(text: str, style: str = "") -> None:
    """One line."""
    log.info("%s", text)
    console.print(Text(text, style=style))


def gap() -> None:
    """An empty line."""
    console.print()


def aside(text: str) -> None:
    """Something to know; further lines belong to the first."""
    first, *rest = text.splitlines()
    say(f"· {first}", "dim")
    for line in rest:
        say(f"  {line}", "dim")


def command(text: str) -> None:
    """A command to be copied, on one line however long it is."""
    log.info("%s", text)
    console.print(Text(f"  {text}"), soft_wrap=True)


def heading(title: str, subtitle: str) -> None:
    """What runs, and where it is recorded."""
    log.info("%s in %s", title, subtitle)
    console.print(Text.assemble((title, "bold"), "\n", (subtitle, "dim")))


def finding(severity: str, text: str) -> None:
    """A finding of preflight; the remedy on a line of its own."""
    level = {"error": logging.ERROR, "warning": logging.WARNING}.get(severity, logging.INFO)
    log.log(level, "%s: %s", severity, one_line(text))
    mark, style = MARKS[severity]
    first, _, rest = text.partition("\n")
    target = errors if severity == "error" else console
    target.print(Text.assemble((f"{mark} ", style), first), soft_wrap=True)
    for line in rest.splitlines():
        target.print(Text("  " + line, style="dim"), soft_wrap=True)


def failure(message: str) -> None:
    """What went wrong, on stderr."""
    log.error("%s", one_line(message))
    first, _, rest = message.partition("\n")
    errors.print(Text.assemble(("✗ ", "bold red"), first), soft_wrap=True)
    for line in rest.splitlines():
        errors.print(Text("  " + line.rstrip()), soft_wrap=True)


@contextmanager
def step(name: str) -> Iterator[Callable[[str], None]]:
    """One step: a bar while it works, `✓ name   what came of it   seconds` when it is done.

    Yields a function that sets what came of it.
    """
    start, summary = time.monotonic(), [""]
    log.info("%s: started", name)

    def done(text: str) -> None:
        summary[0] = text

    try:
        yield done
    except BaseException as e:
        log.error("%s: did not finish after %.1f s", name, time.monotonic() - start,
                  exc_info=None if isinstance(e, InputError) else e)  # fmt: skip
        console.print(Text.assemble(("✗ ", "bold red"), f"{name:<11}", ("did not finish", "dim")))
        raise
    seconds = time.monotonic() - start
    log.info("%s: done in %.1f s%s", name, seconds, f": {summary[0]}" if summary[0] else "")
    console.print(
        Text.assemble(("✓ ", "green"), f"{name:<11}", f"{summary[0]:<58}", (f"{seconds:6.1f} s", "dim"))
    )


@contextmanager
def waiting() -> Iterator[Callable[[str], None]]:
    """A line on what is waited for, with the time that it has taken. Yields a function that sets it;
    silent without a terminal."""
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
        console=console, transient=True, disable=not console.is_terminal, refresh_per_second=4,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=None, visible=False)
        yield lambda text: bar.update(task, description=text, visible=bool(text))


@contextmanager
def progress(nbytes: bool = False) -> Iterator[Callback]:
    """One bar for long work. Yields a callback (what, done, total); silent without a terminal.

    Args:
        nbytes: what is counted are bytes: show them, and their rate.
    """
    columns: list[ProgressColumn] = [TimeElapsedColumn()]
    if nbytes:
        columns = [DownloadColumn(), TransferSpeedColumn()]
    with Progress(
        TextColumn("  {task.description:<22}"), BarColumn(bar_width=16 if nbytes else 32),
        TextColumn("{task.percentage:>3.0f}%"), *columns, TextColumn("left"), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=None, visible=False)
        current = ""

        def callback(what: str, done: int, total: int) -> None:
            nonlocal current
            if what != current:  # the rate is that of one kind of work
                current = what
                bar.reset(task)
            bar.update(task, description=what, completed=done, total=total or None, visible=True)
            heartbeat.report_progress(what, done, total, unit="bytes" if nbytes else "")

        yield callback


def table(
    title: str,
    columns: list[str],
    rows: list[list[str]],
    *,
    first_bold: bool = False,
    texts: int | None = None,
) -> None:
    """A table without lines, the first row bold where it is what matters.

    Args:
        texts: how many columns hold words; the rest are numbers, to the right. None: all of them.
    """
    for line in [[title], *([columns] if any(columns) else []), *rows]:
        log.info("%s", "   ".join(cell for cell in line if cell))
    t = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="dim",
        show_header=any(columns),
    )
    for i, c in enumerate(columns):
        left = texts is None or i < texts
        t.add_column(c, justify="left" if left else "right", overflow="fold", no_wrap=i == 0 or not left)
    for i, row in enumerate(rows):
        t.add_row(*row, style="bold" if first_bold and i == 0 else "")
    console.print(t)
