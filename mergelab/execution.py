"""One run from its composition to its result: what the command and the Python API have in common."""

from __future__ import annotations

import logging
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergelab import __version__, composition
from mergelab.core import run_log
from mergelab.core.errors import InputError, MergelabError, one_line
from mergelab.core.registry import use_extensions
from mergelab.core.run_dir import RunDir, refuse_finished, short_path
from mergelab.jobs import offline, steps_of
from mergelab.jobs.step import without_folder
from mergelab.report import terminal
from mergelab.result import Result
from mergelab.schema import Run
from mergelab.schema.conditions import file_of

log = logging.getLogger("mergelab.run")

_running = threading.Lock()


@contextmanager
def exclusively() -> Iterator[None]:
    """Keep other runs out of this process: they would share torch's settings, its random generators, and the
    terminal.

    Raises:
        InputError: when another thread has one in progress.
    """
    if not _running.acquire(blocking=False):
        raise InputError(
            "another run is in progress in this process, and runs of one process would share torch's threads "
            "and random generators\nWait for it, or start this one in a process of its own."
        )
    try:
        yield
    finally:
        _running.release()


def model_folder(run: Run, folder: Path) -> Path:
    """Where the run's model goes: `output`, or `model/` in the run's folder."""
    return Path(run.output).expanduser().resolve() if run.output else folder / "model"


def execute(run: Run, folder: Path, *, save_composition: bool = False) -> Result:
    """Run the job's steps in a folder, whatever of it is there already being left alone. A job whose steps
    keep no folder gets none.

    Args:
        run: with the composition that it comes from.
        folder: absolute.
        save_composition: leave what was composed in `.hydra/`, where Hydra itself does not.
    Raises:
        InputError: for what is wrong with it, before anything starts.
        StepError: when a step cannot be finished.
        KeyboardInterrupt: result.json then says how far it came.
    """
    use_extensions(run.composition)
    steps = steps_of(run)
    if without_folder(steps):
        for step in steps:
            step.execute(run, RunDir(folder, folder / "model"))
        return Result({"status": "done"})
    refuse_finished(folder)  # before anything is written into it, if only to its log
    with exclusively(), run_log.written(folder / run_log.NAME), offline.where_local(run):
        try:
            _execute(run, folder, save_composition)
        except MergelabError as e:
            for message in getattr(e, "messages", [str(e)]):
                log.error("%s", one_line(message))
            raise
        except KeyboardInterrupt:
            log.error("interrupted")
            raise
        except Exception:
            log.exception("unexpected")
            raise
    return Result.load(folder)


def _execute(run: Run, folder: Path, save_composition: bool) -> None:
    from mergelab.jobs.run_job import run_job
    from mergelab.merging import node_local_cache

    run_dir = RunDir(folder, model_folder(run, folder), node_local_cache.folder())
    choices = run.composition.choices if run.composition else {}
    shown = choices | ({"model": file, "experts": ""} if (file := file_of(run)) else {})
    parts = [shown[g] for g in ("job", "model", "experts", "method", "eval") if shown.get(g)]
    terminal.heading("mergelab  " + " · ".join(parts), short_path(folder))
    command = composition.command(run)
    log.info("command: %s", command)
    log.info("mergelab %s, Python %s on %s", __version__, platform.python_version(), platform.node())
    log.info("executable: %s", sys.executable)
    with run_dir.lock():
        about = {"choices": choices, "overrides": run.overrides, "command": command, "seed": run.seed}
        run_dir.begin(about | ({"file": file} if file else {}))
        if save_composition:
            composition.save(run, folder)
        run_job(run, run_dir)
