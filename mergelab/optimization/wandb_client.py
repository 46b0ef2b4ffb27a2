"""A sweep in Weights & Biases, seen from the controller: a process of its own follows the journal.

What W&B takes for a run (20 ms offline, seconds online) is therefore no candidate's time, and nothing
that it does can end or hold up a sweep. See `recorder` for what is recorded.
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
"""In the sweep's folder: how far the recorder is."""

STARTING = 60.0
"""Seconds without any progress that the end of a sweep waits for, on top of what W&B is given."""


class SweepTracker:
    """Follows a sweep's journal from now on; of `tracking=none` nothing at all.

    Args:
        run: the composed run.
        folder: the sweep's, with its journal.
        budget: candidates in all; where as many are recorded, there is nothing left to do.
    """

    def __init__(self, run: Run, folder: Path, budget: int):
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._patience = STARTING + 8 * run.tracking.timeout
        state = read_memo(folder / STATE)
        if run.tracking.name == "none" or (state.get("complete") and state.get("candidates", 0) >= budget):
            return
        told = {
            "folder": str(folder),
            "tracking": asdict(run.tracking),
            "config": settings_of(run),
        }
        with (folder / "mergelab.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mergelab.optimization.wandb_process"],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log,
                start_new_session=True,  # Ctrl-C is the controller's to hear
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )  # fmt: skip
        self._say(told)

    def finish(self, status: int) -> None:
        """Wait until all of the sweep is recorded, as long as there is progress; say where it is.

        Args:
            status: with which the sweep ends.
        """
        if self._process is None:
            return
        self._say({"end": status})
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
        self._tell(read_memo(self._folder / STATE))

    def leave(self) -> None:
        """Do not wait: it ends by itself, and what is not recorded is when the sweep goes on."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def _say(self, message: Mapping[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with suppress(OSError):  # it has died: `finish` says so
            self._process.stdin.write(json.dumps(message, default=str).encode() + b"\n")
            self._process.stdin.flush()

    def _tell(self, state: Mapping[str, Any]) -> None:
        assert self._process is not None
        where = short_path(self._folder)
        if not state.get("complete") or self._process.returncode:
            terminal.finding(
                "warning",
                f"W&B has not got all of this sweep; {where}/mergelab.log says why. "
                "The same command again records what is missing.",
            )
        elif state.get("mode") == "online":
            terminal.say(f"W&B: {state.get('url')}", "dim")
        elif state.get("mode") == "disabled":
            terminal.say("W&B is disabled (WANDB_MODE)", "dim")
        else:
            terminal.say(f"W&B: offline; wandb sync {where}/wandb/offline-run-*  uploads it", "dim")
