"""What a Slurm task runs: `mergelab.scheduling.worker`, with Slurm's variables under the names it knows.

python -m mergelab.slurm.worker FOLDER [SCRATCH]
"""

from __future__ import annotations

import os

from mergelab.core import heartbeat
from mergelab.scheduling import worker

VARIABLES = {
    "MERGELAB_TASK_INDEX": "SLURM_ARRAY_TASK_ID",
    "MERGELAB_RANK": "SLURM_PROCID",
    "MERGELAB_RANKS": "SLURM_NTASKS",
    "MERGELAB_LOCAL_RANK": "SLURM_LOCALID",
    "MERGELAB_RESTARTS": "SLURM_RESTART_COUNT",
}


def main() -> None:
    """Do the work items; the exit status is 0 if each of them has a result."""
    for ours, theirs in VARIABLES.items():
        os.environ[ours] = os.environ.get(theirs, "")
    os.environ.pop("MERGELAB_TASK_ID", None)  # of a task from which this one was submitted
    os.environ["MERGELAB_TASK_ID"] = heartbeat.job() or ""
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):  # where Slurm itself does not see to it
        os.environ.setdefault("OMP_NUM_THREADS", cpus)
    worker.main()


if __name__ == "__main__":
    main()
