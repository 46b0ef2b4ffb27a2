"""Slurm behind the protocol of schedulers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergelab.core.errors import InputError
from mergelab.scheduling.scheduler import (
    SCHEDULERS,
    JobRequest,
    Scheduler,
    SchedulerLimitReached,
    SchedulerRejected,
    SchedulerUnavailable,
    Task,
)
from mergelab.schema import Run, Slurm
from mergelab.slurm import client, sbatch_script


class SlurmScheduler(Scheduler):
    """A Slurm cluster.

    Args:
        settings: what a task asks for.
    """

    name = "slurm"
    title = "Slurm"
    worker = "mergelab.slurm.worker"

    def __init__(self, settings: Slurm):
        self.settings = settings

    def submit(self, job: JobRequest) -> str:
        """Write the batch script and call sbatch; see `Scheduler.submit`."""
        return client.submit(self._script(job))

    def cancel(self, tasks: Iterable[str]) -> None:
        """scancel."""
        client.cancel(tasks)

    def queue(self, name: str | None = None) -> list[Task]:
        """squeue."""
        return client.queue(name)

    def history(self, jobs: Sequence[str]) -> list[Task]:
        """sacct, by the ids of jobs."""
        return client.accounting(jobs)

    def history_by_name(self, name: str) -> list[Task]:
        """sacct, by the name of jobs, of the last month."""
        return client.accounting_by_name(name)

    def array_limit(self) -> int:
        """Slurm's MaxArraySize."""
        return client.array_limit()

    def missing_program(self) -> str | None:
        """The first of Slurm's commands that is not on this machine."""
        return client.missing()

    def dry_run(self, job: JobRequest) -> None:
        """`sbatch --test-only`; see `Scheduler.dry_run`."""
        try:
            self._check_time()
            client.submit(self._script(job), test=True)
        except SchedulerRejected as e:
            asked = _asked(self.settings)
            raise InputError(f"hardware.slurm: {e}\nThis is sbatch's answer to {asked}.") from None
        except (SchedulerUnavailable, SchedulerLimitReached):
            pass  # sbatch is asked again when it matters, and waited for

    def describe(self) -> str:
        """What a task asks for."""
        s = self.settings
        memory = {None: "", "0": "all memory of a node"}.get(s.memory, f"{s.memory} of memory")
        parts = [
            f"{s.gpus} GPUs" if s.gpus else "", f"{s.cpus} processors", memory,
            "a whole node" if s.exclusive else "", s.time or "",
            *(f"{k} {v}" for k in ("partition", "account", "qos", "constraint") if (v := getattr(s, k))),
        ]  # fmt: skip
        return ", ".join(x for x in parts if x)

    def cancel_command(self, name: str) -> str:
        """scancel for all jobs of a name."""
        return f"scancel --name={name}"

    def for_controller(self, run: Run) -> Scheduler:
        """With `search.controller_job`; where that says nothing, as the tasks."""
        own, tasks = run.search.controller_job, self.settings
        return SlurmScheduler(
            replace(
                own,
                partition=own.partition or tasks.partition,
                account=own.account or tasks.account,
                qos=own.qos or tasks.qos,
                setup=own.setup or tasks.setup,
            )
        )

    def current_job(self) -> str | None:
        """The Slurm job in which this process runs."""
        return os.environ.get("SLURM_JOB_ID")

    def _script(self, job: JobRequest) -> Path:
        path = job.folder / "job.sh"
        path.write_text(sbatch_script.text(self.settings, job, Path.cwd()), encoding="utf-8")
        return path

    def _check_time(self) -> None:
        """A task that asks for more time than its partition gives would wait forever."""
        s = self.settings
        if s.time is not None:
            partition, limit = client.longest(s.partition)
            if client.minutes(str(s.time)) > client.minutes(limit):
                raise InputError(
                    f"hardware.slurm.time: {s.time} is more than the {limit} of partition {partition}\n"
                    "Lower it, or name another partition: hardware.slurm.partition=NAME"
                )


def _asked(s: Slurm) -> str:
    named = {
        k: getattr(s, k) for k in ("partition", "account", "qos", "constraint", "time", "memory", "gpus")
    }
    return ", ".join([f"{k}={v}" for k, v in named.items() if v] + [f"cpus={s.cpus}"])


def _make(settings: Any) -> Scheduler:
    """From `hardware.slurm`; without settings where only the queue is asked."""
    if settings and not isinstance(settings, Slurm):
        raise InputError("hardware.scheduler: the settings of slurm are hardware.slurm\nSet hardware=slurm.")
    return SlurmScheduler(settings or Slurm())


SCHEDULERS.add("slurm", _make)
