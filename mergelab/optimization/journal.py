"""The durable record of a search: one JSON object a line, on the disk before the search continues.

It holds no times, so that two searches with the same results have the same bytes.
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
    """The journal in a search's folder. One process writes it, any may read it.

    Args:
        folder: of the search.
    Raises:
        InputError: where the file is not a journal, or is damaged before its last line.
    """

    def __init__(self, folder: Path):
        read(folder / NAME)
        super().__init__(folder / NAME)

    @property
    def begin(self) -> dict[str, Any] | None:
        """The first line, which says which search it is."""
        return self.lines[0] if self.lines else None


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal, which may be being written; an incomplete last line is left out.

    Raises:
        InputError: where the file is not a journal.
    """
    found = jsonl_log.read(path)
    if found and (found[0].get("event") != "begin" or found[0].get("schema") != SCHEMA):
        raise InputError(
            f"{path} is not a journal of this version\nChoose another folder: hydra.sweep.dir=DIR"
        )
    return found


class OutOfOrderResults:
    """Results that are ready before their turn: a small file each until their line can be written. The
    journal keeps the order of the numbers, and nothing that is finished is lost.

    Args:
        folder: of the search.
    """

    def __init__(self, folder: Path):
        self._folder = folder / "early"

    def keep(self, name: str, result: Mapping[str, Any]) -> None:
        """Write a result to the disk."""
        write_json(self._folder / f"{name}.json", result)

    def found(self, name: str) -> dict[str, Any] | None:
        """A result that was kept, or None."""
        return read_memo(self._folder / f"{name}.json") or None

    def clear(self, names: Iterable[str]) -> None:
        """Delete these, after their lines are written."""
        for name in names:
            (self._folder / f"{name}.json").unlink(missing_ok=True)
        with suppress(OSError):  # it does not exist, or is not empty
            self._folder.rmdir()

    def end(self) -> None:
        """Delete all, after every line is written; a kill may have left some that `clear` did not get."""
        rmtree(self._folder, ignore_errors=True)
