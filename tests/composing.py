"""A run as the command line composes it, without running it."""

from __future__ import annotations

from mergelab import compose as composed

__all__ = ["EXPERTS", "composed"]

EXPERTS = {"slerp": 2, "nuslerp": 2, "nearswap": 2, "arcee_fusion": 2, "passthrough": 1}
"""How many a method takes; three for any other."""
