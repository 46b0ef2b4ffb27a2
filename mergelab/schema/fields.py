"""What a field's value may be and when it has no effect: metadata that stands beside the field.

    budget: int = limited(100, at_least=1)
    engine: str = one_of("auto", "fast", "mergekit")
    memory: str = written_as("1GB", SIZE)
    detach: bool = setting(False, no_effect=[NoEffect("without a Slurm cluster", lambda run: ...)])

`mergelab.schema.validation` checks a composed Run against it, `mergelab.schema.reference` lists it. Null is
always right for a field whose type is Optional.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import Field, dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

from mergelab.core.errors import none_of
from mergelab.core.sizes import parse_size

T = TypeVar("T")

KEY = "mergelab"
"""Where a field's metadata holds its `Setting`."""


# ---------------------------------------------------------------- what a value may be


@dataclass(frozen=True, eq=False)
class Limits:
    """The numbers of an interval. Infinity is outside unless `infinite`; nan always is."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    note: str = ""
    """What a value in it means, such as `0: all of them`."""
    infinite: bool = False

    code = "setting"
    remedy = ""

    def wrong(self, value: Any) -> str | None:
        """What is wrong with a value, or None."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"{value!r} is not a number"
        return None if self._hold(value) else f"{number(value)} is out of range; {self.text}"

    def _hold(self, value: float) -> bool:
        return (
            (self.infinite or not math.isinf(value))
            and not math.isnan(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    @property
    def text(self) -> str:
        """The interval in words: `above 0, at most 1 (1: all of them)`."""
        if self.at_least is not None and self.at_most is not None:
            words = [f"{number(self.at_least)} to {number(self.at_most)}"]
        else:
            bounds = (("at least", self.at_least), ("above", self.above),
                      ("at most", self.at_most), ("below", self.below))  # fmt: skip
            words = [f"{word} {number(bound)}" for word, bound in bounds if bound is not None]
        found = ", ".join(words) or "any finite number"
        return f"{found} ({self.note})" if self.note else found


@dataclass(frozen=True, eq=False)
class Choices:
    """One of some names."""

    names: tuple[str, ...]

    code = "setting"
    remedy = ""

    def wrong(self, value: Any) -> str | None:
        """What is wrong with a value, or None."""
        return None if value in self.names else none_of(value, self.names)

    @property
    def text(self) -> str:
        """The names, separated by commas."""
        return ", ".join(self.names)


@dataclass(frozen=True, eq=False)
class Form:
    """What a value has to be written as, where neither an interval nor a list of names says it."""

    text: str
    """The form in words, as `a size such as 5GB` or `cpu, cuda or cuda:N`."""
    wrong: Callable[[Any], str | None]
    """What is wrong with a value, or None."""
    code: str = "setting"
    remedy: str = ""


Rule = Limits | Choices | Form


def _size(value: Any) -> str | None:
    try:
        parse_size(value)
    except ValueError as e:
        return str(e)
    return None


SIZE = Form("a size such as 5GB or 500MB", _size, "type", "Write it as 5GB or 500MB.")


def number(value: float) -> str:
    """A number as people write it: without a fraction of zero, and a whole number with all its digits."""
    return str(value) if isinstance(value, int) else f"{value:g}"


# ---------------------------------------------------------------- when a value has no effect


@dataclass(frozen=True, eq=False)
class NoEffect:
    """A condition under which a value other than the default is refused, because nothing reads it."""

    condition: str
    """In words that complete "it has no effect": `without a Slurm cluster`."""
    holds: Callable[[Any], bool]
    """The same as a predicate of a Run."""
    remedy: str = "Leave it out."
    code: str = "no-effect"
    """`no-effect` may be allowed to pass by the user, `unused` and `setting` may not."""
    typed: bool = False
    """Refused only where it was typed: a file of a group may set it for other runs as well."""


# ---------------------------------------------------------------- metadata


@dataclass(frozen=True, eq=False)
class Setting:
    """All that is known of a field besides its type, default and docstring."""

    rules: tuple[Rule, ...] = ()
    """What the value has to be; what each item has to be, where it is a list or a mapping."""
    no_effect: tuple[NoEffect, ...] = ()


NOTHING = Setting()


def setting_of(f: Field[Any]) -> Setting:
    """What is declared beside a field."""
    return cast(Setting, f.metadata.get(KEY, NOTHING))


def setting(default: T, *rules: Rule, no_effect: Sequence[NoEffect] = ()) -> T:
    """A field with rules for its value."""
    metadata = {KEY: Setting(rules, tuple(no_effect))}
    made: Any
    if isinstance(default, (list, dict)):
        made = field(default_factory=partial(copy, default), metadata=metadata)
    else:
        made = field(default=default, metadata=metadata)
    return cast(T, made)


def limited(
    default: T,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    note: str = "",
    infinite: bool = False,
    no_effect: Sequence[NoEffect] = (),
) -> T:
    """A field for a number in an interval; see `Limits`."""
    return setting(default, Limits(at_least, above, at_most, below, note, infinite), no_effect=no_effect)


def one_of(default: T, *others: str, no_effect: Sequence[NoEffect] = ()) -> T:
    """A field for one of some names. The first is the default; null besides where that is null."""
    names = (*((default,) if isinstance(default, str) else ()), *others)
    return setting(default, Choices(names), no_effect=no_effect)
