"""The entrypoint, and the only module that knows Hydra is running.

It lets Hydra compose, turns what Hydra composed into a `Run`, and what goes wrong into one short
message and an exit status: 0 done, 1 a step failed, 2 the input was wrong, 130 interrupted.

Nothing heavy is imported here: `--help` and `--cfg` must answer at once.
"""

import atexit
import gc
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict  # noqa: UP035 (OmegaConf reads it at run time)

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mergelab import __version__, composing
from mergelab.errors import INTERRUPTED, InputError, MergelabError, did_you_mean
from mergelab.optimization.sweeper import Evolution
from mergelab.schema import Run
from mergelab.slurm import on_node
from mergelab.slurm.launcher import NAME as SLURM
from mergelab.slurm.launcher import TASK, Durable, folder_named, is_grid, same_cluster, without_hydra

PACKAGE = Path(__file__).resolve().parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
"""The shipped groups: inside an installed package, beside it in the repository."""


HERE = {"plan", "inspect", "fetch", "publish"}
"""Steps that are done where they are asked for, on a cluster's login node, whatever the hardware."""


@dataclass
class _Composed(Run):
    """What Hydra composes: a Run whose mappings are still open, so that a new expert or a parameter
    is given like any other value, without a plus. `_typed` closes them."""

    experts: Dict[str, Any] = field(default_factory=dict)  # noqa: UP006 (read by OmegaConf)


def _schema() -> DictConfig:
    node: DictConfig = OmegaConf.structured(_Composed)
    for mapping in (node.experts, node.method.parameters, node.eval.shares, node.eval.metrics):
        OmegaConf.set_struct(mapping, False)
    return node


def _typed(cfg: DictConfig) -> Run:
    """The Run that a composition comes to.

    Raises:
        InputError: for an expert's key or value that the schema does not have.
    """
    try:
        run: Run = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(Run), OmegaConf.to_container(cfg))
        )  # type: ignore[assignment]
    except OmegaConfBaseException as e:
        raise InputError(composing.explain(e)) from None
    return run


ConfigStore.instance().store(name="run", node=_schema(), replace=True)


class _Finished(SystemExit):
    """The end of a run or an evolution whose failure has been told; passes through Hydra untouched."""


def _evolution_run(cfg: DictConfig) -> Run:
    run = _typed(cfg)
    _stay_offline(run)
    return run


def _evolution_end(error: BaseException) -> BaseException:
    """What an evolution that has failed ends with."""
    if isinstance(error, (MergelabError, KeyboardInterrupt)):
        return _Finished(_tell(error))
    if isinstance(error, OSError) and error.strerror:
        return _Finished(_tell(MergelabError(f"{error.filename or 'the sweep'}: {error.strerror}")))
    return error


def _on_node(
    launcher: Durable, overrides: list[str], number: int, state: Any, folder: Path, alone: bool
) -> dict[str, Any]:
    """One run of a command, in a Slurm task; returns its fitness. What a task that was lost in its very
    last moment has finished is not done again."""
    from mergelab.workspace import read_memo

    before = read_memo(folder / "result.json")
    if before.get("status") == "done":
        return {"fitness": (before.get("fitness") or {}).get("value")}
    os.environ |= {TASK: "alone" if alone else "many", "SUBMITIT_EXECUTOR": "slurm"}
    launcher.task_function = _task.__wrapped__
    done = launcher(overrides, "hydra.sweep.dir", number, str(number), state)
    return {"fitness": done.return_value}  # raises what ended the run


Evolution.typed = Durable.typed = staticmethod(_evolution_run)
Evolution.end = Durable.end = staticmethod(_evolution_end)
Durable.on_node = staticmethod(_on_node)
for plugin in (Evolution, Durable):
    Plugins.instance().register(plugin)


