"""The application that Hydra runs: the schema and our plugins, and the task that is one run.

Importing this module registers them, also in the processes of a cluster.
"""

import os
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mergelab import composition, config_errors
from mergelab.cli.reporting import report
from mergelab.composition import typed
from mergelab.core.conf_dir import CONF
from mergelab.core.errors import CommandFinished, InputError, MergelabError, typed_line
from mergelab.optimization.sweeper import SearchSweeper
from mergelab.scheduling import on_node
from mergelab.scheduling.launcher import ENV_IN_TASK, ArrayLauncher

for plugin in (SearchSweeper, ArrayLauncher):
    Plugins.instance().register(plugin)
composition.register()


def task(cfg: DictConfig) -> float | None:
    """One run. Returns its fitness, higher is better, so that any sweeper can use it.

    Raises:
        CommandFinished: where it was the only run and failed.
        MergelabError: where it was one of several and failed; it has been reported.
    """
    single = HydraConfig.get().mode == RunMode.RUN
    try:
        return _run(cfg)
    except Exception as e:
        error = _as_message(e)
        status = report(error)
        if single:  # Hydra would print its own line on any other exception
            raise CommandFinished(status) from None
        raise error from None


def _run(cfg: DictConfig) -> float | None:
    from mergelab import execution
    from mergelab.report import terminal

    h = HydraConfig.get()
    run = typed(cfg, OmegaConf.create({"hydra": h}))
    if ENV_IN_TASK in os.environ:  # on the node of a cluster
        run = on_node(run)
    terminal.brief = h.mode == RunMode.MULTIRUN and os.environ.get(ENV_IN_TASK) != "alone"
    return execution.execute(run, Path(h.runtime.output_dir)).fitness


def _as_message(error: Exception) -> MergelabError:
    if isinstance(error, MergelabError):
        return error
    if isinstance(error, OSError) and error.strerror:  # within a step it would be an error of that step
        return InputError(config_errors.unwritable(error))
    log = Path(HydraConfig.get().runtime.output_dir) / "mergelab.log"
    return MergelabError(f"unexpected: {typed_line(error)}\nThis is a bug; {log} has the traceback.")


run_hydra = hydra.main(config_path=str(CONF), config_name="config")(task)
"""Compose what was typed, and run it."""
