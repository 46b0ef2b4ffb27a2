"""Files of lines that survive a kill: one JSON object a line, on the disk before anything goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mergelab.core.errors import InputError


class JsonlLog:
    """The lines of a file. One process writes it; anyone may read.

    Args:
        path: of the file, which need not be there yet.
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
        """Append a line, and see it onto the disk."""
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
    """The lines of a file that may still be written; a torn last one is left out."""
    try:
        return [json.loads(line) for line in _whole(path.read_bytes())]
    except FileNotFoundError:
        return []


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


def sync_folder(folder: Path) -> None:
    """See that a folder's names are on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
