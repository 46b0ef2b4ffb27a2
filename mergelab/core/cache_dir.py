"""The folder of what mergelab builds and caches."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The cache folder: $MERGELAB_HOME, or `mergelab` in the user's cache folder."""
    if chosen := os.environ.get("MERGELAB_HOME"):
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "mergelab"
