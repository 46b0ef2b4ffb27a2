"""Where candidates are evaluated: in this process, in several, or on a cluster."""

from __future__ import annotations

from pathlib import Path

from mergelab.optimization.executors.base import Executor
from mergelab.scheduling.scheduler import scheduler_of
from mergelab.schema import Run


def make_executor(run: Run, folder: Path) -> Executor:
    """The executor that a run's hardware asks for.

    Args:
        run: the composed run.
        folder: the search's.
    """
    h = run.hardware
    if (scheduler := scheduler_of(run)) is not None:
        from mergelab.optimization.executors.cluster import ClusterExecutor

        return ClusterExecutor(run, folder, scheduler)
    if h.workers == 1:
        from mergelab.optimization.executors.inline import InlineExecutor

        return InlineExecutor(run.search.timeout)
    from mergelab.optimization.executors.processes import ProcessExecutor, count_gpus

    devices = h.devices or count_gpus() if h.device != "cpu" else 1
    return ProcessExecutor(h.workers, devices, run.search.timeout)
