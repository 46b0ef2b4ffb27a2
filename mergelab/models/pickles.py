"""Weights in Python's pickle format, read by torch's reader that builds tensors and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from mergelab.core.dtypes import BY_NAME, plain_name

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
"""The one file, or the index of several."""

SAFE = (2, 10)
"""The first version of torch whose reader is not known to be broken by a file made for it: before, one
could run code all the same (CVE-2025-32434, CVE-2026-24747)."""


class PickleRefused(Exception):
    """The file is not one of weights alone; the message says what else it is."""


def tensors(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype, as safetensors calls it, and the shape of each tensor; none of their numbers is read.

    Raises:
        Refused: where it would do anything else than give tensors by name, or is damaged.
        OSError: where it cannot be read.
    """
    import torch

    if _version(torch.__version__) < SAFE:
        raise PickleRefused(f"torch {torch.__version__} cannot read it safely; torch 2.10 or newer can")
    with file.open("rb"):  # where that fails, it is not the content's fault
        pass
    try:
        content = torch.load(file, map_location="meta", weights_only=True)
    except Exception as e:  # a damaged file fails in whatever way; torch's advice is to let it run
        called = re.search(r"GLOBAL (\S+)", str(e))
        if called:
            raise PickleRefused(f"it would call {called[1]} when it is read, which no weights need") from e
        raise PickleRefused("it is damaged, was cut short, or never was a file of weights") from e
    if not isinstance(content, dict) or not content:
        raise PickleRefused(f"it holds no tensors by name, but an object of type {type(content).__name__}")
    odd = next((n for n, t in content.items() if not isinstance(t, torch.Tensor)), None)
    if odd is not None:
        raise PickleRefused(f"it holds '{odd}' of type {type(content[odd]).__name__}, which is no tensor")
    return {n: (_code(plain_name(t.dtype)), tuple(t.shape)) for n, t in content.items()}


def _code(name: str) -> str:
    """safetensors' name of a dtype, or torch's where safetensors does not know it."""
    return BY_NAME[name].code if name in BY_NAME else name


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])
