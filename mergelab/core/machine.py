"""Facts about this machine that no heavy library is needed for."""

from __future__ import annotations

import os
from pathlib import Path


def available_processors() -> int:
    """The number of processors that this process may use, which a batch system limits."""
    bound = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if bound else os.cpu_count() or 1
    requested = os.environ.get("SLURM_CPUS_PER_TASK", "")  # not every cluster binds its tasks to them
    return min(count, int(requested)) if requested.isdigit() and int(requested) else count


def existing_parent(path: Path) -> Path:
    """The path itself if it exists, else its nearest parent that does."""
    return next(p for p in (path, *path.parents) if os.path.exists(p))  # noqa: PTH110 (never raises)
