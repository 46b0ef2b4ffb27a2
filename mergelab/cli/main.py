"""The command line: what was typed becomes a `Run`, what goes wrong one short message and an exit status: 0
done, 1 a step failed, 2 the input was wrong, 130 interrupted.

A thin layer: `composition` composes, `execution` executes, as they do for the Python API. Nothing heavy is
imported here: `--help` and `--cfg` must answer at once.
"""

import atexit
import gc
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mergelab import __version__, composition, execution
from mergelab.composition import CONF, typed
from mergelab.core.errors import INTERRUPTED, InputError, MergelabError
from mergelab.jobs import offline, steps_of
from mergelab.jobs.step import merges, named
from mergelab.optimization.sweeper import SearchSweeper
from mergelab.scheduling import launcher, on_node
from mergelab.scheduling.launcher import ENV_IN_TASK, ArrayLauncher, is_grid
from mergelab.schema import Run


class _CommandFinished(SystemExit):
    """The end of a run or an evolution whose failure has been told; passes through Hydra untouched."""


def _evolution_end(error: BaseException) -> BaseException:
    """What an evolution that has failed ends with."""
    if isinstance(error, (MergelabError, KeyboardInterrupt)):
        return _CommandFinished(_tell(error))
    if isinstance(error, OSError) and error.strerror:
        return _CommandFinished(_tell(MergelabError(f"{error.filename or 'the sweep'}: {error.strerror}")))
    return error


def _on_node(
    array: ArrayLauncher, overrides: list[str], number: int, state: Any, folder: Path, alone: bool
) -> dict[str, Any]:
    """One run of a command, in a task on a cluster; returns its fitness. A run that a task finished just
    before it was lost is not done again."""
    from mergelab.core.run_dir import read_memo

    before = read_memo(folder / "result.json")
    if before.get("status") == "done":
        return {"fitness": (before.get("fitness") or {}).get("value")}
    os.environ[ENV_IN_TASK] = "alone" if alone else "many"
    array.task_function = _task.__wrapped__
    done = array.run_in_task(overrides, number, state)
    return {"fitness": done.return_value}  # raises what ended the run


SearchSweeper.end = ArrayLauncher.end = staticmethod(_evolution_end)
ArrayLauncher.on_node = staticmethod(_on_node)
for plugin in (SearchSweeper, ArrayLauncher):
    Plugins.instance().register(plugin)
composition.register()


class Hooks:
    """What is done around runs and sweeps. (Hydra calls these methods.)"""

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
            raise _CommandFinished(_tell(e)) from None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Preflight every run of a grid, so that none starts where one is invalid."""
        try:
            _run_without_folder(config)
        except InputError as e:
            raise _CommandFinished(_tell(e)) from None
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
                continue  # it is gone on with, or was done
            for message in _problems(run, folder):
                messages.append(f"run {number} ({' '.join(arguments)}): {message}")
        if messages:
            for message in messages:
                terminal.failure(message)
            raise _CommandFinished(InputError.exit_status)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Compare all runs of the sweep's folder; an evolution has told its own story."""
        if str(config.hydra.sweeper._target_).endswith(SearchSweeper.__name__):
            return
        if launcher.selected(config) and (
            config.hardware.detach or not (Path(config.hydra.sweep.dir) / "1").exists()
        ):
            return  # nothing has ended yet; or one run, which has shown its result
        from mergelab.report.sweep_comparison import compare_runs

        compare_runs(Path(config.hydra.sweep.dir))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda **_: None
        raise AttributeError(name)


def _on_cluster(config: DictConfig) -> bool:
    return config.hardware.slurm is not None or config.hardware.scheduler is not None


def _run_without_folder(config: DictConfig) -> None:
    """Run a job that keeps no folder, such as monitor, before Hydra makes one."""
    steps = named(config.job.steps)
    if steps and not any(s.keeps_folder for s in steps):
        execution.execute(typed(config, config), Path(config.hydra.run.dir).resolve())
        raise _CommandFinished(0)


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


