"""What W&B's client has written, read by W&B's own reader."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any


def read_back(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run's folder as W&B's own reader sees it: the state, and every record."""
    from wandb.util import get_core_path

    (file,) = run.glob("*.wandb")

    def inspect(*options: str) -> str:  # as `wandb leet inspect` does, without a second of Python
        where = ["--run-file", str(file), str(run.parent)]
        command = [get_core_path(), "leet", "inspect", "--no-observability", *options, "--json", *where]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return json.loads(inspect("--summary")), [json.loads(x) for x in inspect().splitlines()]
