"""The protocol of schedulers: what `job_array` and the search ask of a cluster, and the registry of those
that there are.

A scheduler is a class and one line that registers it, in a module of an installed package (entry point
`mergelab.schedulers`) or in `my_conf/schedulers/NAME.py` of `--config-dir my_conf`. The page
docs/howto/add-a-scheduler.md has an example.
"""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab.core.errors import InputError, MergelabError
from mergelab.core.registry import Registry, use_extensions

if TYPE_CHECKING:
    from mergelab.schema import Run

ENDED = {
    "BOOT_FAIL": "the node failed to boot",
    "CANCELLED": "cancelled",
    "COMPLETED": "ended",
    "DEADLINE": "past its deadline",
    "FAILED": "failed",
    "NODE_FAIL": "the node failed",
    "OUT_OF_MEMORY": "out of memory",
    "PREEMPTED": "preempted",
    "REVOKED": "revoked",
    "TIMEOUT": "out of time",
}
"""The states from which a task does not come back by itself, and how a message describes them."""

INFRASTRUCTURE_FAILURES = {"PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "REVOKED"}
"""End states caused by the cluster. The task is resubmitted, and no attempt is counted."""


class SchedulerUnavailable(MergelabError):
    """The scheduler does not answer now. It may have done what was asked all the same."""


class SchedulerLimitReached(MergelabError):
    """The scheduler accepts no more jobs of this size, or of this user, now."""


class SchedulerRejected(MergelabError):
    """The scheduler will never accept this job."""

    exit_status = 2


@dataclass(frozen=True)
class Task:
    """One task of a job, as the scheduler sees it."""

    job: str
    """The id of the job or job array, as `Scheduler.submit` returned it."""
    index: int
    """In its array; 0 of a plain job."""
    state: str
    """PENDING, RUNNING, a key of `ENDED`, or a word of the scheduler's own for a task that still lives."""
    reason: str = ""
    """Why it waits, or how it ended."""
    node: str = ""
    exit: str = ""
    """STATUS:SIGNAL, where it is known."""
    comment: str = ""
    """The name of the folder of its `JobRequest`, by which it is recognised."""
    name: str = ""
    """The name of its job."""
    array: bool = False

    @property
    def number(self) -> str:
        """Its id: `57_3` in an array, `57` of a plain job."""
        return f"{self.job}_{self.index}" if self.array else self.job

    @property
    def stuck(self) -> bool:
        """Whether the scheduler could not launch it and now holds it until somebody intervenes."""
        return self.state == "PENDING" and "launch failed" in self.reason.lower()

    @property
    def over(self) -> bool:
        """Whether it has ended and will not be started again."""
        return self.state in ENDED

    def describe(self) -> str:
        """How it ended: `out of time`, `killed by signal 9`, `cancelled`."""
        status, _, number = self.exit.partition(":")
        if self.state == "FAILED" and (killed := _signal(status, number)):
            return f"killed by {killed}"
        text = ENDED.get(self.state, self.state.lower())
        if self.state == "FAILED" and status not in ("", "0"):
            text += f" with exit status {status}"
        return text


def _signal(status: str, number: str) -> str:
    """The signal of an exit code: the second number, or the one that a shell adds to 128."""
    n = int(number) if number.isdigit() else 0
    if not n and status.isdigit() and int(status) > 128:
        n = int(status) - 128
    known = {s.value: s.name for s in signal.Signals}
    return known.get(n, f"signal {n}" if number.isdigit() and int(number) else "")


@dataclass(frozen=True)
class JobRequest:
    """A job, or a job array, that is to be submitted."""

    folder: Path
    """Where its script, its logs and its results are. The folder's name is unique among the user's jobs and
    becomes `Task.comment`."""
    name: str
    """Shared by all jobs of a sweep."""
    command: Sequence[str]
    """What each task runs, from the current directory."""
    tasks: int | None = None
    """How many tasks the array has; None: a plain job."""
    ranks: int = 1
    """Processes of each task."""
    scratch: str | None = None
    """A folder on the nodes' own disks. The script removes what a killed task leaves there."""
    restart: bool = True
    """Whether the scheduler may start a task again after its node failed."""
    after: str | None = None
    """The id of a job that must have ended, in whatever way, before this one starts."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that the command gets."""


class Scheduler(ABC):
    """A cluster's scheduler. Three methods are required, all others have defaults.

    Each task runs `JobRequest.command` and finds these environment variables:

    - `MERGELAB_TASK_ID`: `57_3` for task 3 of the array 57, `57` for a plain job.
    - `MERGELAB_TASK_INDEX`: 3; 0 for a plain job.
    - `MERGELAB_RANK`, `MERGELAB_RANKS`, `MERGELAB_LOCAL_RANK`: only where `JobRequest.ranks` is above 1.
    - `MERGELAB_RESTARTS`: how often the scheduler has started the task before; may be absent.

    Its output goes to the files `TASK_ID.out` and `TASK_ID.err` in `JobRequest.folder`. Its exit status is
    written to `status.INDEX` there when the script ends: a task in state FAILED without that file is taken
    for one whose node failed. `task_script.text` returns a bash script that does all of this. SIGUSR2 tells
    the command that its time limit is near, SIGTERM that it has to end now.

    Errors are `SchedulerUnavailable`, `SchedulerLimitReached` and `SchedulerRejected`.
    """

    name: str
    """The name by which it is registered. In a sweep's folder its jobs are in a folder of that name."""
    title: str
    """What messages call it."""
    options: Mapping[str, Any] = {}
    """Those of `hardware.scheduler.options`. They are recorded with the submissions, so that `job=monitor`
    can ask the scheduler as well."""
    worker = "mergelab.scheduling.worker"
    """The module that a task runs."""

    @abstractmethod
    def submit(self, job: JobRequest) -> str:
        """Submit a job once; returns its id.

        Raises:
            SchedulerUnavailable: when it is not known whether the job was accepted. `queue` is then asked
                for a task with the job's comment before anything is submitted again.
            SchedulerLimitReached, SchedulerRejected: when it was not accepted.
        """

    @abstractmethod
    def cancel(self, tasks: Iterable[str]) -> None:
        """End jobs, job arrays or tasks: `57`, `57_3`. Those that have ended are ignored."""

    @abstractmethod
    def queue(self, name: str | None = None) -> list[Task]:
        """The user's tasks, including those that ended within the last minutes.

        Args:
            name: of their jobs; None: all.
        Raises:
            SchedulerUnavailable: for every error, because nothing may be concluded from one.
        """

    def history(self, jobs: Sequence[str]) -> list[Task]:
        """Tasks of jobs that `queue` has forgotten; empty where there is no accounting."""
        return []

    def history_by_name(self, name: str) -> list[Task]:
        """All tasks of the jobs of a name; empty where there is no accounting."""
        return []

    def array_limit(self) -> int:
        """The most tasks of one array. `submit` may still raise SchedulerLimitReached: the array is then
        halved."""
        return 1000

    def missing_program(self) -> str | None:
        """The first program of the scheduler that this machine lacks; None where all are here."""
        return None

    def dry_run(self, job: JobRequest) -> None:  # noqa: B027 (not every scheduler can be asked)
        """Ask the scheduler whether it would accept a job, without submitting it.

        Raises:
            InputError: where it would not.
        """

    def describe(self) -> str:
        """What a task asks for, on one line."""
        return ", ".join(f"{k} {v}" for k, v in self.options.items())

    def cancel_command(self, name: str) -> str:
        """What a user types to end all jobs of a name; empty where there is no such command."""
        return ""

    def for_controller(self, run: Run) -> Scheduler:
        """The scheduler that submits the controller's job of `search.controller=job`, whose settings may be
        others than those of the tasks."""
        return self

    def current_job(self) -> str | None:
        """The id of the job in which this process runs; None outside of one."""
        return os.environ.get("MERGELAB_TASK_ID")

    def jobs_dir(self, sweep: Path) -> Path:
        """Where the jobs of a sweep are recorded."""
        return sweep / self.name


SCHEDULERS: Registry[Callable[[Any], Scheduler]] = Registry(
    "schedulers", "scheduler", ours=("mergelab.slurm.slurm_scheduler",)
)
"""By name, what makes a scheduler from its settings: from the mapping `hardware.scheduler.options`, or for
Slurm from `hardware.slurm`."""


def scheduler_of(run: Run) -> Scheduler | None:
    """The scheduler to which a run's tasks are submitted; None where it works on this machine.

    Raises:
        InputError: where there is no scheduler of that name, or its options are wrong.
    """
    hardware = run.hardware
    if hardware.slurm is not None and hardware.scheduler is not None:
        raise InputError("hardware: slurm and scheduler both name a cluster\nSet one of the two to null.")
    if hardware.slurm is not None:
        return SCHEDULERS.get("slurm")(hardware.slurm)
    if hardware.scheduler is None:
        return None
    use_extensions(run.composition)
    try:
        make = SCHEDULERS.get(hardware.scheduler.name)
    except LookupError as e:
        raise InputError(f"hardware.scheduler.name: {e.args[0]}") from None
    return make(dict(hardware.scheduler.options))


def dry_run(scheduler: Scheduler, ranks: int, array: bool) -> None:
    """Ask a cluster whether it would accept a task, before anything is submitted.

    Raises:
        InputError: with its answer, or where its programs are not on this machine.
    """
    import tempfile

    if (program := scheduler.missing_program()) is not None:
        raise InputError(
            f"hardware: it names a {scheduler.title} cluster, and there is no {program} on this machine\n"
            "Start it on a login node, or choose hardware=cpu, gpu or gpus."
        )
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "test"
        folder.mkdir()
        tasks = 2 if array else None
        scheduler.dry_run(JobRequest(folder, "mergelab-test", ["true"], tasks=tasks, ranks=ranks))
