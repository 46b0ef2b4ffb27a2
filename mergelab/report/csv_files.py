"""Tables as CSV."""

from __future__ import annotations

import csv
import io
from typing import Any

Rows = list[list[Any]]
"""A table: its heads, then its lines."""


def csv_text(rows: Rows) -> str:
    """The table as CSV: numbers in full, nothing where there is no value."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
