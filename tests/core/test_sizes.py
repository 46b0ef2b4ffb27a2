"""Sizes as text."""

from __future__ import annotations

import pytest

from mergelab.core.sizes import format_size, parse_size


@pytest.mark.parametrize(("text", "size"), [("5GB", 5e9), ("500MB", 5e8), ("1.5 kb", 1500), ("7", 7)])
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5Q", "-1GB", "", "0", "None"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}' is not a size"):
        parse_size(text)


def test_sizes_for_people() -> None:
    assert [format_size(n) for n in (0, 999, 65.5e9, 1.2e13)] == ["0 B", "999 B", "65.5 GB", "12.00 TB"]
