"""A run as the command line composes it, without running it."""

from __future__ import annotations

from hydra import compose, initialize_config_dir

from mergelab.main import CONF, _typed
from mergelab.schema import Run

EXPERTS = {"slerp": 2, "nuslerp": 2, "nearswap": 2, "arcee_fusion": 2, "passthrough": 1}
"""How many a method takes; three for any other."""


def composed(*overrides: str) -> Run:
    """The Run that these arguments come to."""
    with initialize_config_dir(str(CONF)):
        return _typed(compose("config", overrides=list(overrides)))
