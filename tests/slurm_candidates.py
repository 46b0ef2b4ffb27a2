"""Candidates that cost nothing, and do what a test has asked for: die, hang, fail.

A test leaves `FOLDER/faults/NAME` (such as candidate3) with a line for each time that the candidate is
measured: `kill`, `kill 5`, `sleep 5`, `deaf 5`, `memory`, `raise`, `ok`; the last one stays. Each time leaves
a line in `FOLDER/calls/NAME`: job, rank, node, and what it writes on the node's own disk, where there is one.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.merging import node_local_cache


@dataclass(frozen=True)
class Asked:
    """What the measuring needs of an order. It is what travels to the task: an `Order` imports more than all
    the rest does."""

    name: str
    weights: list[float]


def smooth(asked: Asked) -> dict[str, Any]:
    """As `searching.smooth`: best where weights are 1."""
    value = 1 - sum((w - 1) ** 2 for w in asked.weights) / 10
    about = {"stderr": 0.01, "samples": 100, "metric": "exact_match", "higher_is_better": True, "others": {}}
    return {name: {"value": v, "task": f"tiny_{name}_search", **about}
            for name, v in (("math", value), ("code", value / 2))}  # fmt: skip


def measure(folder: str, asked: Asked, timeout: float | None) -> dict[str, Any]:
    """What came of an order, as an `Outcome` would be written."""
    calls = Path(folder) / "calls" / asked.name
    calls.parent.mkdir(parents=True, exist_ok=True)
    e = os.environ
    array = e.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{e['SLURM_ARRAY_TASK_ID']}" if array else e.get("SLURM_JOB_ID")
    with calls.open("a") as f:
        f.write(f"{job} {e.get('SLURM_PROCID', 0)} {e.get('SLURMD_NODENAME')} {written()}\n")
    time.sleep(float(os.environ.get("PACE", 0)))
    faults = Path(folder) / "faults" / asked.name
    if faults.exists():
        lines = faults.read_text().splitlines()
        happen(lines[min(len(calls.read_text().splitlines()), len(lines)) - 1])
    return {"scores": smooth(asked), "reason": None}


def written() -> Path | None:
    """Something on the node's own disk, as a merge would be there."""
    if (own := node_local_cache.folder()) is None:
        return None
    path = own / "model"
    path.mkdir(exist_ok=True)
    (path / "weights").write_bytes(bytes(1000))
    return path


def happen(fault: str) -> None:
    """The fault of that name."""
    word, _, seconds = fault.partition(" ")
    if word == "kill":
        time.sleep(float(seconds or 0))
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "sleep":
        time.sleep(float(seconds))
    elif word == "deaf":
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(float(seconds))
    elif word == "memory":
        held = bytearray(os.urandom(1)) * (400 << 20)
        time.sleep(20)
        del held
    elif word == "raise":
        raise RuntimeError("asked to fail")
