"""Where mergelab keeps what it builds and remembers."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The folder of all that mergelab builds: $MERGELAB_HOME, or `mergelab` in the user's cache."""
    if chosen := os.environ.get("MERGELAB_HOME"):
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "mergelab"
