"""What the lines of a search's journal add up to: generations, the Pareto front, rank correlation.

The search, its live table, its report, W&B and the monitor all show these. The module imports nothing of the
package, so that each of them may use it: `report` and `monitor` do not know `optimization`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

INITIAL = "preset"
"""What the initial point, the composed run from which a search starts, is called on the disk: in the journal,
in result.json and in the names of work items. Elsewhere it is the initial point; a preset is an option of
the group `preset`."""

WINNER = "winner"
"""The row of the winner in the metrics of result.json."""

Key = TypeVar("Key")


def row_label(row: str) -> str:
    """What a row of the metrics in result.json is called in tables and pictures."""
    return "initial" if row == INITIAL else row


@dataclass(frozen=True)
class Generation:
    """What the candidates of one generation add up to; None where none of them has a fitness."""

    number: int
    best: float | None
    mean: float | None
    best_so_far: float | None
    """Of this generation and all before it."""
    failed: int
    repeated: int


def generation(
    number: int, outcomes: Iterable[tuple[float | None, str]], best_before: float | None = None
) -> Generation:
    """The statistics of a generation.

    Args:
        number: of the generation.
        outcomes: fitness and status of each candidate.
        best_before: the best fitness of all generations before it.
    """
    known, statuses = [], []
    for fitness, status in outcomes:
        statuses.append(status)
        if fitness is not None:
            known.append(fitness)
    best = max(known, default=None)
    return Generation(
        number,
        best,
        math.fsum(known) / len(known) if known else None,
        max((b for b in (best, best_before) if b is not None), default=None),
        statuses.count("failed"),
        statuses.count("repeated"),
    )


def generations(outcomes: Iterable[tuple[int, float | None, str]]) -> list[Generation]:
    """The statistics of every generation in order.

    Args:
        outcomes: generation, fitness and status of each candidate.
    """
    by_number: dict[int, list[tuple[float | None, str]]] = {}
    for number, fitness, status in outcomes:
        by_number.setdefault(number, []).append((fitness, status))
    out: list[Generation] = []
    for number in sorted(by_number):
        out.append(generation(number, by_number[number], out[-1].best_so_far if out else None))
    return out


def number(value: Any) -> float | None:
    """A finite number, or None: a measure may have failed to give one, and a line may be damaged."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def objective(scores: Mapping[str, Any], name: str) -> float | None:
    """The value of a measure, turned so that more is better; None where it was not measured."""
    score = scores.get(name) or {}
    value = number(score.get("value"))
    return value if value is None or score.get("higher_is_better", True) else -value


def objectives(scores: Mapping[str, Any], names: Sequence[str]) -> list[float] | None:
    """The values of several measures as `objective` gives them; None unless each was measured."""
    found = [objective(scores, name) for name in names]
    known = [value for value in found if value is not None]
    return known if len(known) == len(found) else None


def pareto_front(points: Mapping[Key, Sequence[float]]) -> list[Key]:
    """The keys of the points that no other point equals or exceeds in everything and exceeds in something.

    Args:
        points: values; higher is better. Equal points are on the front together.
    """

    def dominated(own: Sequence[float]) -> bool:
        return any(
            other != own and all(o >= v for o, v in zip(other, own, strict=True)) for other in points.values()
        )

    return [key for key, own in points.items() if not dominated(own)]


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where one of the two never changes."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return None
    from scipy.stats import spearmanr  # late: it takes a while to import

    return float(spearmanr(one, other).statistic)