class Hooks:
    """What is done around runs and sweeps. (Hydra calls these methods.)"""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Stop before Hydra writes into the folder of a finished run."""
        from mergelab.workspace import refuse_finished

        try:
            _watch_if_asked(config)
            refuse_finished(Path(config.hydra.run.dir))
            if config.search.name != "none":
                raise InputError(f"search={config.search.name} is for many runs: add -m")
            if config.hardware.slurm is not None and not set(config.job.steps) <= HERE:
                raise InputError(f"hardware={config.hydra.runtime.choices.hardware} is a cluster: add -m")
        except InputError as e:
            raise _Finished(_tell(e)) from None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Preflight every run of a grid, so that none starts where one is invalid."""
        try:
            _watch_if_asked(config)
        except InputError as e:
            raise _Finished(_tell(e)) from None
        if not is_grid(config):
            return
        from mergelab.report import terminal

        slurm = config.hydra.runtime.choices.get("hydra/launcher") == SLURM
        runs: dict[int, tuple[list[str], Run]] = {}
        messages: list[str] = []
        for number, (typed, cfg) in enumerate(_grid(config)):
            try:
                runs[number] = typed, _typed(cfg)
            except InputError as e:
                messages.append(f"run {number} ({' '.join(typed)}): {e}")
        try:
            if slurm and not messages:
                _check_cluster(config, [run for _, run in runs.values()])
            elif not slurm and any(run.hardware.slurm for _, run in runs.values()):
                raise InputError("hardware: a cluster cannot be one of several choices; name it alone")
        except InputError as e:
            messages.append(str(e))
        for number, (typed, run) in runs.items():
            folder = Path(config.hydra.sweep.dir).resolve() / str(number)
            if slurm and (folder / "result.json").exists():
                continue  # it is gone on with, or was done
            for message in _problems(run, folder, typed):
                messages.append(f"run {number} ({' '.join(typed)}): {message}")
        if messages:
            for message in messages:
                terminal.failure(message)
            raise _Finished(InputError.exit_status)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Compare all runs of the sweep's folder; an evolution has told its own story."""
        if str(config.hydra.sweeper._target_).endswith(Evolution.__name__):
            return
        if config.hydra.runtime.choices.get("hydra/launcher") == SLURM and (
            config.hardware.detach or not (Path(config.hydra.sweep.dir) / "1").exists()
        ):
            return  # nothing has ended yet; or one run, which has shown its result
        from mergelab.report.comparison import compare_runs

        compare_runs(Path(config.hydra.sweep.dir))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda **_: None
        raise AttributeError(name)


def _watch_if_asked(config: DictConfig) -> None:
    """job=monitor looks on, and leaves nothing behind: not even a folder of Hydra's."""
    if config.job.name == "monitor":
        from mergelab.monitor.view import watch

        watch(_typed(without_hydra(config)).monitor)
        raise _Finished(0)


def _check_cluster(config: DictConfig, runs: list[Run]) -> None:
    """What a cluster has to say before anything is submitted; and the folder in which these very runs
    were begun by an earlier command, if they were."""
    from mergelab.slurm import asking, resumed

    if all(set(r.job.steps) <= HERE for r in runs):
        raise InputError(f"job={runs[0].job.name}: it is done on this machine: leave out -m")
    same_cluster(runs)
    hardware = runs[0].hardware
    if hardware.slurm is None:
        raise InputError("hydra/launcher: it submits to Slurm, and hardware names no cluster: hardware=slurm")
    asking.check(hardware.slurm, 1, array=len(runs) > 1)
    with open_dict(config):
        config.hydra.sweep.dir = str(resumed.place(runs, Path(config.hydra.sweep.dir), folder_named(config)))