@hydra.main(config_path=str(CONF), config_name="config")
def _task(cfg: DictConfig) -> float | None:
    """One run. Returns its fitness, higher better, so that any sweeper can use it."""
    single = HydraConfig.get().mode == RunMode.RUN
    try:
        return _run(cfg)
    except (Exception, KeyboardInterrupt) as e:
        if isinstance(e, OSError) and e.strerror:  # of a step it would be an error of that step
            e = InputError(_unwritable(e))
        if not isinstance(e, (MergelabError, KeyboardInterrupt)):
            log = str(Path(HydraConfig.get().runtime.output_dir)) + "/mergelab.log"
            e = MergelabError(f"unexpected: {type(e).__name__}: {e}\nThis is a bug; {log} has the traceback.")
        status = _tell(e)
        if single or isinstance(e, KeyboardInterrupt):
            raise _CommandFinished(status) from None
        raise e from None  # a sweep's launcher has to see it


def _run(cfg: DictConfig) -> float | None:
    from mergelab.report import terminal

    h = HydraConfig.get()
    run = typed(cfg, OmegaConf.create({"hydra": h}))
    if ENV_IN_TASK in os.environ:  # on the node that has been asked for
        run = on_node(run)
    terminal.brief = h.mode == RunMode.MULTIRUN and os.environ.get(ENV_IN_TASK) != "alone"
    return execution.execute(run, Path(h.runtime.output_dir)).fitness


def _tell(error: BaseException) -> int:
    """Say what went wrong; returns the exit status."""
    from mergelab.report import terminal

    if isinstance(error, KeyboardInterrupt):
        terminal.failure(str(error) or "interrupted; nothing half-made was left")
        return INTERRUPTED
    if isinstance(error, MergelabError):
        for message in getattr(error, "messages", [str(error)]):
            terminal.failure(message)
        return error.exit_status
    if isinstance(error, OSError) and error.strerror:
        terminal.failure(_unwritable(error))
    else:
        terminal.failure(composition.explain(error, sys.argv[1:]))
    return InputError.exit_status


def _unwritable(error: OSError) -> str:
    """Why the run's folder cannot be made, or written to."""
    at = f" {error.filename}" if error.filename else ""
    return f"hydra.run.dir: cannot write{at}: {error.strerror}\nChoose another folder: hydra.run.dir=DIR"


def _help_wanted(arguments: list[str]) -> bool:
    return any(a in ("--help", "-h") for a in arguments)


def _config_dirs(arguments: list[str]) -> list[Path]:
    """The user's own folders of groups, as given with --config-dir."""
    import argparse

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    known, _ = parser.parse_known_args(arguments)
    return [Path(known.config_dir)] if known.config_dir else []


def _show_help(arguments: list[str]) -> None:
    from mergelab.cli import help as page

    defaults = OmegaConf.load(CONF / "config.yaml").defaults
    chosen = {str(k): str(v) for d in defaults if isinstance(d, DictConfig) for k, v in d.items()}
    page.show([*_config_dirs(arguments), CONF], chosen)


def monitor() -> None:
    """`mergelab-monitor [FOLDER] [--once] [monitor.KEY=VALUE ...]`: the command with job=monitor."""
    words = {"--once": "monitor.once=true"}
    given = [
        words.get(a, a if "=" in a or a.startswith("-") else f"monitor.folder='{a}'") for a in sys.argv[1:]
    ]
    sys.argv[1:] = ["job=monitor", *given]
    main()


def main() -> None:
    """Run the command line and exit with its status."""
    # Python searches what torch and its kin have imported for garbage, again and again while they are
    # imported and once more at the end: 0.6 s for nothing.
    gc.set_threshold(50_000, 20, 50)
    atexit.register(gc.freeze)
    arguments = sys.argv[1:]
    if "--version" in arguments:
        print(f"mergelab {__version__}")
        sys.exit(0)
    if _help_wanted(arguments):
        _show_help(arguments)
        sys.exit(0)
    debugging = os.environ.get("HYDRA_FULL_ERROR") == "1"
    # Hydra prints a traceback and exits with 1 unless it is asked to raise.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")  # but in a run's log
    try:
        composition.register(next(map(str, _config_dirs(arguments)), None))
    except InputError as e:  # a file in the user's folder
        sys.exit(_tell(e))
    try:
        _task()
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as e:  # while composing
        if debugging:
            raise
        sys.exit(_tell(e))
    except MergelabError as e:  # of a sweep: told when it happened
        sys.exit(e.exit_status)
    except KeyboardInterrupt as e:
        sys.exit(_tell(e))
