"""Measuring a model: lm_eval in process, and its scores kept by content.

Importing this package loads neither torch nor lm_eval.
"""

from __future__ import annotations

from mergelab.evaluation.loading import load
from mergelab.evaluation.measures import Measure, fitness, measures, other_data
from mergelab.evaluation.scoring import Evaluator
from mergelab.evaluation.validation import check_tasks
from mergelab.result import Score

__all__ = [
    "Evaluator",
    "Measure",
    "Score",
    "check_tasks",
    "fitness",
    "load",
    "measures",
    "other_data",
]
