"""Work on a Slurm cluster: batches of tasks that outlive whoever submitted them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a task begins with this package; what its work needs, the work imports
    from mergelab.schema import Run


def on_node(run: Run) -> Run:
    """A run as its task sees it: the node is here, and nobody is asked for another."""
    alone = {"slurm": None, "candidates_per_task": 1, "detach": False, "scratch": None}
    hardware = replace(run.hardware, **alone)  # type: ignore[arg-type]
    return replace(run, hardware=hardware, tracking=replace(run.tracking, sync=False))
