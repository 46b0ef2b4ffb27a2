"""A gene: one key of the run that a search varies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Genome = dict[str, Any]
"""From keys to values."""


@dataclass(frozen=True)
class Gene:
    """One key that is searched, and the values it may take."""

    key: str
    text: str
    """Its range as it was written."""
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()
    """In place of a range."""
    log: bool = False
    whole: bool = False
    """Whether it takes integers only."""
    ordered: bool = False
    """Of choices: whether neighbours are alike."""

    def rounded(self, value: Any, resolution: float) -> Any:
        """The value as it is used: a multiple of the resolution, within the range."""
        if self.choices:
            return value
        assert self.low is not None and self.high is not None
        if self.whole:
            return round(value)
        near = float(f"{value:.4g}") if self.log else round(value / resolution) * resolution
        return float(f"{min(max(near, self.low), self.high):.10g}")
