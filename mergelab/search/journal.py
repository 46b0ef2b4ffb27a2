"""The durable record of a sweep: one JSON object a line, on the disk before anything goes on.

There are no times in it: two sweeps that come to the same have the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mergelab.errors import InputError
from mergelab.workspace import read_memo, write_json

NAME = "journal.jsonl"
SCHEMA = 1


class Journal:
    """The journal of a sweep's folder. One process writes it; anyone may read.

    Args:
        folder: the sweep's.
    Raises:
        InputError: where the file is not a journal, or is damaged before its last line.
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self.lines = read(self.path)
        self._repair()

    @property
    def begin(self) -> dict[str, Any] | None:
        """The first line, which says what the sweep is."""
        return self.lines[0] if self.lines else None

    def of(self, event: str) -> list[dict[str, Any]]:
        """All lines of one kind."""
        return [line for line in self.lines if line["event"] == event]

    def write(self, event: str, **data: Any) -> dict[str, Any]:
        """Append a line, and see it onto the disk."""
        line = {"event": event, **data}
        new = not self.path.exists()
        with self.path.open("ab") as f:
            f.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())
        if new:
            _sync_folder(self.path.parent)
        self.lines.append(line)
        return line

    def _repair(self) -> None:
        """Cut off a last line that a kill has torn."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = sum(len(line) for line in _whole(content))
        if b"\n" in content[whole:-1]:
            number = content[:whole].count(b"\n") + 1
            raise InputError(
                f"{self.path}: line {number} is damaged, and others follow it\nMend or remove it."
            )
        if whole < len(content):
            with self.path.open("r+b") as f:
                f.truncate(whole)
                os.fsync(f.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal that may still be written; a torn last one is left out.

    Raises:
        InputError: where it is none.
    """
    if not path.exists():
        return []
    lines = [json.loads(line) for line in _whole(path.read_bytes())]
    if lines and (lines[0].get("event") != "begin" or lines[0].get("schema") != SCHEMA):
        raise InputError(
            f"{path} is not a journal of this version\nChoose another folder: hydra.sweep.dir=DIR"
        )
    return lines


def _whole(content: bytes) -> list[bytes]:
    """The lines that are whole; what follows the first that is not was written after it, and is not."""
    out = []
    for line in content.splitlines(keepends=True):
        try:
            known = line.endswith(b"\n") and isinstance(json.loads(line), dict)
        except ValueError:
            known = False
        if not known:
            break
        out.append(line)
    return out


class Early:
    """Results that came before their turn: a small file each until their line can be written. So the
    journal has the order of the numbers, and yet nothing that is finished can be lost."""

    def __init__(self, folder: Path):
        self._folder = folder / "early"

    def keep(self, name: str, result: Mapping[str, Any]) -> None:
        """Put a result on the disk."""
        write_json(self._folder / f"{name}.json", result)

    def found(self, name: str) -> dict[str, Any] | None:
        """A result that was kept, or None."""
        return read_memo(self._folder / f"{name}.json") or None

    def clear(self, names: Iterable[str]) -> None:
        """Forget these, when their lines are written."""
        for name in names:
            (self._folder / f"{name}.json").unlink(missing_ok=True)
        with suppress(OSError):  # it is not there, or others are in it
            self._folder.rmdir()


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, a line a key."""
    flat_before, flat_now = _flat(before), _flat(now)
    return [
        f"{key}: {flat_before.get(key, 'absent')} then, {flat_now.get(key, 'absent')} now"
        for key in {**flat_before, **flat_now}
        if flat_before.get(key, "absent") != flat_now.get(key, "absent")
    ]


def _flat(value: Any, key: str = "") -> dict[str, str]:
    if isinstance(value, Mapping):
        out: dict[str, str] = {}
        for k, v in value.items():
            out |= _flat(v, f"{key}.{k}" if key else str(k))
        return out
    return {key: json.dumps(value, ensure_ascii=False)}
