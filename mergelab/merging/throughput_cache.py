"""How fast merges have run on this machine: what an estimate of time is made of.

Disks differ by a factor of a hundred and methods by ten; nothing but a merge that was run says how
long the next one takes.
"""

from __future__ import annotations

from pathlib import Path

from mergelab.core.machine import available_processors
from mergelab.core.run_dir import read_memo, write_json
from mergelab.schema import Hardware

FILE = "rates.json"

ENOUGH = 100_000_000
"""Bytes that a merge has to read and write before its rate means anything: smaller ones are over
before a disk has warmed up."""


def note(home: Path, method: str, hardware: Hardware, nbytes: int, seconds: float) -> None:
    """Remember the rate of a merge that read and wrote `nbytes`."""
    if nbytes >= ENOUGH:
        write_json(home / FILE, read_memo(home / FILE) | {_kind(method, hardware): nbytes / seconds})


def known(home: Path, method: str, hardware: Hardware) -> float | None:
    """Bytes a second of the last merge by this method on as many processors or devices, or None."""
    rate = read_memo(home / FILE).get(_kind(method, hardware))
    return float(rate) if isinstance(rate, (int, float)) else None


def _kind(method: str, hardware: Hardware) -> str:
    if hardware.device.startswith("cuda"):
        return f"{method}, cuda x {hardware.devices or 'all'}"
    return f"{method}, {hardware.threads or available_processors()} processors"
