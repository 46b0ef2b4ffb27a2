"""Times as Slurm writes them."""

from __future__ import annotations

import math
import re

_FORM = re.compile(r"(\d+-)?\d+(:\d+){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)


def parse_minutes(text: str) -> float:
    """Minutes of a time such as `90`, `90:30`, `12:00:00`, `2-12` or `infinite`.

    Raises:
        ValueError: The text is not a time as Slurm writes it.
    """
    if not _FORM.fullmatch(text):
        raise ValueError(f"'{text}' is not a time as Slurm writes it")
    if not text[:1].isdigit():
        return math.inf
    days, _, rest = text.rpartition("-")
    parts = [int(x) for x in rest.split(":")]
    if days:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60
