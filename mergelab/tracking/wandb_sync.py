"""What nodes without internet have recorded for W&B: brought together in the sweep's folder, and uploaded
from a machine that has internet, by one command."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from mergelab.core.run_dir import short_path
from mergelab.report import terminal
from mergelab.schema import Tracking

PATTERN = "offline-run-*"
SYNCED = ".synced"
"""What W&B leaves beside a run's file that it has uploaded."""


def gather(sweep: Path) -> None:
    """Move the offline records of each run of a sweep into `wandb/` of the sweep's own folder."""
    target = sweep / "wandb"
    for folder in sorted(sweep.glob(f"*/wandb/{PATTERN}")):
        target.mkdir(exist_ok=True)
        if not (target / folder.name).exists():
            folder.rename(target / folder.name)


def left(sweep: Path) -> list[Path]:
    """Offline records that have not been uploaded."""
    return [f for f in sorted(sweep.glob(f"wandb/{PATTERN}")) if not list(f.glob(f"*{SYNCED}"))]


def finish(sweep: Path, settings: Tracking) -> None:
    """Upload what is left if `tracking.sync` asks for it; else print the command that does."""
    if not (records := left(sweep)):
        return
    command = f"wandb sync {shlex.quote(short_path(sweep))}/wandb/{PATTERN}"
    if not settings.sync:
        terminal.say(f"W&B: {len(records)} runs are offline. To upload them:", "dim")
        terminal.command(command)
        return
    with terminal.waiting() as show:
        show(f"W&B: uploading {len(records)} runs")
        failed = upload(records)
    if failed:
        terminal.finding("warning", f"W&B has not taken all of them: {failed}\nTry again later:  {command}")
    else:
        terminal.say(f"W&B: {len(records)} runs uploaded", "dim")


def upload(records: list[Path]) -> str:
    """Have W&B's own command upload records; returns why it could not, or an empty text."""
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *map(str, records)], capture_output=True, text=True,
        check=False, env={**os.environ, "WANDB_MODE": "online"}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode == 0 and not any(re.search(r"wandb: ERROR|\berror:", line, re.I) for line in said):
        return ""
    return said[-1] if said else f"wandb sync ended with {done.returncode}"
