"""The Hydra launcher of `hardware=slurm...`: the runs of an ordinary `-m` as one job array.

A subclass of the submitit plugin's Slurm launcher, which composes and runs a job on the node as that one
does, and submits, watches and collects by `batches`. A search has workers of its own. Hydra loads this
class at every command, so that what it works with is imported when it launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from omegaconf import DictConfig, open_dict

from mergelab import composition
from mergelab.composition import without_hydra
from mergelab.core import hashing
from mergelab.core.errors import InputError, MergelabError, StepError
from mergelab.core.run_dir import hydra_value, short_path
from mergelab.schema import Run, identity_of

if TYPE_CHECKING:
    from mergelab.slurm.job_array import WorkItem, WorkResult

NAME = "mergelab_slurm"
ENV_IN_TASK = "MERGELAB_TASK"
"""Set in a task: `alone` for the only run of a command, else `many`. There the node is `here`."""


class SlurmArrayLauncher(SlurmLauncher):  # type: ignore[misc]  # the plugin has no types
    """Runs the runs of a sweep as Slurm tasks, and survives what happens to them and to itself."""

    on_node: Callable[..., dict[str, Any]]
    """What a task calls: with the launcher, a run's overrides, its number, Hydra's own state, the run's
    folder and whether it is the only one. Set by the entrypoint, and a function of its module."""
    end: Callable[[BaseException], BaseException]
    """From what ended it early to what is raised; set by the entrypoint, which tells it."""

    _sweep: Path | None = None
    """The folder, from the first launch on: some sweepers launch many times."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run each; returns what came of it, failures included."""
        try:
            return self._launch([list(o) for o in job_overrides], initial_job_idx)
        except (Exception, KeyboardInterrupt) as e:
            ended = type(self).end(e)
            if ended is e:
                raise
            raise ended from None

    def _launch(self, job_overrides: list[list[str]], first: int) -> Sequence[JobReturn]:
        from mergelab.report import terminal
        from mergelab.slurm import resume, submission_log
        from mergelab.slurm.job_array import JobArrayExecutor, WorkItem
        from mergelab.tracking import wandb_sync

        assert self.config is not None
        configs = [self._composed(o, first + i) for i, o in enumerate(job_overrides)]
        runs = [composition.typed(c, c) for c in configs]
        h = runs[0].hardware
        assert h.slurm is not None
        sweep = self._sweep = self._sweep or self._place(runs)
        self.of = JobArrayExecutor(
            sweep, submission_log.job_name(sweep), h.slurm, scratch=h.scratch, tell=terminal.aside
        )
        alone = len(runs) == 1 and first == 0
        before = self.of.failed()  # an earlier command has told of these: they get another chance
        items = []
        for i, (overrides, config) in enumerate(zip(job_overrides, configs, strict=True)):
            number = first + i
            about = hashing.digest(identity_of(replace(runs[i], hardware=replace(h, detach=False))))
            state = Singleton.get_state()
            there = [*overrides, f"hydra.sweep.dir={hydra_value(sweep)}"]
            folder = sweep / str(config.hydra.sweep.subdir)
            work = partial(type(self).on_node, self, there, number, state, folder, alone)
            name = f"run{number}-{about[:8]}"
            items.append(WorkItem(name, work, folder, attempt=max(before.get(name, {0})) + 1))
        terminal.say(
            f"mergelab  {len(items)} runs on Slurm" if not alone else "mergelab  a run on Slurm", "bold"
        )
        terminal.say(short_path(sweep), "dim")
        if h.detach:
            self._submit_all(items, alone)
            raise CommandFinished(0)
        results = self._collect(items, alone)
        wandb_sync.gather(sweep)
        wandb_sync.finish(sweep, runs[0].tracking)
        if is_grid(self.config):
            resume.collected(runs)
            if any(done.reason for done in results):
                raise CommandFinished(StepError.exit_status)
        return [self._returned(config, o, done) for config, o, done in
                zip(configs, job_overrides, results, strict=True)]  # fmt: skip

    def _place(self, runs: Sequence[Run]) -> Path:
        """The folder of these runs; what Hydra has made for them goes if they were begun elsewhere."""
        from mergelab.slurm import resume

        assert self.config is not None
        new = Path(str(self.config.hydra.sweep.dir)).resolve()
        place = resume.place(runs, new, folder_named(self.config))
        if place != new and [p.name for p in new.glob("*")] == ["multirun.yaml"]:
            (new / "multirun.yaml").unlink()
            new.rmdir()
        place.mkdir(parents=True, exist_ok=True)
        return place

    def _collect(self, items: list[WorkItem], alone: bool) -> list[WorkResult]:
        """What came of each; what was lost, and did not fail by itself, is tried once more."""
        from mergelab.report import terminal

        results: dict[int, WorkResult] = {}
        try:
            for attempt in (1, 2):
                left = [i for i in range(len(items)) if i not in results]
                again = [replace(items[i], attempt=items[i].attempt + attempt - 1) for i in left]
                with terminal.waiting() as show:
                    self.of.show = show
                    for place, done in self.of.run(again, array=not alone) if again else ():
                        if done.reason is None or not done.lost or attempt == 2:
                            results[left[place]] = done
                            _tell(items[left[place]], done, alone)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted{self._cancelled()}\nThe same command again submits what has not finished."
            ) from None
        if alone:
            self._show_output(items[0])
        return [results[i] for i in range(len(items))]

    def _cancelled(self) -> str:
        """End what runs; in words."""
        try:
            jobs = self.of.cancel()
        except MergelabError as e:
            return f"; Slurm does not answer, and its jobs go on ({e})"
        return f"; cancelled Slurm job {', '.join(jobs)}" if jobs else ""

    def _show_output(self, item: WorkItem) -> None:
        """What the run has printed on its node."""
        from mergelab.report import terminal
        from mergelab.slurm.batch_dir import log_of

        ledger = self.of.ledger
        claim = ledger.assignments[max(key for key in ledger.assignments if key[0] == item.name)]
        path = log_of(ledger.place(claim.batch), ledger.jobs[claim.batch], claim.task)
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        terminal.console.print(text.rstrip(), soft_wrap=True)

    def _submit_all(self, items: list[WorkItem], alone: bool) -> None:
        import time

        from mergelab.report import terminal
        from mergelab.slurm import job_array

        with terminal.waiting() as show:
            while not self.of.submit(items, array=not alone):
                show("Slurm takes no more jobs now; waiting to submit the rest")
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

    def _returned(self, config: DictConfig, overrides: list[str], done: WorkResult) -> JobReturn:
        out = JobReturn(overrides=filter_overrides(overrides), hydra_cfg=config, cfg=without_hydra(config))
        out.status = JobStatus.COMPLETED if done.reason is None else JobStatus.FAILED
        out.return_value = done.value["fitness"] if done.reason is None else StepError(done.reason)
        return out

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("task_function", "of")}


