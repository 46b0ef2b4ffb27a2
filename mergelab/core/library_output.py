"""Keeping libraries off the terminal. Their warnings go to the run's log."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from mergelab.core.run_log import log_warning

NOISY = ("transformers", "datasets", "huggingface_hub", "fsspec", "filelock", "httpx", "bitsandbytes", "vllm",
         "peft", "accelerate")  # fmt: skip
"""Libraries that write to the terminal by their own loggers."""


class Relay(logging.Handler):
    """Passes a library's records on to our log, where each line of its code appears once.

    A truncated prompt is worth one line, but not two thousand.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Log the record as ours, with the line of code that it comes from."""
        library = record.name.partition(".")[0]
        logging.getLogger("mergelab.libraries").log(
            record.levelno,
            "%s: %s",
            library,
            " ".join(record.getMessage().split()),
            extra={"origin": (record.pathname, record.lineno)},
        )


@contextlib.contextmanager
def relayed(name: str, level: int = logging.WARNING) -> Iterator[None]:
    """Send a library's log lines of a level and above to our log only."""
    logger = logging.getLogger(name)
    before, handlers, propagate = logger.level, logger.handlers, logger.propagate
    logger.setLevel(level)
    logger.handlers, logger.propagate = [Relay(level)], False
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.handlers, logger.propagate = handlers, propagate


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Hide progress bars of libraries, and send their log lines to the run's own log.

    This affects the whole process: bars of other threads are hidden, too.
    """
    from unittest import mock

    import tqdm.std  # type: ignore[import-untyped]
    import transformers.utils.logging  # noqa: F401 (its first import sets up its logger)

    start = tqdm.std.tqdm.__init__

    def disabled(bar: Any, *args: Any, **options: Any) -> None:
        start(bar, *args, **{**options, "disable": True})

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(tqdm.std.tqdm, "__init__", disabled))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("default")
        warnings.showwarning = log_warning
        for name in NOISY:
            stack.enter_context(relayed(name))
        yield
