"""What is done around runs and sweeps, as callbacks of Hydra: what can be refused before anything starts is
refused here, a grid's runs all at once; and when a grid has ended, its runs are compared."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict

from mergelab import execution
from mergelab.cli.reporting import report
from mergelab.composition import typed
from mergelab.core.errors import CommandFinished, InputError
from mergelab.jobs import offline, steps_of
from mergelab.jobs.step import merges, named, without_folder
from mergelab.scheduling import launcher
from mergelab.scheduling.launcher import is_grid
from mergelab.schema import Run


class Hooks(Callback):
    """What is done around runs and sweeps."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Stop before Hydra writes into the folder of a finished run."""
        from mergelab.core.run_dir import refuse_finished

        try:
            _run_without_folder(config)
            refuse_finished(Path(config.hydra.run.dir))
            if config.search.name != "none":
                raise InputError(f"search={config.search.name} is for many runs: add -m")
            if _on_cluster(config) and not all(s.on_login_node for s in named(config.job.steps)):
                raise InputError(f"hardware={config.hydra.runtime.choices.hardware} is a cluster: add -m")
        except InputError as e:
            raise CommandFinished(report(e)) from None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Preflight every run of a grid, so that none starts where one is invalid."""
        try:
            _run_without_folder(config)
        except InputError as e:
            raise CommandFinished(report(e)) from None
        if not is_grid(config):
            return
        from mergelab.report import terminal

        cluster = launcher.selected(config)
        runs: dict[int, tuple[list[str], Run]] = {}
        messages: list[str] = []
        for number, (arguments, cfg) in enumerate(_grid(config)):
            try:
                runs[number] = arguments, typed(cfg, cfg)
            except InputError as e:
                messages.append(f"run {number} ({' '.join(arguments)}): {e}")
        try:
            if cluster and not messages:
                _check_cluster(config, [run for _, run in runs.values()])
            elif not cluster and any(run.hardware.on_cluster for _, run in runs.values()):
                raise InputError("hardware: a cluster cannot be one of several choices; name it alone")
        except InputError as e:
            messages.append(str(e))
        for number, (arguments, run) in runs.items():
            folder = Path(config.hydra.sweep.dir).resolve() / str(number)
            if cluster and (folder / "result.json").exists():
                continue  # it is resumed, or was done
            for message in _problems(run, folder):
                messages.append(f"run {number} ({' '.join(arguments)}): {message}")
        if messages:
            for message in messages:
                terminal.failure(message)
            raise CommandFinished(InputError.exit_status)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Compare all runs of a grid. A search has reported its result itself."""
        if str(config.hydra.sweeper._target_).endswith("SearchSweeper"):
            return
        if launcher.selected(config) and (
            config.hardware.detach or not (Path(config.hydra.sweep.dir) / "1").exists()
        ):
            return  # nothing has ended yet, or the only run has shown its result
        from mergelab.report.sweep_comparison import compare_runs

        compare_runs(Path(config.hydra.sweep.dir))


def _on_cluster(config: DictConfig) -> bool:
    return config.hardware.slurm is not None or config.hardware.scheduler is not None


def _run_without_folder(config: DictConfig) -> None:
    """Run a job that keeps no folder, such as monitor, before Hydra makes one."""
    if without_folder(named(config.job.steps)):
        execution.execute(typed(config, config), Path(config.hydra.run.dir).resolve())
        raise CommandFinished(0)


def _check_cluster(config: DictConfig, runs: list[Run]) -> None:
    """What a cluster has to say before anything is submitted; and the folder in which these very runs
    were begun by an earlier command, if they were."""
    if all(s.on_login_node for r in runs for s in steps_of(r)):
        raise InputError(f"job={runs[0].job.name}: it is done on this machine: leave out -m")
    launcher.check_cluster(runs)
    with open_dict(config):
        config.hydra.sweep.dir = str(launcher.folder_of(config, runs))


def _grid(config: DictConfig) -> Iterator[tuple[list[str], DictConfig]]:
    """What was typed for each run of a grid sweep, and what it composes to."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    loader = GlobalHydra.instance().config_loader()
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(config.hydra.overrides.task))
    (grid,) = BasicSweeper.split_arguments(parsed, None)
    for arguments in grid:
        yield arguments, loader.load_sweep_config(config, list(arguments))


def _problems(run: Run, folder: Path) -> list[str]:
    """What preflight has against one run of a sweep that would work in `folder`."""
    from mergelab.context import plan_of

    if not any(s.examines for s in steps_of(run)):
        return []
    with offline.where_local(run):
        plan = plan_of(run, execution.model_folder(run, folder), merges=merges(run))
    return [f.text() for f in plan.errors]
