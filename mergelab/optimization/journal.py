"""The durable record of a sweep: one JSON object a line, on the disk before anything goes on.

There are no times in it: two sweeps that come to the same have the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from shutil import rmtree
from typing import Any

from mergelab.core import jsonl_log
from mergelab.core.errors import InputError
from mergelab.core.jsonl_log import JsonlLog
from mergelab.core.run_dir import read_memo, write_json

NAME = "journal.jsonl"
SCHEMA = 1


class Journal(JsonlLog):
    """The journal of a sweep's folder. One process writes it; anyone may read.

    Args:
        folder: the sweep's.
    Raises:
        InputError: where the file is not a journal, or is damaged before its last line.
    """

    def __init__(self, folder: Path):
        read(folder / NAME)
        super().__init__(folder / NAME)

    @property
    def begin(self) -> dict[str, Any] | None:
        """The first line, which says what the sweep is."""
        return self.lines[0] if self.lines else None


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal that may still be written; a torn last one is left out.

    Raises:
        InputError: where it is none.
    """
    found = jsonl_log.read(path)
    if found and (found[0].get("event") != "begin" or found[0].get("schema") != SCHEMA):
        raise InputError(
            f"{path} is not a journal of this version\nChoose another folder: hydra.sweep.dir=DIR"
        )
    return found


class OutOfOrderResults:
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

    def end(self) -> None:
        """Forget all, when every line is written; a kill may have left what `clear` is not told of."""
        rmtree(self._folder, ignore_errors=True)
