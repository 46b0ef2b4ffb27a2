"""Measuring models: kinds of evaluation, and scores kept by content.

Importing this package loads neither torch nor lm_eval.
"""

from __future__ import annotations

from mergelab.evaluation.evaluator import Evaluator
from mergelab.evaluation.kind import (
    KINDS,
    SPLITS,
    EvaluationKind,
    kind_of,
    known_kind,
    measures,
    measures_anything,
    register,
    score_settings,
)
from mergelab.evaluation.loading import load
from mergelab.evaluation.measures import Measure, fitness, mean_score
from mergelab.evaluation.scorer import Conditions
from mergelab.evaluation.validation import check
from mergelab.result import Score

__all__ = [
    "KINDS",
    "SPLITS",
    "Conditions",
    "EvaluationKind",
    "Evaluator",
    "Measure",
    "Score",
    "check",
    "fitness",
    "kind_of",
    "known_kind",
    "load",
    "mean_score",
    "measures",
    "measures_anything",
    "register",
    "score_settings",
]
