"""Removal of secrets from what is recorded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergelab.core.errors import flattened

_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_SECRET = re.compile(r"(?<![a-z])(api)?(token|key|secret|passw(or)?d|passphrase|credential)s?(?![a-z])", re.I)


def scrub(value: Any, *, by_name: bool = True) -> Any:
    """A copy of nested plain data without secrets.

    The values of environment variables whose last word is one such as KEY, TOKEN or PASSWORD
    (WANDB_API_KEY, HF_TOKEN) are removed wherever they occur. Numbers stay, because `max_tokens` is not a
    secret.

    Args:
        value: The data.
        by_name: Whether to remove all text under a key with such a word, too.
    """
    words = {name: name.split("_")[-1] for name in os.environ}
    known = [os.environ[k] for k, word in words.items() if _SECRET.search(word)]
    known = [value for value in known if len(value) >= 8]

    def clean(value: Any, secret: bool = False) -> Any:
        if isinstance(value, Mapping):
            names = {k: by_name and bool(_SECRET.search(_CAMEL.sub("_", str(k)))) for k in value}
            return {clean(str(k)): clean(v, secret or names[k]) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item, secret) for item in value]
        if not isinstance(value, str | Path):
            return value
        text = "[removed]" if secret else str(value)
        for one in known:
            text = text.replace(one, "[removed]")
        return text

    return clean(value)


def error_line(e: Exception) -> str:
    """An exception as one line for the log, without secrets because the log is a file of the run."""
    return str(scrub(flattened(e)))[:300]
