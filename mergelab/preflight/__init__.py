"""Preflight: everything that can be known before a weight is read, all at once.

`examine` turns a Run into a Plan: where the models lie, the recipe, the findings, the estimate.
"""

from __future__ import annotations

from mergelab.preflight.examine import Plan, examine
from mergelab.preflight.findings import Finding
from mergelab.preflight.inputs import reads_file
from mergelab.preflight.sources import Source

__all__ = ["Finding", "Plan", "Source", "examine", "reads_file"]
