"""What the models of a search scored on the validation split."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergelab.report import score_table
from mergelab.search_history import INITIAL, WINNER, number


@dataclass(frozen=True)
class ValidatedModel:
    """A model's scores on the validation split, and their mean weighted by share."""

    name: str
    scores: Mapping[str, Any]
    mean: float | None
    stderr: float | None


def validation(metrics: Mapping[str, Any], shares: Mapping[str, float]) -> list[ValidatedModel]:
    """The models that were measured on the validation split, the winner first and the base last.

    Args:
        metrics: of result.json.
        shares: of the measures.
    """
    measured = {name: _usable((splits or {}).get("validation") or {}) for name, splits in metrics.items()}
    names = sorted((n for n, found in measured.items() if found), key=_rank)
    return [ValidatedModel(n, measured[n], *score_table.mean(measured[n], shares)) for n in names]


def _usable(found: Mapping[str, Any]) -> dict[str, Any]:
    """The scores that have a value: one that was NaN is the text "nan" in result.json."""
    return {
        n: {**s, "stderr": number(s.get("stderr"))}
        for n, s in found.items()
        if number(s.get("value")) is not None
    }


def _rank(name: str) -> tuple[int, int]:
    """Winner, initial point, finalists by number, experts as they come, base, random."""
    fixed = {WINNER: 0, INITIAL: 1, "base": 4, "random": 5}
    finalist = re.fullmatch(r"candidate (\d+)", name)
    return (2, int(finalist[1])) if finalist else (fixed.get(name, 3), 0)


def measures(models: Sequence[ValidatedModel]) -> list[str]:
    """What was measured, in the order in which it appears."""
    return list(dict.fromkeys(n for m in models for n in m.scores))
