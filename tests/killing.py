"""What a kill at any moment would leave of a folder, and a process that is killed at a chosen one.

A moment is before each change of a file or a name, and before a file is seen onto the disk (fsync). Of
bytes that were written and not seen onto the disk only the first half is left, as if the machine's power
had gone: a kill alone would leave all of them, which is what is left of the moment after.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = ("open", "os.rename", "os.remove", "os.rmdir")
"""What Python tells of before it is done, and alters files or their names."""


def moments(work: Callable[[], object], folder: Path, into: Path) -> list[Path]:
    """Do work in a child; returns what each moment would leave of `folder`, as folders in `into`."""

    def keep(number: int, lose: Lose) -> None:
        shutil.copytree(folder, into / f"{number}")
        lose(into / f"{number}")

    into.mkdir()
    assert not _child(work, folder, keep), "it was killed"
    return sorted(into.iterdir(), key=lambda p: int(p.name))


def killed(work: Callable[[], object], folder: Path, moment: int) -> bool:
    """Do work in a child that SIGKILL ends at its so-many-th moment; returns whether it came to that."""

    def end(number: int, lose: Lose) -> None:
        if number == moment:
            lose(folder)
            os.kill(os.getpid(), signal.SIGKILL)

    return _child(work, folder, end)


Lose = Callable[[Path], None]
"""Takes from the folder, or a copy of it, what has not been seen onto the disk."""


def _child(work: Callable[[], object], folder: Path, at: Callable[[int, Lose], None]) -> bool:
    """Whether a child that did the work was killed; a child that fails fails the test."""
    child = os.fork()
    if child == 0:
        gc.disable()  # it would write to all memory, which then had to be copied
        signal.alarm(60)
        try:
            _Moments(folder, at).begin()
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the child has printed why"
    return False


class _Moments:
    """Hears of the moments of this process, and has something done at each."""

    def __init__(self, folder: Path, at: Callable[[int, Lose], None]):
        self._folder, self._at = folder, at
        self._number, self._busy = 0, False
        self._safe: dict[int, int] = {}
        self._open: list[int] = []  # else the number of a file that is gone would be another's

    def begin(self) -> None:
        """From here on to the end of the process: Python has no way to stop hearing. What is there, is."""
        for file in (p for p in self._folder.rglob("*") if p.is_file()):
            self._note(os.open(file, os.O_RDONLY))
        os.fsync = self._see  # type: ignore[assignment]
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._busy or event not in CHANGES or not str(arguments[0]).startswith(f"{self._folder}/"):
            return
        written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if written or (event != "open" and Path(arguments[0]).exists()):
            self._pass()

    def _see(self, file: int) -> None:
        self._pass()
        self._note(os.dup(file))

    def _note(self, file: int) -> None:
        self._open.append(file)
        self._safe[os.fstat(file).st_ino] = os.fstat(file).st_size

    def _pass(self) -> None:
        self._busy = True
        self._at(self._number, self._lose)
        self._number, self._busy = self._number + 1, False

    def _lose(self, where: Path) -> None:
        for file in (p for p in self._folder.rglob("*") if p.is_file()):
            found = file.stat()
            if (more := found.st_size - self._safe.get(found.st_ino, 0)) > 0:
                os.truncate(where / file.relative_to(self._folder), found.st_size - more + more // 2)
