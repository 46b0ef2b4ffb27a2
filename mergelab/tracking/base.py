"""What a run can record, whichever service records it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Tracker:
    """Records a run's metrics. This base class is `tracking=none` and discards them.

    No method raises because of the service, and only `finish` waits for it, for a limited time.
    """

    recorded = False
    """After `finish`: whether everything was recorded."""
    mode = ""
    """`online` or `offline`; empty if nothing is recorded."""
    url: str | None = None
    """The page of the run."""

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row of metrics; with `step`, a point of their curves over `step`, in any order."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table. A later one of the same name replaces it."""

    def image(self, name: str, path: Path) -> None:
        """Show a picture. It is read later, so the file must stay where it is."""

    def file(self, path: Path, kind: str) -> None:
        """Record a file as an artifact of type `kind`. It is read later and must stay where it is."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set values that summarize the run."""

    def finish(self, status: int) -> None:
        """End the record with the run's exit status. Later calls have no effect."""
