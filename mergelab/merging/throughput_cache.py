"""The throughput of earlier merges on this machine, from which the time of the next one is estimated.

Disks differ by a factor of a hundred and methods by a factor of ten, so only a measured merge tells how
long the next one takes.
"""

from __future__ import annotations

from pathlib import Path

from mergelab.core.machine import available_processors
from mergelab.core.run_dir import read_memo, write_json
from mergelab.schema import Hardware

FILE = "rates.json"

MIN_BYTES = 100_000_000
"""The smallest merge whose rate is recorded: smaller ones say nothing about sustained throughput."""


def note(home: Path, method: str, hardware: Hardware, nbytes: int, seconds: float) -> None:
    """Record the rate of a merge that read and wrote `nbytes` in total."""
    if nbytes >= MIN_BYTES:
        write_json(home / FILE, read_memo(home / FILE) | {_kind(method, hardware): nbytes / seconds})


def known(home: Path, method: str, hardware: Hardware) -> float | None:
    """Bytes per second of the last merge with this method on as many processors or devices, or None."""
    rate = read_memo(home / FILE).get(_kind(method, hardware))
    return float(rate) if isinstance(rate, (int, float)) else None


def _kind(method: str, hardware: Hardware) -> str:
    if hardware.device.startswith("cuda"):
        return f"{method}, cuda x {hardware.devices or 'all'}"
    return f"{method}, {hardware.threads or available_processors()} processors"
