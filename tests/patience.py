"""Waiting in tests, with an end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mergelab.optimization.candidate_evaluator import time_limit

within = time_limit


def until(
    true: Callable[[], Any], what: str = "it has come to that", seconds: float = 30, every: float = 0.02
) -> Any:
    """Wait until something is so, and return it."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"waited {seconds:g} s in vain: {what}"
        time.sleep(every)
    return found


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """No test waits for ever."""
    with within(60):
        yield


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches have the same names each time."""
    monkeypatch.setattr("secrets.token_hex", lambda n: "0" * 2 * n)
