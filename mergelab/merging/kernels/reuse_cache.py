"""What the candidates of a search share: all that is known of a tensor whatever the parameters are.

A search merges the same inputs again and again with other weights and densities. The order of the
magnitudes, the random numbers and the norms stay the same, so they are kept where there is memory.
What a kernel makes with them has the bits that it has without them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")

Reserve = Callable[[int], bool]
"""Asks for so many bytes; False if there are not as many, and then they must not be used."""


class Budget:
    """Bytes that may be kept, of all tensors together; for several threads."""

    def __init__(self, nbytes: int):
        self._left, self._lock = nbytes, threading.Lock()

    def take(self, nbytes: int) -> bool:
        """Whether there were as many; they are gone then."""
        with self._lock:
            if nbytes > self._left:
                return False
            self._left -= nbytes
            return True

    def give(self, nbytes: int) -> None:
        """Bytes that are free again."""
        with self._lock:
            self._left += nbytes


class Shared:
    """What is kept of one tensor of given inputs. A tensor is one worker's at a time."""

    def __init__(self, budget: Budget):
        self._budget = budget
        self._kept: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[Reserve], T | None]) -> T | None:
        """What was made under this key; made now if it is the first time.

        Args:
            key: all that decides it, besides the inputs and the dtype of the arithmetic.
            make: asks for the bytes that it will keep before it fills them; None where it got none.
        Returns:
            None where the memory does not do, then and later.
        """
        if key not in self._kept:
            self._kept[key] = self._make(make)
        value: T | None = self._kept[key]
        return value

    def _make(self, make: Callable[[Reserve], T | None]) -> T | None:
        taken = 0

        def take(nbytes: int) -> bool:
            nonlocal taken
            found = self._budget.take(nbytes)
            taken += nbytes if found else 0
            return found

        value = make(take)
        if value is None:
            self._budget.give(taken)
        return value
