"""The bash script that a task runs. Pure text, without what a particular scheduler adds to it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from mergelab.scheduling.scheduler import JobRequest

WORK = """\
{command} &
child=$!
trap 'kill -USR2 $child 2>/dev/null' USR2
trap 'kill -TERM $child 2>/dev/null' TERM
while kill -0 $child 2>/dev/null; do wait $child; done
wait $child; status=$?
{after}exit $status
"""
"""A signal ends `wait`, not the child: the shell passes it to the child and waits again. A scheduler's own
exit codes may not tell 137 (killed) from 9, and without accounting there are none: the script leaves the true
one in a file."""


def text(
    job: JobRequest,
    *,
    index: str,
    header: Sequence[str] = (),
    setup: Sequence[str] = (),
    launcher: str = "",
) -> str:
    """The script of a job, the same for all its tasks.

    Args:
        job: what is submitted.
        index: the task's index in the array, as the shell finds it: `${SLURM_ARRAY_TASK_ID:-0}`.
        header: lines that the scheduler reads.
        setup: the user's own lines before the command.
        launcher: starts the ranks of the command: `srun --ntasks=4`.
    """
    status = job.folder / "status"
    exit_status = [
        f"left={shlex.quote(str(status))}.{index}",
        'rm -f "$left"',
        "trap 'echo $? > \"$left\"' EXIT",  # also where a line of the setup ends the script
    ]
    exports = [f"export {k}={shlex.quote(v)}" for k, v in job.environment.items()]
    command = f"{launcher} {shlex.join(job.command)}".strip()
    work = WORK.format(command=command, after=_cleaning(job))
    lines = [
        "#!/bin/bash",
        *header,
        "",
        *exit_status,
        *setup,
        *(["set +eu"] if setup else []),
        *exports,
        "",
        work,
    ]
    return "\n".join(lines)


def _cleaning(job: JobRequest) -> str:
    """Remove what a killed task has left on the node's disk; one that ends by itself has done so."""
    if job.scratch is None:
        return ""
    clean = shlex.join([sys.executable, "-m", "mergelab.merging.node_local_cache", job.scratch])
    return f"[ $status -eq 0 ] || {clean}\n"
