"""The heartbeat of a run: `heartbeat.json` in its folder, rewritten every two seconds.

It records where the run works and its progress, for `job=monitor`; nothing depends on it. A run that ends
removes the file. One that is killed leaves it, and the time in it no longer changes.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAME = "heartbeat.json"
INTERVAL = 2.0
"""Seconds between two heartbeats."""

_state: dict[str, Any] = {}
_lock = threading.Lock()


def report_progress(what: str, done: int, total: int, *, unit: str = "") -> None:
    """Set what is in progress, and how much of it is done.

    Args:
        what: in a word or two.
        done: bytes (`unit="bytes"`) or things that are done.
        total: of the same; 0: unknown.
        unit: `bytes`, or empty.
    """
    with _lock:
        if _state.get("what") != what:
            _state["since"] = round(time.time(), 3)
        _state.update(what=what, done=done, total=total, unit=unit)


def step(name: str) -> None:
    """Set the step that has begun."""
    with _lock:
        _state.update(step=name, what=None, done=0, total=0, unit="", since=round(time.time(), 3))


@contextmanager
def running(folder: Path, gpu: bool = False) -> Iterator[None]:
    """Write `folder/heartbeat.json` until the body ends. Nested in another one it does nothing, because a
    process has one heartbeat file.

    Args:
        folder: the run's.
        gpu: whether the use of GPUs is recorded as well.
    """
    with _lock:
        nested = bool(_state.get("started"))
        if not nested:
            _state.update(started=round(time.time(), 3))
    if nested:
        yield
        return
    stop = threading.Event()

    def beat() -> None:
        while True:
            _write(folder, gpu)
            if stop.wait(INTERVAL):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10)
        with suppress(OSError):
            (folder / NAME).unlink()
        with _lock:
            _state.clear()


def _write(folder: Path, gpu: bool) -> None:
    """Write the file once. No error here may end the run."""
    with suppress(Exception):
        import psutil

        with _lock:
            content = dict(_state)
        content |= {"time": round(time.time(), 3), "host": node(), "pid": os.getpid(), "job": job()}
        content["rss"] = psutil.Process().memory_info().rss
        if gpu:
            content["gpus"] = _gpus()
        temporary = folder / f".{NAME}.{os.getpid()}"
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(folder / NAME)


def job() -> str | None:
    """The id of the cluster task in which this process runs: `57`, `57_3`. None outside of one."""
    e = os.environ
    array, index = e.get("SLURM_ARRAY_JOB_ID"), e.get("SLURM_ARRAY_TASK_ID")
    slurm = f"{array}_{index}" if array and index else e.get("SLURM_JOB_ID")
    return e.get("MERGELAB_TASK_ID") or slurm


def node() -> str:
    """The name of the machine, as the cluster knows it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _gpus() -> list[dict[str, Any]]:
    """Memory and use of each GPU that this process may see, by nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return []
    out = subprocess.run(
        ["nvidia-smi", "--query-gpu=index,memory.used,memory.total,utilization.gpu",
         "--format=csv,noheader,nounits"],
        capture_output=True, text=True, check=False, timeout=5,
    ).stdout  # fmt: skip
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = []
    for line in out.splitlines():
        index, used, total, busy = (x.strip() for x in line.split(","))
        if seen is None or index in seen.split(","):
            use = float(busy) / 100 if busy.replace(".", "").isdigit() else None
            memory = {"used": int(used) << 20, "total": int(total) << 20}
            found.append({"index": int(index), **memory, "busy": use})
    return found