def _grid(config: DictConfig) -> Iterator[tuple[list[str], DictConfig]]:
    """What was typed for each run of a grid sweep, and what it composes to."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    loader = GlobalHydra.instance().config_loader()
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(config.hydra.overrides.task))
    (grid,) = BasicSweeper.split_arguments(parsed, None)
    for typed in grid:
        yield typed, without_hydra(loader.load_sweep_config(config, list(typed)))


def _problems(run: Run, folder: Path, typed: list[str]) -> list[str]:
    """What preflight has against one run of a sweep that would work in `folder`."""
    from mergelab.steps.planning import plan_of

    if "preflight" not in run.job.steps:
        return []
    _stay_offline(run)
    plan = plan_of(run, _model_folder(run, folder), typed, merges="merge" in run.job.steps)
    return [f.text() for f in plan.findings if f.severity == "error"]


def _model_folder(run: Run, folder: Path) -> Path:
    """Where the run's model goes: `output`, or `model/` in the run's folder."""
    return Path(run.output).expanduser().resolve() if run.output else folder / "model"


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
            logging.getLogger("mergelab").exception("unexpected")
            log = str(Path(HydraConfig.get().runtime.output_dir)) + "/mergelab.log"
            e = MergelabError(f"unexpected: {type(e).__name__}: {e}\nThis is a bug; {log} has the traceback.")
        status = _tell(e)
        if single or isinstance(e, KeyboardInterrupt):
            raise _Finished(status) from None
        raise e from None  # a sweep's launcher has to see it


def _run(cfg: DictConfig) -> float | None:
    from mergelab.merging import scratch
    from mergelab.report import terminal
    from mergelab.workspace import Workspace, read_json, short_path

    h = HydraConfig.get()
    run = _typed(cfg)
    folder = Path(h.runtime.output_dir)
    workspace = Workspace(folder, _model_folder(run, folder), scratch.folder())
    chosen = h.runtime.choices
    parts = [str(chosen[g]) for g in ("job", "model", "experts", "method", "eval") if chosen.get(g)]
    if TASK in os.environ:  # on the node that has been asked for
        run = on_node(run)
    terminal.brief = h.mode == RunMode.MULTIRUN and os.environ.get(TASK) != "alone"
    terminal.heading("mergelab  " + " · ".join(parts), short_path(folder))
    _stay_offline(run)
    from mergelab.steps import run_job

    with workspace.held():
        workspace.begin(
            {
                "choices": {k: v for k, v in chosen.items() if not k.startswith("hydra/") and v},
                "overrides": list(h.overrides.task),
                "command": _command(list(h.overrides.task)),
                "seed": run.seed,
            }
        )
        run_job(run, workspace)
    result = read_json(workspace.result)
    fitness = (result.get("fitness") or {}).get("value")
    return float(fitness) if fitness is not None else None


def _command(overrides: list[str]) -> str:
    return shlex.join(["python", "-m", "mergelab", *overrides])


def _stay_offline(run: Run) -> None:
    """Tell the libraries not to look anything up where everything is on this machine."""
    local = run.eval.kind in ("none", "perplexity") or (run.eval.kind == "skills" and run.model.tasks)
    names = [run.model.base, *(run.model.roles[e] for e in run.experts if e in run.model.roles)]
    zoo = all(str(c.path).startswith("zoo:") for c in names) and not any(e.path for e in run.experts.values())
    if local and zoo and run.method.path is None and "publish" not in run.job.steps:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


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
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        options = [o for o in error.options if not str(o).startswith("_")]
        near = did_you_mean(name, options)
        terminal.failure(f"{group}={name}: there is no such option.{near}\nThere are {', '.join(options)}.")
        return InputError.exit_status
    terminal.failure(_message(error))
    return InputError.exit_status


def _message(error: BaseException) -> str:
    """What Hydra or OmegaConf has against the command line."""
    cause = error.__cause__
    if isinstance(error, OverrideParseException):
        reason = composing.plain(str(error)).splitlines()[-1]
        reason = reason.replace("missing EQUAL at", "there is no = before")
        if set(reason) <= {"^"}:  # Hydra points at a sign that it knows only within quotes
            return f"'{error.override}' cannot be read\nPut texts in quotes: 'key=[\"one\", \"other\"]'."
        return (
            f"'{error.override}' cannot be read: {reason}\nArguments are key=value; quote what holds spaces."
        )
    if isinstance(error, OmegaConfBaseException):
        return composing.explain(error)
    if isinstance(cause, OmegaConfBaseException):
        return composing.explain(cause, composing.overridden(str(error)))
    if isinstance(error, OSError) and error.strerror:
        return _unwritable(error)
    if isinstance(error, ValueError):
        return f"{shlex.join(sys.argv[1:])}: {error}"
    return composing.plain(str(error), str(cause or ""))


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
    from mergelab.report import help as page

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
    # Before it ends, Python searches all that torch has imported for garbage: 0.3 s for nothing.
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
    warnings.filterwarnings("ignore")
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
