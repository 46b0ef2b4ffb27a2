"""Append-only JSONL files that survive a kill: each line is on the disk before the program continues."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mergelab.core.errors import InputError


class JsonlLog:
    """The lines of a file. One process writes it, any number may read it.

    Args:
        path: of the file, which may not exist yet.
    Raises:
        InputError: where it is damaged before its last line.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lines = read(path)
        self._repair()

    def select(self, event: str) -> list[dict[str, Any]]:
        """All lines of one kind."""
        return [line for line in self.lines if line["event"] == event]

    def append(self, event: str, **data: Any) -> dict[str, Any]:
        """Append a line, and return it once it is on the disk."""
        line = {"event": event, **data}
        new = not self.path.exists()
        with self.path.open("ab") as f:
            f.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())
        if new:
            sync_folder(self.path.parent)
        self.lines.append(line)
        return line

    def _repair(self) -> None:
        """Remove a last line that a kill has cut short."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = sum(len(line) for line in _whole(content))
        if b"\n" in content[whole:-1]:
            number = content[:whole].count(b"\n") + 1
            raise InputError(
                f"{self.path}: line {number} is damaged, and complete lines follow it\n"
                "Restore the file from a copy, or start anew in another folder."
            )
        if whole < len(content):
            with self.path.open("r+b") as f:
                f.truncate(whole)
                os.fsync(f.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that another process may be writing, without an incomplete last one."""
    try:
        return [json.loads(line) for line in _whole(path.read_bytes())]
    except FileNotFoundError:
        return []


def _whole(content: bytes) -> list[bytes]:
    """The complete lines, up to the first that is not one."""
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


def sync_folder(folder: Path) -> None:
    """Ensure that the names in a folder are on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
