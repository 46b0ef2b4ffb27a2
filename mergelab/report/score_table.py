"""Scores as people read them: a row for each model, a column for each measure, the mean last."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Scores = Mapping[str, Mapping[str, Any]]
"""For each measure its `value`, `stderr`, `samples` and so on, as in result.json."""


def number(value: float | None, stderr: float | None = None) -> str:
    """`0.712 ±0.032`; an en dash where there is none."""
    if value is None:
        return "–"
    digits = 3 if abs(value) < 100 else 1
    text = f"{value:.{digits}f}"
    return f"{text} ±{stderr:.{digits}f}" if stderr is not None else text


def mean(scores: Scores, shares: Mapping[str, float]) -> tuple[float | None, float | None]:
    """The mean weighted by share, and its standard error.

    The measures are on different prompts, so their errors are independent:
    se = sqrt(sum (share_i * se_i)^2) / sum share_i. None where measures point in different
    directions (a mean of accuracy and perplexity says nothing), or an error is unknown.
    """
    if not scores or len({s["higher_is_better"] for s in scores.values()}) > 1:
        return None, None
    total = sum(shares.get(n, 1.0) for n in scores)
    value = sum(shares.get(n, 1.0) * s["value"] for n, s in scores.items()) / total
    errors = [s.get("stderr") for s in scores.values()]
    if any(e is None for e in errors):
        return value, None
    squares = sum((shares.get(n, 1.0) * s["stderr"]) ** 2 for n, s in scores.items())
    return value, math.sqrt(squares) / total


def rows(
    metrics: Mapping[str, Mapping[str, Scores]], split: str, shares: Mapping[str, float]
) -> tuple[list[str], list[list[str]]]:
    """The table of one split.

    Args:
        metrics: for each model and split its scores, as in result.json.
        split: `validation` or `search`.
        shares: how much each measure counts in the mean.
    Returns:
        column heads, and rows in the order of `metrics`.
    """
    measured = {m: s[split] for m, s in metrics.items() if s.get(split)}
    names: dict[str, Mapping[str, Any]] = {}
    for scores in measured.values():
        names |= {n: s for n, s in scores.items() if n not in names}
    heads = ["", *(n if s["higher_is_better"] else f"{n} (lower is better)" for n, s in names.items())]
    several = len(names) > 1
    out = []
    for model, scores in measured.items():
        cells = [number(s["value"], s.get("stderr")) if (s := scores.get(n)) else "–" for n in names]
        out.append([model, *cells, *([number(*mean(scores, shares))] if several else [])])
    return [*heads, "mean"] if several else heads, out


def how(measured: Mapping[str, str]) -> str:
    """` in int8`, ` by vllm`, or both; empty where models were measured in all their bits by transformers.

    Args:
        measured: `quantize` and `backend`, as in result.json.
    """
    bits, backend = measured.get("quantize", "none"), measured.get("backend", "hf")
    return (f" in {bits}" if bits != "none" else "") + (f" by {backend}" if backend != "hf" else "")


def markdown(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """The same table for a model card."""
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in body])
