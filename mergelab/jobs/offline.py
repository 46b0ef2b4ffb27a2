"""Runs for which everything is on this machine: the libraries then look nothing up."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mergelab.jobs.step import steps_of
from mergelab.schema import Run

NAMES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
"""What huggingface_hub and datasets look at when they are imported."""

CONSTANTS = (
    ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_DATASETS_OFFLINE"),
)
"""And what they have made of it."""


def is_local(run: Run) -> bool:
    """Whether a run needs nothing but the built-in family and files of this machine."""
    from mergelab import evaluation  # late: composing does not need it

    kind = evaluation.known_kind(run.eval)
    local = kind is not None and kind.is_local(run)
    names = [run.model.base, *(run.model.roles[e] for e in run.experts if e in run.model.roles)]
    zoo = all(str(c.path).startswith("zoo:") for c in names) and not any(e.path for e in run.experts.values())
    return local and zoo and run.method.path is None and not any(s.online for s in steps_of(run))


@contextmanager
def where_local(run: Run) -> Iterator[None]:
    """Keep the libraries offline until the body ends if the run `is_local`; what the environment says
    comes first. Then the environment, and what the libraries have made of it, are as before."""
    local = is_local(run)
    wanted = dict.fromkeys(NAMES if local else (), "1") | {"TOKENIZERS_PARALLELISM": "false"}
    new = {name: value for name, value in wanted.items() if name not in os.environ}
    before = {place: _read(*place) for place in CONSTANTS} if local else {}
    os.environ |= new
    for (module, name), value in before.items():
        if value is not None:
            setattr(sys.modules[module], name, True)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)
        for (module, name), value in before.items():
            if _read(module, name) is not None:  # a library imported meanwhile has read ours
                setattr(sys.modules[module], name, _user_says(module) if value is None else value)


def _read(module: str, name: str) -> Any:
    return getattr(sys.modules[module], name, None) if module in sys.modules else None


def _user_says(module: str) -> bool:
    """Whether the environment says that a library is offline, as the library reads it."""
    own = os.environ.get("HF_DATASETS_OFFLINE") if module.startswith("datasets") else None
    words = own or os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return words.upper() in ("1", "ON", "YES", "TRUE")
