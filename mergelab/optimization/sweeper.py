"""The Hydra sweeper of `search=...`: from what Hydra composed to a sweep's folder.

Besides `space_grammar` the only module of the search that knows Hydra. Nothing heavy is imported until the
search starts, because Hydra loads this class at every command.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from mergelab import composition
from mergelab.core.errors import InputError, os_errors_reported
from mergelab.scheduling.launcher import folder_named
from mergelab.schema import Run, with_overrides


class SearchSweeper(Sweeper):
    """Searches the parameters of a merge; see `mergelab.optimization.run_search`."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands over."""
        self.hydra_context, self.config, self.launcher = hydra_context, config, None

    def sweep(self, arguments: list[str]) -> Any:
        """Begin or resume the search that these arguments describe; returns the winner's fitness."""
        with os_errors_reported("the search"):
            return self._sweep(arguments)

    def _sweep(self, arguments: list[str]) -> float | None:
        from mergelab.optimization import run_search
        from mergelab.optimization.request import Request

        assert self.config is not None and self.hydra_context is not None
        launcher = self.config.hydra.runtime.choices.get("hydra/launcher")
        if launcher not in (None, "basic", *composition.LAUNCHERS):
            raise InputError(
                f"hydra/launcher={launcher}: a search starts its workers itself\n"
                "Several at once on this machine: hardware.workers=4"
            )
        loader = self.hydra_context.config_loader
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
        typed = {o.get_key_element(): o.input_line or "" for o in parsed if o.is_sweep_override()}
        fixed = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
        run = self._run(fixed)
        study = run_search.run(
            Request(
                compose=lambda groups: (
                    self._run([*fixed, *(f"{k}={v}" for k, v in groups.items())]) if groups else run
                ),
                typed_space={k: line.partition("=")[2] for k, line in typed.items()},
                command=composition.command(with_overrides(run, arguments), "-m"),
                folder=Path(self.config.hydra.sweep.dir),
                arguments=sys.argv[1:],
                folder_named=folder_named(self.config),
            )
        )
        return None if study is None or study.result is None else study.result.fitness

    def _run(self, overrides: list[str]) -> Run:
        assert self.config is not None and self.hydra_context is not None
        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        return composition.typed(cfg, cfg)
