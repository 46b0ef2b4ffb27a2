"""Whether the winner's gain is more than noise, in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mergelab.report import score_table
from mergelab.search_history import INITIAL, WINNER

NOISE = 2.0
"""Standard errors that a difference has to exceed to be more than noise."""


def verdict(
    metrics: Mapping[str, Any], shares: Mapping[str, float], *, moved: bool, same: bool
) -> tuple[str, dict[str, Any] | None]:
    """Compare the winner with the initial point and its parents on the validation split.

    The errors of two means are treated as independent. For the same prompts that is cautious, because prompts
    that both models answer alike do not blur their difference.

    Args:
        metrics: scores by row and split.
        shares: of the measures.
        moved: whether the winner is another model than the initial point.
        same: whether the search optimized the validation prompts themselves.
    Returns:
        a text, and the gain for result.json.
    """
    value, error = score_table.mean(metrics[WINNER]["validation"], shares)
    other, other_error = score_table.mean(metrics[INITIAL]["validation"], shares)
    if not moved:
        text = "No candidate was better on the search split than the initial point, which therefore wins."
        return text, None
    if value is None or other is None:
        return "The measures point in different directions, so their mean says nothing; see the table.", None
    gain = value - other
    found = {"against": INITIAL, "value": gain, "stderr": None}
    caution = (" The search optimized these very prompts, so this is too good: measure the model on others."
               if same else "")  # fmt: skip
    if error is None or other_error is None:
        text = f"On the validation split the winner is {gain:+.3f} from the initial point, error unknown."
        return text + caution, found
    spread = math.sqrt(error**2 + other_error**2)
    side = "above" if gain >= 0 else "below"
    if abs(gain) <= NOISE * spread:
        meaning = f"within {NOISE:g} standard errors, so it may be noise; more prompts would show."
    elif gain > 0:
        meaning = "more than noise."
    else:
        meaning = "the search has fitted its own prompts, use the initial point."
    text = (
        f"On the validation split the winner's mean is {value:.3f}, {abs(gain):.3f} ±{spread:.3f} {side} the "
    )
    text += f"initial point's: {meaning}{_parents(metrics, shares, value)}{caution}"
    return text, found | {"stderr": spread}


def _parents(metrics: Mapping[str, Any], shares: Mapping[str, float], value: float) -> str:
    """Which parents the winner does not beat."""
    parents = [n for n in metrics if n not in (WINNER, INITIAL) and not n.startswith("candidate ")]
    means = {
        n: score_table.mean(metrics[n]["validation"], shares)[0]
        for n in parents
        if metrics[n].get("validation")
    }
    above = [n for n, m in means.items() if m is not None and m >= value]
    if not means:
        return ""
    return f" Not better than {', '.join(above)}." if above else " It beats every parent."
