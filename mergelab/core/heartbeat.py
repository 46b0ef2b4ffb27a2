"""The heartbeat of a run: `heartbeat.json` in its folder, rewritten every two seconds.

It says where the run is and how far, for whoever looks on (`job=monitor`); nothing depends on it. A run
that ends removes the file; one that is killed leaves it, and its time then stands still.
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
"""Seconds between two beats."""

_state: dict[str, Any] = {}
_lock = threading.Lock()


def report_progress(what: str, done: int, total: int, *, unit: str = "") -> None:
    """Say what is being done, and how far it is.

    Args:
        what: in a word or two.
        done, total: of bytes (`unit="bytes"`) or of things; a total of 0 is unknown.
    """
    with _lock:
        if _state.get("what") != what:
            _state["since"] = round(time.time(), 3)
        _state.update(what=what, done=done, total=total, unit=unit)


def step(name: str) -> None:
    """Say which step has begun."""
    with _lock:
        _state.update(step=name, what=None, done=0, total=0, unit="", since=round(time.time(), 3))


@contextmanager
def running(folder: Path, gpu: bool = False) -> Iterator[None]:
    """Write `folder/heartbeat.json` until the body ends. Nested in another one it does nothing: a
    process has one heartbeat file.

    Args:
        gpu: whether to tell the use of GPUs, too.
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
    """One beat. Whatever goes wrong with it must not end the run that it tells of."""
    with suppress(Exception):
        import psutil

        with _lock:
            told = dict(_state)
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        told |= {"time": round(time.time(), 3), "host": host, "pid": os.getpid(), "job": job()}
        told["rss"] = psutil.Process().memory_info().rss
        if gpu:
            told["gpus"] = _gpus()
        aside = folder / f".{NAME}.{os.getpid()}"
        aside.write_text(json.dumps(told), encoding="utf-8")
        aside.replace(folder / NAME)


def job() -> str | None:
    """The Slurm task that this is: `57`, `57_3`."""
    e = os.environ
    array, index = e.get("SLURM_ARRAY_JOB_ID"), e.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else e.get("SLURM_JOB_ID")


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
