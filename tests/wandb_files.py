"""What W&B's client has written, read by W&B's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def read_back(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run's folder as W&B's own reader sees it: the state, and every record."""

    def inspect(*options: str) -> str:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(run)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return json.loads(inspect("--summary")), [json.loads(x) for x in inspect().splitlines()]
