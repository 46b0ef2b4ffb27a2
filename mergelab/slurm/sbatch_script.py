"""The batch script of a job, as text. Pure. Options: https://slurm.schedmd.com/sbatch.html"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.scheduling import task_script
from mergelab.scheduling.scheduler import JobRequest

if TYPE_CHECKING:
    from mergelab.schema import Slurm

INDEX = "${SLURM_ARRAY_TASK_ID:-0}"


def options(settings: Slurm, job: JobRequest, cwd: Path) -> dict[str, Any]:
    """The options of sbatch, by their long names.

    Args:
        settings: of the task.
        job: its folder's name becomes the job's comment, by which it is found again.
        cwd: where the work starts.
    """
    s = settings
    out: dict[str, Any] = {
        "job-name": job.name,
        "comment": job.folder.name,
        "chdir": str(cwd),
        "output": str(job.folder / ("%j.out" if job.tasks is None else "%A_%a.out")),
        "error": str(job.folder / ("%j.err" if job.tasks is None else "%A_%a.err")),
        "open-mode": "append",
        "signal": f"B:USR2@{s.warning}",
        "requeue" if job.restart else "no-requeue": True,
        "nodes": 1,
        "ntasks-per-node": job.ranks,
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
    if job.tasks is not None:
        out["array"] = f"0-{job.tasks - 1}" + (f"%{s.parallel}" if s.parallel else "")
    own = {str(k).replace("_", "-"): v for k, v in s.options.items()}
    after = {"dependency": f"afterany:{job.after}", "kill-on-invalid-dep": "yes"} if job.after else {}
    return {k: v for k, v in (out | own).items() if v is not None and v is not False} | after


def memory(text: str | None) -> str | None:
    """Slurm's form of `200GB`: its units are one letter and powers of 1024, its numbers are integers."""
    if text is None or text.strip() == "0":
        return text
    number, unit = re.fullmatch(r"\s*([\d.]+)\s*([KMGT])B?\s*", text.upper()).groups()  # type: ignore[union-attr]
    if float(number) == int(float(number)):
        return f"{int(float(number))}{unit}"
    smaller = "KKMG"["KMGT".index(unit)]
    return f"{int(float(number) * 1024)}{smaller}"


def text(settings: Slurm, job: JobRequest, cwd: Path) -> str:
    """The script of a job."""
    asked = options(settings, job, cwd)
    header = [f"#SBATCH --{k}" if v is True else f"#SBATCH --{k}={_quoted(v)}" for k, v in asked.items()]
    srun = f"srun --ntasks={job.ranks} --cpus-per-task={settings.cpus} --kill-on-bad-exit=0"
    return task_script.text(
        job, index=INDEX, header=header, setup=settings.setup, launcher=srun if job.ranks > 1 else ""
    )


def _quoted(value: Any) -> str:
    """sbatch reads quotes as a shell does, and % stands for itself in no quotes."""
    return shlex.quote(str(value))
