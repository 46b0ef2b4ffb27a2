"""The dtypes of tensors: their names in torch and in safetensors, their sizes, and what they are good for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dtype:
    """One dtype."""

    name: str
    """As torch calls it."""
    code: str
    """As safetensors calls it."""
    nbytes: int
    """Bytes of one element."""
    mergeable: bool = False
    """Whether tensors of this dtype can be merged."""
    computable: bool = False
    """Whether the arithmetic of our own engine can be done in it."""


DTYPES = (
    Dtype("float32", "F32", 4, mergeable=True, computable=True),
    Dtype("bfloat16", "BF16", 2, mergeable=True),
    Dtype("float16", "F16", 2, mergeable=True),
    Dtype("float64", "F64", 8, mergeable=True, computable=True),
    Dtype("float8_e4m3fn", "F8_E4M3", 1),
    Dtype("float8_e5m2", "F8_E5M2", 1),
    Dtype("int64", "I64", 8),
    Dtype("int32", "I32", 4),
    Dtype("int16", "I16", 2),
    Dtype("int8", "I8", 1),
    Dtype("uint64", "U64", 8),
    Dtype("uint32", "U32", 4),
    Dtype("uint16", "U16", 2),
    Dtype("uint8", "U8", 1),
    Dtype("bool", "BOOL", 1),
)
"""Every dtype. The first one of a kind is the default."""

BY_NAME = {d.name: d for d in DTYPES}
"""By torch's names."""

BY_CODE = {d.code: d for d in DTYPES}
"""By safetensors' names."""

MERGEABLE = tuple(d.name for d in DTYPES if d.mergeable)
"""torch's names of the dtypes that can be merged."""

COMPUTABLE = tuple(d.name for d in DTYPES if d.computable)
"""torch's names of the dtypes in which our own engine computes."""


def plain_name(value: object) -> str:
    """torch's name of a dtype without the module: `float32` for `torch.float32`, too."""
    return str(value).removeprefix("torch.")


def is_mergeable(code: str) -> bool:
    """Whether tensors of a dtype can be merged, by safetensors' name of it."""
    return code in BY_CODE and BY_CODE[code].mergeable
