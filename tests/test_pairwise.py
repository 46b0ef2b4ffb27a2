"""The rows that stand for a full product: every pair is in one, few are needed, and they stay the same."""

from __future__ import annotations

from itertools import combinations
from math import prod
from typing import Any

import pytest
from pairwise import pairwise

AXES: list[list[list[Any]]] = [
    [["a", "b"], [1, 2]],
    [["a", "b", "c"], [1, 2], [True, False]],
    [[f"method{i}" for i in range(20)], ["qwen2", "llama"], [True, False], ["bf16", "fp16", "fp32"]],
    [list(range(4)), list(range(4)), list(range(2)), list(range(6))],
    [["only"], [1, 2, 3], ["only"]],
]


@pytest.mark.parametrize("axes", AXES, ids=lambda axes: "x".join(str(len(a)) for a in axes))
def test_each_pair_of_values_of_two_axes_is_in_a_row(axes: list[list[Any]]) -> None:
    rows = pairwise(*axes)
    for i, j in combinations(range(len(axes)), 2):
        assert {(row[i], row[j]) for row in rows} == {(a, b) for a in axes[i] for b in axes[j]}


@pytest.mark.parametrize("axes", AXES, ids=lambda axes: "x".join(str(len(a)) for a in axes))
def test_hardly_more_rows_than_the_two_longest_axes_need(axes: list[list[Any]]) -> None:
    longest = sorted(len(a) for a in axes)[-2:]
    assert prod(longest) <= len(pairwise(*axes)) <= 1.25 * prod(longest)


def test_no_row_comes_twice_and_the_rows_are_the_same_each_time() -> None:
    for axes in AXES:
        rows = pairwise(*axes)
        assert len(set(rows)) == len(rows)
        assert rows == pairwise(*axes)


def test_values_may_be_of_any_kind() -> None:
    assert pairwise([{"a": 1}, [2]], [None]) == [({"a": 1}, None), ([2], None)]
