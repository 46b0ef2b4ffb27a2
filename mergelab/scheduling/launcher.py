"""The Hydra launcher of clusters: the runs of an ordinary `-m` as one job array.

A search submits its candidates itself. Hydra imports this module at every command, so that what the launcher
works with is imported when it launches.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher
from omegaconf import DictConfig, open_dict

from mergelab import composition
from mergelab.composition import LAUNCHERS, without_hydra
from mergelab.core.errors import (
    CommandFinished,
    InputError,
    Interrupted,
    MergelabError,
    StepError,
    os_errors_reported,
)
from mergelab.core.heartbeat import job as task_id
from mergelab.core.run_dir import hydra_value, read_memo, short_path
from mergelab.jobs.settings import with_extensions
from mergelab.schema import Run

if TYPE_CHECKING:
    from mergelab.scheduling.job_array import WorkItem, WorkResult

ENV_IN_TASK = "MERGELAB_TASK"
"""Set in a task: `alone` for the only run of a command, else `many`. The run then works on this node."""


class ArrayLauncher(BaseSubmititLauncher):  # type: ignore[misc]  # the plugin has no types
    """Runs the runs of a sweep as the tasks of a cluster. They survive this process, and their own loss.

    The submitit plugin's launcher composes and does a run in its task (`__call__`). Runs are submitted,
    watched and collected by `JobArrayExecutor` instead of submitit's executor.
    """

    _sweep: Path | None = None
    """The folder, from the first launch on: some sweepers launch many times."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run each; returns the results, failures included."""
        with os_errors_reported("the sweep"):
            return self._launch([list(o) for o in job_overrides], initial_job_idx)

    def _launch(self, job_overrides: list[list[str]], first: int) -> Sequence[JobReturn]:
        from mergelab.report import terminal
        from mergelab.scheduling import resume, submission_log
        from mergelab.scheduling.job_array import JobArrayExecutor, WorkItem
        from mergelab.scheduling.scheduler import scheduler_of
        from mergelab.tracking import wandb_sync

        assert self.config is not None
        configs = [self._composed(o, first + i) for i, o in enumerate(job_overrides)]
        runs = [composition.typed(c, c) for c in configs]
        h = runs[0].hardware
        scheduler = scheduler_of(runs[0])
        assert scheduler is not None
        sweep = self._sweep = self._sweep or self._folder(runs)
        self.executor = JobArrayExecutor(
            sweep, submission_log.job_name(sweep), scheduler, scratch=h.scratch, report=terminal.aside
        )
        alone = len(runs) == 1 and first == 0
        before = self.executor.failed()  # an earlier command has reported these: they are tried again
        items = []
        for i, (overrides, config) in enumerate(zip(job_overrides, configs, strict=True)):
            number = first + i
            state = Singleton.get_state()
            arguments = [*overrides, f"hydra.sweep.dir={hydra_value(sweep)}"]
            folder = sweep / str(config.hydra.sweep.subdir)
            in_task = partial(self.run_in_task, arguments, number, state, folder, alone)
            work = with_extensions(runs[i], in_task)
            name = f"run{number}-{resume.settings_digest(runs[i])[:8]}"
            items.append(WorkItem(name, work, folder, attempt=max(before.get(name, {0})) + 1))
        what = "a run" if alone else f"{len(items)} runs"
        terminal.say(f"mergelab  {what} on {scheduler.title}", "bold")
        terminal.say(short_path(sweep), "dim")
        if h.detach:
            self._submit_all(items, alone)
            raise CommandFinished(0)
        results = self._collect(items, alone)
        wandb_sync.gather(sweep)
        wandb_sync.finish(sweep, runs[0].tracking)
        if is_grid(self.config):
            resume.forget_collected(runs)
            if any(result.reason for result in results):
                raise CommandFinished(StepError.exit_status)
        return [self._returned(config, o, result) for config, o, result in
                zip(configs, job_overrides, results, strict=True)]  # fmt: skip

    def run_in_task(
        self, overrides: list[str], number: int, state: Any, folder: Path, alone: bool
    ) -> dict[str, Any]:
        """Compose a run and do it, in a task; returns its fitness. A run that a task finished just before it
        was lost is not done again.

        Args:
            overrides: of the run.
            number: of the run in its sweep.
            state: of Hydra's singletons, as it was where the run was submitted.
            folder: of the run.
            alone: whether it is the only run of its command.
        Raises:
            MergelabError: the exception that ended the run.
        """
        before = read_memo(folder / "result.json")
        if before.get("status") == "done":
            return {"fitness": (before.get("fitness") or {}).get("value")}
        os.environ[ENV_IN_TASK] = "alone" if alone else "many"
        # The plugin asks submitit for the number of the job, which submitit knows of its own jobs alone.
        os.environ |= {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": task_id() or str(number)}
        done = self(overrides, "hydra.sweep.dir", number, str(number), state)
        return {"fitness": done.return_value}

    def _folder(self, runs: Sequence[Run]) -> Path:
        """The folder of these runs. If they were begun elsewhere, what Hydra has made for them is removed."""
        assert self.config is not None
        new = Path(str(self.config.hydra.sweep.dir)).resolve()
        folder = folder_of(self.config, runs)
        if folder != new and [p.name for p in new.glob("*")] == ["multirun.yaml"]:
            (new / "multirun.yaml").unlink()
            new.rmdir()
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _collect(self, items: list[WorkItem], alone: bool) -> list[WorkResult]:
        """The result of each. A run whose task was lost, and did not fail by itself, is retried once."""
        from mergelab.report import terminal

        results: dict[int, WorkResult] = {}
        try:
            for attempt in (1, 2):
                left = [i for i in range(len(items)) if i not in results]
                again = [replace(items[i], attempt=items[i].attempt + attempt - 1) for i in left]
                with terminal.waiting() as show:
                    self.executor.show_status = show
                    for position, result in self.executor.run(again, array=not alone) if again else ():
                        if result.reason is None or not result.lost or attempt == 2:
                            results[left[position]] = result
                            _report(items[left[position]], result, alone)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted{self._cancelled()}\nThe same command submits again what has not finished."
            ) from None
        if alone:
            self._show_output(items[0])
        return [results[i] for i in range(len(items))]

    def _cancelled(self) -> str:
        """Cancel what runs; returns a text that says so."""
        title = self.executor.scheduler.title
        try:
            jobs = self.executor.cancel()
        except MergelabError as e:
            return f"; {title} does not answer, and its jobs keep running ({e})"
        return f"; cancelled {title} job {', '.join(jobs)}" if jobs else ""

    def _show_output(self, item: WorkItem) -> None:
        """Print what the run has printed on its node."""
        from mergelab.report import terminal
        from mergelab.scheduling.batch_dir import log_of

        log = self.executor.log
        assigned = log.assignments[max(key for key in log.assignments if key[0] == item.name)]
        path = log_of(log.batch_dir(assigned.batch), log.jobs[assigned.batch], assigned.task)
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        terminal.console.print(text.rstrip(), soft_wrap=True)

    def _submit_all(self, items: list[WorkItem], alone: bool) -> None:
        import time

        from mergelab.report import terminal
        from mergelab.scheduling import job_array

        title = self.executor.scheduler.title
        with terminal.waiting() as show:
            while not self.executor.submit(items, array=not alone):
                show(f"{title} accepts no more jobs now; waiting to submit the rest")
                time.sleep(job_array.POLL_QUEUE_S)
        terminal.say("  python -m mergelab job=monitor   shows them", "dim")
        terminal.say("  the same command without hardware.detach waits for them and shows the result", "dim")

    def _composed(self, overrides: list[str], number: int) -> DictConfig:
        assert self.hydra_context is not None and self.config is not None
        config: DictConfig = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config.hydra.job):
            config.hydra.job.num = number
            config.hydra.job.id = f"{number}"
        return config

    def _returned(self, config: DictConfig, overrides: list[str], result: WorkResult) -> JobReturn:
        out = JobReturn(overrides=filter_overrides(overrides), hydra_cfg=config, cfg=without_hydra(config))
        out.status = JobStatus.COMPLETED if result.reason is None else JobStatus.FAILED
        out.return_value = result.value["fitness"] if result.reason is None else StepError(result.reason)
        return out

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "executor"}


