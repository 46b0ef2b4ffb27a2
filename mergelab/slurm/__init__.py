"""Work on a Slurm cluster: batches of tasks that outlive whoever submitted them."""

from dataclasses import replace

from mergelab.schema import Run


def on_node(run: Run) -> Run:
    """A run as its task sees it: the node is here, and nobody is asked for another."""
    alone = {"slurm": None, "candidates_per_task": 1, "detach": False, "scratch": None}
    hardware = replace(run.hardware, **alone)  # type: ignore[arg-type]
    return replace(run, hardware=hardware, tracking=replace(run.tracking, sync=False))
