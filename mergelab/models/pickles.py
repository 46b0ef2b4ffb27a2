"""Weights in Python's pickle format, read by torch's restricted loader, which builds tensors only."""

from __future__ import annotations

import re
from pathlib import Path

from mergelab.core.dtypes import BY_NAME, plain_name

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
"""The one file, or the index of several."""

SAFE = (2, 10)
"""The first torch version without a known vulnerability in that loader. In earlier versions a crafted
file could still run code (CVE-2025-32434, CVE-2026-24747)."""


class PickleRefused(Exception):
    """The file holds more than weights; the message says what."""


def tensors(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype, as safetensors calls it, and the shape of each tensor. No values are read.

    Raises:
        PickleRefused: The file holds anything but tensors by name, or is damaged.
        OSError: The file cannot be read.
    """
    import torch

    if _version(torch.__version__) < SAFE:
        raise PickleRefused(f"torch {torch.__version__} cannot read it safely; torch 2.10 or newer can")
    with file.open("rb"):  # an OSError is raised here, before the content can be blamed
        pass
    try:
        content = torch.load(file, map_location="meta", weights_only=True)
    except (
        Exception
    ) as e:  # a damaged file raises any exception, and torch's message advises to disable the check
        called = re.search(r"GLOBAL (\S+)", str(e))
        if called:
            raise PickleRefused(f"reading it would call {called[1]}, which weights never need") from e
        raise PickleRefused("it is damaged, truncated, or not a file of weights") from e
    if not isinstance(content, dict) or not content:
        raise PickleRefused(
            f"it does not hold tensors by name, but an object of type {type(content).__name__}"
        )
    odd = next((n for n, t in content.items() if not isinstance(t, torch.Tensor)), None)
    if odd is not None:
        raise PickleRefused(f"it holds '{odd}' of type {type(content[odd]).__name__}, which is not a tensor")
    return {n: (_code(plain_name(t.dtype)), tuple(t.shape)) for n, t in content.items()}


def _code(name: str) -> str:
    """safetensors' name of a dtype, or torch's where safetensors does not know it."""
    return BY_NAME[name].code if name in BY_NAME else name


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])
