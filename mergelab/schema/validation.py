"""The walker of the schema: limits, choices and forms of values, and settings that have no effect.

What a value may be is declared beside its field (`mergelab.schema.fields`). Nothing here knows a single key,
so the settings of a user's own step are checked like ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from mergelab.core.findings import Finding, error
from mergelab.schema.fields import Choices, Rule, setting_of


@dataclass(frozen=True)
class Value:
    """One value of a composed configuration, and the field that declares it."""

    key: str
    value: Any
    default: Any
    field: Field[Any]
    optional: bool
    """Whether it may be null."""


def values(section: Any, key: str = "", default: Any = None) -> Iterator[Value]:
    """Every value of a section and of the sections in it, in the order of the schema.

    Args:
        section: a dataclass of settings.
        key: its key; empty for the whole configuration.
        default: the section as it is by default; None: as its class makes it.
    """
    default = type(section)() if default is None else default
    kind: type = type(section)
    optional = _optional(kind)
    for f in fields(section):
        if f.metadata.get("omegaconf_ignore"):
            continue
        value, preset = getattr(section, f.name), getattr(default, f.name)
        place = f"{key}.{f.name}" if key else f.name
        if is_dataclass(value):
            yield from values(value, place, preset)
            continue
        yield Value(place, value, preset, f, f.name in optional)
        if isinstance(value, dict):
            for name, item in value.items():
                if is_dataclass(item):
                    yield from values(item, f"{place}.{name}")


@cache
def _optional(kind: type) -> frozenset[str]:
    """The fields of a dataclass that may be null."""
    hints = get_type_hints(kind)
    return frozenset(
        name
        for name, hint in hints.items()
        if hint is Any or (get_origin(hint) in (Union, UnionType) and type(None) in get_args(hint))
    )


def check(run: Any, overrides: Iterable[str], unread: Collection[str] = ()) -> Iterator[Finding]:
    """Every value of a Run that breaks a rule beside its field, or that nothing in this run reads.

    Args:
        run: the composed Run.
        overrides: what was typed.
        unread: sections that the job does not read; they are not checked.
    """
    typed = [(text, text.lstrip("+~").partition("=")[0]) for text in overrides]
    for v in values(run):
        if v.key.partition(".")[0] not in unread:
            wrong = list(check_value(v))
            yield from wrong or _without_effect(v, run, typed)


def check_section(section: Any, key: str) -> Iterator[Finding]:
    """Every value of a section that breaks a rule beside its field.

    Args:
        section: a dataclass of settings.
        key: its key.
    """
    for v in values(section, key):
        yield from check_value(v)


def check_value(v: Value) -> Iterator[Finding]:
    """What is wrong with one value, or with each item of a list or mapping."""
    if v.value is None and v.optional:
        return
    items = [(v.key, v.value)]
    if isinstance(v.value, dict):
        items = [(f"{v.key}.{name}", item) for name, item in v.value.items()]
    elif isinstance(v.value, (list, tuple)):
        items = [(v.key, item) for item in v.value]
    for rule in setting_of(v.field).rules:
        for key, item in items:
            if (message := _wrong(rule, item, v.optional)) is not None:
                yield error(rule.code, key, message, rule.remedy)


def _wrong(rule: Rule, value: Any, optional: bool) -> str | None:
    if isinstance(rule, Choices) and optional:
        rule = Choices(("null", *rule.names))
    return rule.wrong(value)


def _without_effect(v: Value, run: Any, typed: Iterable[tuple[str, str]]) -> Iterator[Finding]:
    for condition in setting_of(v.field).no_effect:
        if condition.typed:
            places = [text for text, key in typed if key == v.key or key.startswith(f"{v.key}.")]
        else:
            places = [v.key] if v.value != v.default else []
        if places and condition.holds(run):
            message = f"it has no effect {condition.condition}"
            yield from (error(condition.code, place, message, condition.remedy) for place in places)
