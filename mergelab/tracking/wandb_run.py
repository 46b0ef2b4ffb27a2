"""A run of Weights & Biases.

The run's own folder is the record, and W&B is a second view of it. Therefore this is the one module that
swallows exceptions: once a run has started, W&B must neither end it, nor lose its result, nor delay it.
Calls are made by a separate thread, the first exception is logged, and every wait is limited.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergelab.schema import Tracking
from mergelab.tracking.base import Tracker
from mergelab.tracking.secrets import error_line, scrub
from mergelab.tracking.wandb_mode import inherited_settings, mode_of

log = logging.getLogger(__name__)

UPLOAD_LIMIT = 10_000_000
"""Bytes. A larger file, and any folder, is recorded by its address only."""


class WandbRun(Tracker):
    """A W&B run, to which one thread passes the calls in order.

    A thread is needed because W&B asks its server before it accepts a table or an artifact, and waits
    19 s each time if the server is gone.

    Args:
        run: The run of W&B's client.
        patience: The seconds that `finish` may take.
        mode: `online` or `offline`.
    """

    def __init__(self, run: Any, patience: float, mode: str) -> None:
        self._run = run
        self.mode, self.url = mode, run.url if mode == "online" else None
        self.directory = Path(run.dir).parent
        self._patience = patience
        self._steps = self._warned = self._finished = False
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = dict(metrics)
        if step is not None:
            # A separate column, because W&B's own step must increase and late rows are dropped.
            row["step"] = step
            if not self._steps:
                self._steps = True
                self._calls.put(lambda: self._run.define_metric("*", step_metric="step"))
        self._calls.put(lambda: self._run.log(row))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        head: list[str | int] = [*columns]
        data = [scrub(list(row), by_name=False) for row in rows]

        def call() -> None:
            import wandb

            table = wandb.Table(columns=head, data=data, allow_mixed_types=True)
            self._run.log({name: table})

        self._calls.put(call)

    def image(self, name: str, path: Path) -> None:
        def call() -> None:
            import wandb

            self._run.log({name: wandb.Image(str(path))})

        self._calls.put(call)

    def file(self, path: Path, kind: str) -> None:
        def call() -> None:
            import wandb

            name = re.sub(r"[^\w.-]", "-", f"{path.stem}-{self._run.id}")
            artifact = wandb.Artifact(name, type=kind)
            if path.is_file() and path.stat().st_size <= UPLOAD_LIMIT:
                artifact.add_file(str(path), policy="immutable")  # read in place, not copied
            else:
                artifact.add_reference(path.resolve().as_uri(), checksum=False)
            self._run.log_artifact(artifact)

        self._calls.put(call)

    def summary(self, values: Mapping[str, Any]) -> None:
        clean = scrub(values, by_name=False)
        self._calls.put(lambda: self._run.summary.update(clean))

    def finish(self, status: int) -> None:
        if self._finished:
            return
        self._finished = True
        self._calls.put(lambda: self._run.finish(exit_code=status))
        self._calls.put(None)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            self._warn(TimeoutError(f"not done after {self._patience:g} s"))
        self.recorded = not self._warned

    def _work(self) -> None:
        for call in iter(self._calls.get, None):
            try:
                call()
            except Exception as e:  # swallowed on purpose, see the module's docstring
                self._warn(e)

    def _warn(self, e: Exception) -> None:
        if not self._warned:
            self._warned = True
            log.warning("W&B failed (%s); try `wandb sync %s` later", error_line(e), self.directory)


def start(settings: Tracking, about: dict[str, Any]) -> Tracker:
    """Start a W&B run: online if possible, else offline, else none. One log line says which.

    Args:
        settings: The section `tracking`.
        about: Arguments of `wandb.init`.
    """
    try:
        import wandb

        inherited = inherited_settings(settings)
        own = wandb.Settings(
            silent=True,
            console="off",
            reinit="create_new",
            init_timeout=settings.timeout,
            finish_timeout=2 * settings.timeout,
            finish_timeout_raises=True,
            # Nothing about the machine or the repository: the command line, uncommitted changes and
            # addresses of remotes can all contain secrets.
            disable_code=True,
            save_code=False,
            disable_git=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        mode, why = mode_of(settings, inherited.mode, inherited.base_url)
        if mode == "disabled":
            log.info("W&B is disabled: %s", why)
            return Tracker()
        if mode == "online":
            try:
                run = wandb.init(mode="online", settings=own, **about)
                log.info("recording to W&B: %s", run.url)
                return WandbRun(run, 4 * settings.timeout, "online")
            except Exception as e:
                why = f"the server did not take the run ({error_line(e)})"
        run = wandb.init(mode="offline", settings=own, **about)
        log.info("W&B is offline: %s; `wandb sync %s` uploads it", why, Path(run.dir).parent)
        return WandbRun(run, 4 * settings.timeout, "offline")
    except Exception as e:  # swallowed on purpose, see the module's docstring
        log.warning("nothing is recorded in W&B: %s", error_line(e))
        return Tracker()
