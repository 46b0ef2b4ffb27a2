"""Keeping transformers and mergekit off the terminal; what is worth telling goes into our own words."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

_OWN_HANDLERS = ("transformers", "huggingface_hub")
"""Loggers that write to the terminal themselves, past the run's log file."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars, and no log lines but what the run's own log file collects.

    Acts on the whole process: bars of other threads are hidden too for as long as it lasts.
    """
    from unittest import mock

    import tqdm.std  # type: ignore[import-untyped]

    start = tqdm.std.tqdm.__init__

    def disabled(bar: Any, *args: Any, **options: Any) -> None:
        start(bar, *args, **{**options, "disable": True})

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(tqdm.std.tqdm, "__init__", disabled))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in _OWN_HANDLERS:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        yield
