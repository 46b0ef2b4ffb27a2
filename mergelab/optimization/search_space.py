"""The space of a search: which keys evolve, over which ranges, and what a genome makes of a Run. Pure.

A key is that of an override. What follows a weight, a density or a parameter picks a part of it: a
filter of tensor names, and in a gradient the point by its number.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergelab.core.errors import InputError, InputErrors, did_you_mean
from mergelab.optimization.gene import Gene
from mergelab.optimization.space_grammar import read as read_range
from mergelab.recipes.recipe import PER_MODEL
from mergelab.schema import Expert, Run

REST = "*"
"""The filter of all tensors that no other filter takes."""

DEFAULTS = {"density": 1.0}
"""What stands for a setting that is null."""


def expand(key: str, run: Run) -> tuple[list[str], bool]:
    """The keys that one of the space's stands for, and whether it has a `*` for experts: what the
    method does not take is then left out, and is an error otherwise."""
    keys = braces(key)
    if not key.startswith("experts.*."):
        return keys, False
    return [k.replace("*", name, 1) for name in run.experts for k in keys], True


def braces(key: str) -> list[str]:
    """The keys that one with `{a,b}` in it stands for."""
    keys = [key]
    while any("{" in k for k in keys):
        keys = [
            k[: m.start()] + part + k[m.end() :]
            for k in keys
            if (m := re.search(r"\{([^{}]*)\}", k))
            for part in m[1].split(",")
        ]
    return keys


def genes(space: Mapping[str, Any], run: Run, takes: set[str]) -> list[Gene]:
    """The genes of a run, in the order of its experts.

    Args:
        space: keys and ranges, as in `search.space`.
        run: the composed run that the search starts from.
        takes: the parameters of the method.
    Raises:
        InputErrors: everything that is wrong with it.
    """
    wrong: list[str] = []
    found: dict[str, Gene] = {}
    for pattern, spec in space.items():
        keys, lenient = expand(str(pattern), run)
        for key in keys:
            parts = key.split(".")
            own = parts[2] if parts[0] == "experts" and len(parts) > 2 else None
            if own in PER_MODEL and own not in takes:
                if not lenient:
                    wrong.append(f"search.space.{key}: method={run.method.name} takes no {own}")
                continue
            try:
                found[key] = read_range(key, spec)
            except InputError as e:
                wrong.append(str(e))
    if wrong:
        raise InputErrors(wrong)
    if not found:
        raise InputError(
            "search.space: nothing evolves\nName a key and its range, as in conf/search/cma.yaml."
        )
    return list(found.values())


def start(run: Run, gene: Gene) -> Any:
    """Where a gene starts: what the composed run has there.

    Raises:
        InputError: where the run has no such key, or a value outside of the range.
    """
    value = _look(run, gene.key)
    if isinstance(value, (list, dict)):  # a gradient that becomes one number
        numbers = list(_numbers(value))
        value = sum(numbers) / len(numbers) if numbers else None
    key = f"search.space.{gene.key}"
    if gene.choices:
        if value not in gene.choices:
            raise InputError(f"{key}: it starts at {value!r}, which is none of its choices {gene.text}")
        return value
    assert gene.low is not None and gene.high is not None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{key}: it starts at {value!r}, which is no number")
    if not gene.low <= value <= gene.high:
        message = f"{key}: the search starts at {value:g}, outside of {gene.text}"
        raise InputError(f"{message}\nWiden the range, or set {gene.key} inside of it.")
    return value


def apply(run: Run, genome: Mapping[str, Any]) -> Run:
    """The run with a genome's values.

    Raises:
        InputError: for a key that the run does not have.
    """
    new = copy.deepcopy(run)
    settings: dict[tuple[str, ...], dict[tuple[str, ...], Any]] = {}
    for key, value in genome.items():
        place, rest = _split(key)
        settings.setdefault(place, {})[rest] = value
    for place, parts in settings.items():
        holder = _holder(new, place)
        old = _get(holder, place[-1], ".".join(place))
        value = _refined(DEFAULTS.get(place[-1]) if old is None else old, parts)
        if isinstance(holder, dict):
            holder[place[-1]] = value
        else:
            setattr(holder, place[-1], value)
    return new


def overrides(run: Run, genome: Mapping[str, Any]) -> list[str]:
    """The arguments that give a run the settings that a genome has decided.

    Args:
        run: the genome's run.
        genome: as it was applied.
    """
    places = {_split(key)[0]: key for key in genome}
    out = []
    for place, key in places.items():
        value = genome[key] if len(place) == 1 else _get(_holder(run, place), place[-1], ".".join(place))
        out.append(f"{'.'.join(place)}={_typed(value)}")
    return out


def _typed(value: Any) -> str:
    """A value in the words of the command line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_typed(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_typed(v) for v in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---------------------------------------------------------------- keys


def _split(key: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A key as the place of a setting in the run, and the part of the setting."""
    parts = key.split(".")
    if parts[0] == "experts" and len(parts) > 2:
        at = 4 if parts[2] == "parameters" else 3
    else:
        at = 3 if parts[:2] == ["method", "parameters"] else len(parts)
    return tuple(parts[:at]), tuple(parts[at:])


def _holder(run: Run, place: Sequence[str]) -> Any:
    node: Any = run
    for i, name in enumerate(place[:-1]):
        node = _get(node, name, ".".join(place[: i + 1]))
    return node


def _get(node: Any, name: str, key: str) -> Any:
    if isinstance(node, dict):
        if name in node:
            return node[name]
        names = list(node)
    else:
        names = [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
        if name in names:
            return getattr(node, name)
    there = f" There are {', '.join(map(str, names))}." if names else ""
    raise InputError(f"search.space.{key}: there is no key '{name}'.{did_you_mean(name, names)}{there}")


def _look(run: Run, key: str) -> Any:
    place, rest = _split(key)
    holder = _holder(run, place)
    if isinstance(holder, dict) and place[-1] not in holder and isinstance(run.experts.get(place[1]), Expert):
        raise InputError(
            f"search.space.{key}: {'.'.join(place)} is not set; the search has to start somewhere"
        )
    value = _get(holder, place[-1], ".".join(place))
    if value is None:
        value = DEFAULTS.get(place[-1])
    return _part(value, rest)


def _part(value: Any, rest: Sequence[str]) -> Any:
    """What a setting has at a part of it."""
    for i, name in enumerate(rest):
        if isinstance(value, dict):
            value = value.get(name, value.get(REST))
        elif isinstance(value, list) and name.isdigit():
            return value[min(int(name), len(value) - 1)] if i == len(rest) - 1 else value
    return value


def _refined(old: Any, parts: Mapping[tuple[str, ...], Any]) -> Any:
    """A setting with some of its parts replaced: a number becomes a gradient or a mapping if need be."""
    if () in parts:
        return parts[()]
    below: dict[str, dict[tuple[str, ...], Any]] = {}
    for (head, *rest), value in parts.items():
        below.setdefault(head, {})[tuple(rest)] = value
    if all(head.isdigit() for head in below):
        count = max(int(head) for head in below) + 1
        return [_refined(_point(old, i, count), below[str(i)]) if str(i) in below else _point(old, i, count)
                for i in range(count)]  # fmt: skip
    out = {head: _refined(_part(old, [head]), sub) for head, sub in below.items() if head != REST}
    if isinstance(old, dict):
        out |= {k: v for k, v in old.items() if k not in out and k != REST}
    rest_of_it = old.get(REST) if isinstance(old, dict) else old
    if REST in below:
        out[REST] = _refined(rest_of_it, below[REST])
    elif rest_of_it is not None:
        out[REST] = rest_of_it
    return out


def _point(old: Any, i: int, count: int) -> Any:
    """Point i of a setting seen as a gradient of `count` points."""
    if not isinstance(old, list) or count == 1:
        return old if not isinstance(old, list) else old[0]
    at = i / (count - 1) * (len(old) - 1)
    low = int(at)
    high = min(low + 1, len(old) - 1)
    return old[low] + (at - low) * (old[high] - old[low])


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for v in value:
            yield from _numbers(v)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)
