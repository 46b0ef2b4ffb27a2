"""A command timed as a whole process: wall, CPU, and the memory it held."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.02
"""Seconds between two looks at a process's memory."""


@dataclass(frozen=True)
class Measured:
    """What a process took."""

    wall: float
    """Seconds."""
    cpu: float
    """Seconds, of it and of what it waited for."""
    anonymous: int
    """Bytes at the peak that belong to no file; all of the memory where there is no /proc."""
    mapped: int
    """Bytes at the peak of files mapped into memory, which the system may take back; 0 without /proc."""


def measure(command: list[str], environment: dict[str, str] | None = None) -> Measured:
    """Run a command to its end.

    Raises:
        SystemExit: when it fails, with the end of what it said.
    """
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, env=os.environ | (environment or {}), stdout=said, stderr=subprocess.STDOUT
        )
        memory = _Memory(process.pid)
        try:
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - start
        except BaseException:  # Ctrl-C
            process.kill()
            process.wait()
            raise
        finally:
            memory.stop()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            said.seek(0)
            tail = said.read().decode(errors="replace")[-3000:]
            raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}:\n{tail}")
    anonymous = memory.anonymous
    if not Path("/proc/self/status").exists():
        anonymous = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Measured(wall, usage.ru_utime + usage.ru_stime, anonymous, memory.mapped)


class _Memory:
    """Watches /proc in a thread; without /proc it sees nothing."""

    def __init__(self, pid: int):
        self.anonymous = self.mapped = 0
        self._pid, self._ended = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL):
            sizes = [_status(pid) for pid in _family(self._pid)]
            self.anonymous = max(self.anonymous, sum(s.get("RssAnon", 0) for s in sizes))
            files = sum(s.get("RssFile", 0) + s.get("RssShmem", 0) for s in sizes)
            self.mapped = max(self.mapped, files)


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    out = [pid]
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                out += _family(int(child))
    except OSError:
        pass  # it has ended in the meantime
    return out


def _status(pid: int) -> dict[str, int]:
    """Bytes by the name that /proc/PID/status gives them."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    rows = (line.split() for line in lines if line.startswith("Rss"))
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}
