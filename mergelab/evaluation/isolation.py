"""Keeping lm_eval silent, and the state of the process as it was."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Iterator
from typing import Any

from mergelab.core.library_output import relayed, silence_libraries
from mergelab.schema import Hardware

SMALL = 10_000_000
"""Parameters. Below, threads mostly wait for one another: on two busy cores the tiny family took
85 s with two threads and 3 s with one."""


def threads(model: Any, hardware: Hardware) -> int | None:
    """Threads for a model: those asked for, and else one for a model too small to share out."""
    small = hardware.device == "cpu" and model.num_parameters() < SMALL
    return hardware.threads or (1 if small else None)


@contextlib.contextmanager
def silence_lm_eval(level: int = logging.WARNING) -> Iterator[None]:
    """Hide progress bars, prints and log lines of lm_eval and the libraries that it uses. What lm_eval itself
    logs at `level` or above is passed on once.

    It affects the whole process: progress bars of other threads are hidden, too.
    """
    from unittest import mock

    import lm_eval.evaluator  # with all it uses: a later first import would set the loggers again

    with contextlib.ExitStack() as stack:
        stack.enter_context(silence_libraries())
        # Its bootstrap prints, and would fork a pool of processes.
        stack.enter_context(mock.patch.object(lm_eval.api.metrics, "print", lambda *_: None, create=True))
        stack.enter_context(mock.patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}))
        stack.enter_context(relayed("lm_eval", level))
        yield


@contextlib.contextmanager
def seeded(seed: int, threads: int | None = None) -> Iterator[None]:
    """Seed the global random generators and set torch's thread count; restore both on exit."""
    import numpy as np
    import torch

    before = random.getstate(), np.random.get_state(), torch.get_num_threads()
    # Reading the state of a device that is not in use yet would initialise it.
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if in_use else ()
    with torch.random.fork_rng(devices=devices):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            if threads is not None:
                torch.set_num_threads(threads)
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_num_threads(before[2])
