"""Sizes in bytes as text: `5GB` in a configuration, `65.5 GB` in a message."""

from __future__ import annotations

import re

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB` or `500MB`, in powers of ten.

    Raises:
        ValueError: The text is not a size, or the size is less than one byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(text), re.IGNORECASE)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise ValueError(f"'{text}' is not a size")
    return size


def format_size(n: float) -> str:
    """A number of bytes such as `65.5 GB`, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} TB"
