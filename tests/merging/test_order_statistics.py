"""Selection without sorting: what a stable sort puts there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pytest
import torch
from kernel_cases import BF16, FP32, FP64
from torch import Tensor

from mergelab.merging.kernels import order_statistics


def magnitudes(x: Tensor) -> Tensor:
    return order_statistics.magnitudes(x, out=torch.empty_like(x))


def scan(columns: Sequence[Tensor], piece: int) -> order_statistics.Scan:
    def pieces() -> Iterable[tuple[int, list[Tensor]]]:
        for start in range(0, len(columns[0]), piece):
            yield start, [c[start : start + piece] for c in columns]

    return pieces


N = 3000


def columns(dtype: torch.dtype) -> list[Tensor]:
    """Random, constant, of few values, of all sizes, with every special number."""
    g = torch.Generator().manual_seed(0)
    random = torch.randn(N, generator=g, dtype=dtype)
    few = torch.randint(-3, 4, (N,), generator=g).to(dtype) / 8
    info = torch.finfo(dtype)
    special = torch.tensor([0.0, info.tiny / 8, info.tiny, info.eps, 1.0, info.max, math.inf], dtype=dtype)
    return [
        random,
        torch.full((N,), -0.1, dtype=dtype),
        few,
        random * 2.0 ** torch.randint(-100, 100, (N,), generator=g).to(dtype),
        special[torch.randint(0, len(special), (N,), generator=g)] * random.sign(),
        random.to(BF16).to(dtype),
    ]


RANKS = [0, 1, 17, N // 4, N // 2, N // 2, N - 2, N - 1]


@pytest.mark.parametrize("piece", [N, 700, 64])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_locate_finds_what_a_stable_sort_puts_there(dtype: torch.dtype, signed: bool, piece: int) -> None:
    data = [(x + 0.0) if signed else x.abs() for x in columns(dtype)]  # + 0.0: no -0.0 among the zeros
    keys = [order_statistics.ordered(x) if signed else magnitudes(x) for x in data]
    ranks = [RANKS[i:] for i in range(len(data))]
    width = 8 * dtype.itemsize
    found = order_statistics.locate(scan(keys, piece), ranks, width, signed=signed)
    asked, there = [], []
    for x, column, at in zip(data, ranks, found, strict=True):
        values, order = torch.sort(x, stable=True)
        for rank, place in zip(column, at, strict=True):
            v = (
                order_statistics.signed_value(place.key, dtype)
                if signed
                else order_statistics.value(place.key, dtype)
            )
            assert v == values[rank]
            assert place.before == int((x < values[rank]).sum())
            assert place.equal == int((x == values[rank]).sum())
        asked.append([(place.key, rank - place.before) for rank, place in zip(column, at, strict=True)])
        there.append([int(order[rank]) for rank in column])
    assert order_statistics.positions(scan(keys, piece), asked) == there


def test_negative_zero_comes_before_zero_and_has_no_magnitude() -> None:
    zeros = torch.tensor([0.0, -0.0, 1e-45, -1e-45])
    assert order_statistics.ordered(zeros).argsort().tolist() == [3, 1, 0, 2]
    assert magnitudes(zeros).tolist() == [0, 0, 1, 1]


def test_only_as_much_is_read_as_it_takes_to_find_positions() -> None:
    read: list[int] = []

    def pieces() -> Iterable[tuple[int, list[Tensor]]]:
        for start in range(0, 100, 10):
            read.append(start)
            yield start, [torch.arange(start, start + 10) // 3]

    assert order_statistics.positions(pieces, [[(4, 1), (2, 2)]]) == [[13, 8]]
    assert read == [0, 10]
    assert order_statistics.positions(pieces, [[], []]) == [[], []]
    assert read == [0, 10]
