"""Random numbers by counting: the i-th number of a stream is a hash of i.

Masks therefore do not depend on chunks, threads, devices or the order of tensors, and a candidate
of an evolution that only changes a weight or a density meets the same random numbers.

The hash is a Weyl sequence through the 32-bit mixer "lowbias32" of Chris Wellons' hash-prospector
(https://github.com/skeeto/hash-prospector; multipliers 21f0aaad and 735a2d97, shifts 16, 15, 15),
with half of the key added before and half of it folded in between.
"""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from mergelab.merging.kernels.buffers import Buffers
from mergelab.merging.kernels.tensor_group import Group

WEYL = 0x9E3779B9
"""2**32 over the golden ratio, odd."""
FIRST, SECOND = 0x21F0AAAD, 0x735A2D97
SPAN = 1 << 32
HALF = 1 << 16
"""How many values half of a number has."""

Key = tuple[int, int]


def key(seed: int, tensor: str, expert: str) -> Key:
    """Where a stream starts: two 32-bit numbers that decide all of it."""
    text = json.dumps([seed, tensor, expert], ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def keys(group: Group) -> list[Key]:
    """The streams of a group's experts."""
    return [key(group.seed, group.name, expert) for expert in group.keys]


def bits(k: Key, start: int, n: int, buffers: Buffers) -> Tensor:
    """Numbers start to start + n of a stream: [n] int32, uniform from -2**31 to 2**31 - 1.

    The counter has 32 bits: a stream repeats after 4.3e9 numbers, more than any tensor has.
    """
    weyl = buffers.once(
        "weyl",
        n,
        torch.int32,
        lambda m: torch.arange(m, dtype=torch.int32, device=buffers.device).mul_(_signed(WEYL)),
    )
    x = buffers("noise", (n,), torch.int32)
    shifted = buffers("shifted", (n,), torch.int32)

    def fold(by: int) -> None:
        """x ^= x >> by; torch shifts the sign in, so it has to be masked away."""
        torch.bitwise_right_shift(x, by, out=shifted)
        x.bitwise_xor_(shifted.bitwise_and_((1 << (32 - by)) - 1))

    torch.add(weyl, _signed(start * WEYL + k[0]), out=x)
    fold(16)
    x.mul_(_signed(FIRST))
    fold(15)
    x.bitwise_xor_(_signed(k[1])).mul_(_signed(SECOND))
    fold(15)
    return x


def below(probability: float) -> int:
    """The int32 below which a number of `bits` lies with this probability, 0 <= p < 1.

    It is a multiple of 2**16, so that the high half of a number (`high`) decides: probabilities are
    rounded to 2**-16 = 1.5e-5, but neither up to 1 nor, unless they are, down to 0.
    """
    steps = min(max(round(probability * HALF), 1 if probability > 0 else 0), HALF - 1)
    return (steps - HALF // 2) * HALF


def high(drawn: Tensor) -> Tensor:
    """The high half of numbers of `bits`, in their place: [n] int32, from -2**15 to 2**15 - 1."""
    return drawn.bitwise_right_shift_(16)


def _signed(value: int) -> int:
    """The int32 with these low 32 bits."""
    return (value + SPAN // 2) % SPAN - SPAN // 2
