"""Preflight: everything that can be known before a weight is read, all at once.

`examine` turns a Run into a Plan: where the models lie, the recipe, the findings, the estimate.
"""

from __future__ import annotations

from mergelab.core.findings import Finding
from mergelab.models.resolver import Source
from mergelab.preflight.planner import Plan, examine
from mergelab.preflight.resolve_inputs import keeps_dtypes, reads_file

__all__ = ["Finding", "Plan", "Source", "examine", "keeps_dtypes", "reads_file"]
