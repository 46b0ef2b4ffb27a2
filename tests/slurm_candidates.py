"""Candidates that cost nothing, and do what a test has asked for: die, hang, fail.

A test leaves `FOLDER/faults/NAME` (such as candidate3) with a line for each time that the candidate is
measured: `kill`, `sleep 5`, `deaf 5`, `memory`, `raise`, `ok`; the last one stays. Each time leaves a line
in `FOLDER/calls/NAME`.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mergelab.evaluation import Score
from mergelab.optimization.bench import Outcome
from mergelab.optimization.workers import Order


def smooth(order: Order) -> dict[str, Any]:
    """Scores that are best where weights are 1."""
    weights = [e.weight for e in order.run.experts.values()]
    value = 1 - sum((w - 1) ** 2 for w in weights if isinstance(w, float)) / 10
    return {
        name: asdict(Score(v, 0.01, 100, "exact_match", True, f"tiny_{name}_search"))
        for name, v in (("math", value), ("code", value / 2))
    }


def measure(folder: str, order: Order, timeout: float | None) -> dict[str, Any]:
    """What came of an order."""
    calls = Path(folder) / "calls" / order.name
    calls.parent.mkdir(parents=True, exist_ok=True)
    e = os.environ
    array = e.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{e['SLURM_ARRAY_TASK_ID']}" if array else e.get("SLURM_JOB_ID")
    with calls.open("a") as f:
        f.write(f"{job} {e.get('SLURM_PROCID', 0)} {e.get('SLURMD_NODENAME')}\n")
    time.sleep(float(os.environ.get("PACE", 0)))
    faults = Path(folder) / "faults" / order.name
    if faults.exists():
        lines = faults.read_text().splitlines()
        happen(lines[min(len(calls.read_text().splitlines()), len(lines)) - 1])
    return asdict(Outcome(scores=smooth(order)))


def happen(fault: str) -> None:
    """The fault of that name."""
    word, _, seconds = fault.partition(" ")
    if word == "kill":
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