class CommandFinished(SystemExit):
    """The end of a command that has told everything, or does not wait for it."""


def is_grid(config: DictConfig) -> bool:
    """Whether all runs of the command are known beforehand; another sweeper makes them up as it goes."""
    return str(config.hydra.sweeper._target_).endswith("BasicSweeper")


def folder_named(config: DictConfig) -> bool:
    """Whether the folder of a sweep was named on the command line."""
    return any(o.startswith("hydra.sweep.dir=") for o in config.hydra.overrides.hydra)


def _tell(item: WorkItem, done: WorkResult, alone: bool) -> None:
    from mergelab.report import terminal

    number = item.folder.name
    if done.reason is not None:
        terminal.failure(f"run {number}: {done.reason}\n{short_path(item.folder)}/mergelab.log")
    elif not alone:
        fitness = done.value["fitness"]
        terminal.say(f"✓ run {number}" + ("" if fitness is None else f"   {fitness:.3f}"))


def same_cluster(runs: Sequence[Run]) -> None:
    """Raise InputError where runs of one command ask for different tasks: an array has one kind."""
    asked = {repr((r.hardware.slurm, r.hardware.scratch, r.hardware.detach)) for r in runs}
    if len(asked) > 1:
        raise InputError(
            "hardware: the runs of one command ask for different Slurm tasks, and an array has one kind\n"
            "Start them as several commands, with hardware.detach=true."
        )
