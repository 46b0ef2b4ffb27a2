"""Work on a cluster: job arrays that outlive the process which submitted them.

Nothing here knows a particular scheduler. `scheduler` has the protocol that one implements, and
`mergelab.slurm` is the implementation for Slurm.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a task begins with this package; what its work needs, the work imports
    from mergelab.schema import Run


def on_node(run: Run) -> Run:
    """The run as executed inside a task: local hardware, no further submission."""
    local = {"slurm": None, "scheduler": None, "candidates_per_task": 1, "detach": False, "scratch": None}
    hardware = replace(run.hardware, **local)  # type: ignore[arg-type]
    return replace(run, hardware=hardware, tracking=replace(run.tracking, sync=False))
