"""Perplexity of a text file: its documents, lm_eval's task over them, and the standard errors."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergelab.core.errors import StepError
from mergelab.evaluation.measures import TEXT

METRICS = ("bits_per_byte", "byte_perplexity", "word_perplexity")
"""The rolling log-likelihood's metrics. Lower is better in all of them."""


def documents(path: Path) -> list[str]:
    """The documents of a UTF-8 text file, which blank lines separate.

    Raises:
        StepError: where the file cannot be read, is not UTF-8, or holds nothing but white space.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise StepError(f"{path}: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise StepError(f"{path} is not UTF-8 (byte {e.start}); convert it first") from e
    found = [part.strip("\n") for part in re.split(r"\n(?:[^\S\n]*\n)+", text)]
    found = [part for part in found if part.strip()]
    if not found:
        raise StepError(f"{path} holds no text")
    return found


def task(path: Path) -> dict[str, Any]:
    """lm_eval's configuration of a task over the documents, which are held in memory.

    A document longer than the model's context is read in windows: each token is scored once, and each window
    but the last begins without context (see `windows.cut`).
    """
    texts = documents(path)

    def dataset(**_: Any) -> dict[str, Any]:
        import datasets

        return {"test": datasets.Dataset.from_dict({"text": texts})}

    metrics = [
        {
            "metric": metric,
            "aggregation": metric if metric == "bits_per_byte" else perplexity,
            "higher_is_better": False,
        }
        for metric in METRICS
    ]
    return {
        "task": TEXT,
        "custom_dataset": dataset,
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "text",
        "num_fewshot": 0,
        "metric_list": metrics,
    }


def perplexity(answers: Sequence[tuple[float, int]]) -> float:
    """exp of minus the mean log-likelihood per byte or word. Infinite where that overflows, as for a model
    that has become noise.

    `answers` holds for each document its log-likelihood in nats and its size.
    """
    try:
        return math.exp(-sum(a[0] for a in answers) / sum(a[1] for a in answers))
    except OverflowError:
        return math.inf


def stderr(metric: str, answers: Sequence[tuple[float, int]]) -> float | None:
    """The standard error of a metric of METRICS; None for fewer than two documents.

    `answers` holds for each document its log-likelihood in nats and its size in bytes (words for
    word_perplexity). With l_i and b_i for these, R = sum(l) / sum(b) is a ratio of two means over
    documents drawn at random, whose error by the delta method is (Cochran, Sampling Techniques,
    3rd ed. 1977, eq. 6.12, without the correction for a finite population)

        se(R)^2 = n / (n - 1) * sum((l_i - R b_i)^2) / sum(b)^2,

    bits_per_byte = -R / ln 2 has se(R) / ln 2, and a perplexity exp(-R) has exp(-R) se(R).
    """
    n, likelihood, size = len(answers), sum(a[0] for a in answers), sum(a[1] for a in answers)
    if n < 2:
        return None
    ratio = likelihood / size
    squares = sum((own - ratio * b) ** 2 for own, b in answers)
    error = math.sqrt(n / (n - 1) * squares) / size
    return error / math.log(2) if metric == "bits_per_byte" else perplexity(answers) * error