def selected(config: DictConfig) -> bool:
    """Whether a composition selects this launcher."""
    return config.hydra.runtime.choices.get("hydra/launcher") in LAUNCHERS


def is_grid(config: DictConfig) -> bool:
    """Whether all runs of the command are known beforehand; other sweepers choose them one after another."""
    return str(config.hydra.sweeper._target_).endswith("BasicSweeper")


def folder_named(config: DictConfig) -> bool:
    """Whether the folder of a sweep was named on the command line."""
    return any(o.startswith("hydra.sweep.dir=") for o in config.hydra.overrides.hydra)


def folder_of(config: DictConfig, runs: Sequence[Run]) -> Path:
    """The folder in which these very runs were begun by an earlier command, else the one that is composed."""
    from mergelab.scheduling import resume
    from mergelab.scheduling.scheduler import scheduler_of

    scheduler = scheduler_of(runs[0])
    assert scheduler is not None
    return resume.find_or_record_folder(
        runs, scheduler, Path(str(config.hydra.sweep.dir)), folder_named(config)
    )


def _report(item: WorkItem, result: WorkResult, alone: bool) -> None:
    from mergelab.report import terminal

    number = item.folder.name
    if result.reason is not None:
        terminal.failure(f"run {number}: {result.reason}\n{short_path(item.folder)}/mergelab.log")
    elif not alone:
        fitness = result.value["fitness"]
        terminal.say(f"✓ run {number}" + ("" if fitness is None else f"   {fitness:.3f}"))


def check_cluster(runs: Sequence[Run]) -> None:
    """Ask the cluster whether it would accept the runs of one command.

    Raises:
        InputError: where they name no cluster, where it would not accept them, or where they ask for
            different tasks, because an array has one kind.
    """
    from mergelab.scheduling.scheduler import dry_run, scheduler_of

    asked = {repr((h.slurm, h.scheduler, h.scratch, h.detach)) for h in (r.hardware for r in runs)}
    if len(asked) > 1:
        raise InputError(
            "hardware: the runs of one command ask for different tasks, and an array has tasks of one kind\n"
            "Start them as several commands, with hardware.detach=true."
        )
    scheduler = scheduler_of(runs[0])
    if scheduler is None:
        raise InputError(
            "hydra/launcher: it submits to a cluster, and hardware names none\nSet hardware=slurm."
        )
    dry_run(scheduler, 1, array=len(runs) > 1)
