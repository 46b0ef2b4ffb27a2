"""routing: which expert of a mixture gets the tokens of which task."""

from __future__ import annotations

from mergelab.schema import Run
from mergelab.workspace import Workspace


def applies(run: Run, workspace: Workspace) -> bool:
    """Whether the run's model is a mixture of experts."""
    return False
