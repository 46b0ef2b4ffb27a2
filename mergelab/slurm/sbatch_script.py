"""The batch script of a job, as text. Pure. Options: https://slurm.schedmd.com/sbatch.html"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergelab.schema import Slurm


WORK = """\
{srun}{command} &
child=$!
trap 'kill -USR2 $child 2>/dev/null' USR2
trap 'kill -TERM $child 2>/dev/null' TERM
while kill -0 $child 2>/dev/null; do wait $child; done
wait $child; status=$?
{after}exit $status
"""
"""A signal ends `wait`, not the child: the shell hands it on and goes on waiting. Slurm's own exit codes do
not tell 137 (killed) from 9, and without accounting there are none: the true one is left in a file."""


def options(
    settings: Slurm,
    *,
    name: str,
    folder: Path,
    cwd: Path,
    ranks: int = 1,
    tasks: int | None = None,
    requeue: bool = True,
) -> dict[str, Any]:
    """What is asked of sbatch, by the options' long names.

    Args:
        settings: of the task.
        name: of the job.
        folder: of the batch; its own name is the job's comment, by which it is found again.
        cwd: where the work starts.
        ranks: processes of a task.
        tasks: of an array; None for a plain job.
        requeue: whether Slurm may start it again after a lost node or a preemption.
    """
    s = settings
    out: dict[str, Any] = {
        "job-name": name,
        "comment": folder.name,
        "chdir": str(cwd),
        "output": str(folder / ("%j.out" if tasks is None else "%A_%a.out")),
        "error": str(folder / ("%j.err" if tasks is None else "%A_%a.err")),
        "open-mode": "append",
        "signal": f"B:USR2@{s.warning}",
        "requeue" if requeue else "no-requeue": True,
        "nodes": 1,
        "ntasks-per-node": ranks,
        "cpus-per-task": s.cpus,
        "partition": s.partition,
        "account": s.account,
        "qos": s.qos,
        "constraint": s.constraint,
        "time": s.time,
        "mem": memory(s.memory),
        "exclusive": s.exclusive or None,
    }
    if s.gpus:
        out["gres"] = f"gpu:{s.gpu_type}:{s.gpus}" if s.gpu_type else f"gpu:{s.gpus}"
    if tasks is not None:
        out["array"] = f"0-{tasks - 1}" + (f"%{s.parallel}" if s.parallel else "")
    own = {str(k).replace("_", "-"): v for k, v in s.options.items()}
    return {k: v for k, v in (out | own).items() if v is not None and v is not False}


def memory(text: str | None) -> str | None:
    """Slurm's form of `200GB`: its units are one letter and powers of 1024, its numbers whole."""
    if text is None or text.strip() == "0":
        return text
    number, unit = re.fullmatch(r"\s*([\d.]+)\s*([KMGT])B?\s*", text.upper()).groups()  # type: ignore[union-attr]
    if float(number) == int(float(number)):
        return f"{int(float(number))}{unit}"
    smaller = "KKMG"["KMGT".index(unit)]
    return f"{int(float(number) * 1024)}{smaller}"


def text(
    asked: Mapping[str, Any],
    command: Sequence[str],
    *,
    setup: Sequence[str] = (),
    ranks: int = 1,
    cpus: int = 1,
    status: Path,
    after: str = "",
) -> str:
    """The script.

    Args:
        asked: `options`.
        command: what runs in each task, or in each rank of it.
        setup: the user's own lines before it.
        status: where the exit status is left, by the task's number.
        after: a line of our own when it has ended, whatever came of it.
    """
    head = [f"#SBATCH --{k}" if v is True else f"#SBATCH --{k}={_quoted(v)}" for k, v in asked.items()]
    srun = f"srun --ntasks={ranks} --cpus-per-task={cpus} --kill-on-bad-exit=0 " if ranks > 1 else ""
    work = WORK.format(srun=srun, command=shlex.join(command), after=f"{after}\n" if after else "")
    leave = [
        f"left={shlex.quote(str(status))}.${{SLURM_ARRAY_TASK_ID:-0}}",
        'rm -f "$left"',
        "trap 'echo $? > \"$left\"' EXIT",  # also where a line of the setup ends it
    ]
    lines = ["#!/bin/bash", *head, "", *leave, *setup, *(["set +eu"] if setup else []), "", work]
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    """sbatch reads quotes as a shell does, and % stands for itself in no quotes."""
    return shlex.quote(str(value))
