"""Keeping libraries off the terminal; what is worth telling goes into our own words."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars, and no log lines but what the run's own log file collects.

    Acts on the whole process: bars of other threads are hidden too for as long as it lasts.
    """
    from unittest import mock

    import tqdm.std  # type: ignore[import-untyped]
    from transformers.utils import logging as own  # it writes to the terminal past the log file

    start = tqdm.std.tqdm.__init__

    def disabled(bar: Any, *args: Any, **options: Any) -> None:
        start(bar, *args, **{**options, "disable": True})

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(tqdm.std.tqdm, "__init__", disabled))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(own.set_verbosity, own.get_verbosity())
        own.set_verbosity(own.CRITICAL)
        yield
