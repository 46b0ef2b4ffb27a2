"""The log of a run: `mergelab.log` in its folder, with the run's messages and the libraries' warnings."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "mergelab.log"
FORMAT = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"


class _Once(logging.Filter):
    """Passes records of the same line of a library's code only once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[object] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        origin = getattr(record, "origin", None)
        if origin is None:
            return True
        new = origin not in self._seen
        self._seen.add(origin)
        return new


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Append what is logged inside the block to a file, and restore the loggers on exit.

    The file gets our own lines from INFO, those of libraries by the level of their loggers, and Python's
    warnings.
    """
    root, own = logging.getLogger(), logging.getLogger("mergelab")
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(FORMAT))
    handler.setLevel(logging.INFO)
    handler.addFilter(_Once())
    level = own.level
    root.addHandler(handler)
    if own.getEffectiveLevel() > logging.INFO:
        own.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = log_warning
            yield
    finally:
        own.setLevel(level)
        root.removeHandler(handler)
        handler.close()


def log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    """Replacement for `warnings.showwarning`: each warning becomes one line of our log, once."""
    text = f"{category.__name__}: {' '.join(str(message).split())} ({filename}:{lineno})"
    log = logging.getLogger("mergelab.libraries")
    log.warning("%s", text, extra={"origin": (filename, lineno)})
