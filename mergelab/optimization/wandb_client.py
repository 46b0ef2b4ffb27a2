"""The parent of the process that records a search in Weights & Biases.

W&B takes 20 ms for a run offline and seconds online. In a process of its own that is not a candidate's time,
and nothing that W&B does can end or delay a search. See `wandb_process` for what is recorded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mergelab.core.run_dir import read_memo, short_path
from mergelab.report import terminal
from mergelab.schema import Run, settings_of

STATE = "recorded.json"
"""In the search's folder: how far recording is."""

STARTING = 60.0
"""Seconds without progress after which the end of a search stops waiting, on top of W&B's own timeouts."""


class SweepTracker:
    """Records a search from now on; nothing with `tracking=none`.

    Args:
        run: the composed run.
        folder: of the search, with its journal.
        budget: candidates in all; where all are recorded, no process is started.
    """

    def __init__(self, run: Run, folder: Path, budget: int):
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._patience = STARTING + 8 * run.tracking.timeout
        state = read_memo(folder / STATE)
        if run.tracking.name == "none" or (state.get("complete") and state.get("candidates", 0) >= budget):
            return
        settings = {
            "folder": str(folder),
            "tracking": asdict(run.tracking),
            "config": settings_of(run),
        }
        with (folder / "mergelab.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mergelab.optimization.wandb_process"],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log,
                start_new_session=True,  # Ctrl-C is for the controller only
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )  # fmt: skip
        self._send(settings)

    def finish(self, status: int) -> None:
        """Wait, as long as there is progress, until everything is recorded; show where it is.

        Args:
            status: with which the search ends.
        """
        if self._process is None:
            return
        self._send({"end": status})
        with suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        waited, before = time.monotonic(), read_memo(self._folder / STATE)
        while self._process.poll() is None and time.monotonic() - waited < self._patience:
            time.sleep(0.1)
            if (now := read_memo(self._folder / STATE)) != before:
                waited, before = time.monotonic(), now
        if self._process.poll() is None:
            self._process.kill()
        self._show(read_memo(self._folder / STATE))

    def leave(self) -> None:
        """Do not wait: the process ends by itself, and a resumed search records what is missing."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with suppress(OSError):  # it has died, which `finish` reports
            self._process.stdin.write(json.dumps(message, default=str).encode() + b"\n")
            self._process.stdin.flush()

    def _show(self, state: Mapping[str, Any]) -> None:
        assert self._process is not None
        where = short_path(self._folder)
        if not state.get("complete") or self._process.returncode:
            terminal.finding(
                "warning",
                f"W&B does not have all of this search; {where}/mergelab.log says why. "
                "The same command again records what is missing.",
            )
        elif state.get("mode") == "online":
            terminal.say(f"W&B: {state.get('url')}", "dim")
        elif state.get("mode") == "disabled":
            terminal.say("W&B is disabled (WANDB_MODE)", "dim")
        else:
            terminal.say(f"W&B: offline; wandb sync {where}/wandb/offline-run-*  uploads it", "dim")
