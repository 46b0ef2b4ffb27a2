"""What benchmarks print: progress on stderr, tables on stdout."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

say = Console(stderr=True, highlight=False).print


def console(width: int) -> Console:
    """The terminal; where there is none, so many columns."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else width)


def table(first: str, *heads: str) -> Table:
    """A table of numbers beside the names in its first column."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    made.add_column(first)
    for head in heads:
        made.add_column(head, justify="right")
    return made
