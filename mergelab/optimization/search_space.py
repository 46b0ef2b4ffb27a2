"""The space of a search: which keys it varies, over which ranges, and the run of a genome. Pure functions.

A key is that of an override. What follows a weight, a density or a parameter selects a part of it: a
filter of tensor names, and in a gradient the index of a point.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergelab.composition import value_text
from mergelab.core.errors import InputError, InputErrors, did_you_mean
from mergelab.optimization.gene import Gene
from mergelab.optimization.space_grammar import read as read_range
from mergelab.recipes.recipe import PER_MODEL, REST, value_at
from mergelab.schema import Expert, Run

DEFAULTS = {"density": 1.0}
"""The value of a setting that is null."""


def expand(key: str, run: Run) -> tuple[list[str], bool]:
    """The keys that a key of the space covers, and whether it has a `*` for the experts. What the method does
    not take is left out with it, and an error without it."""
    keys = braces(key)
    if not key.startswith("experts.*."):
        return keys, False
    return [k.replace("*", name, 1) for name in run.experts for k in keys], True


def braces(key: str) -> list[str]:
    """The keys that a key with `{a,b}` in it covers."""
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
                    wrong.append(f"search.space.{key}: method={run.method.name} does not take {own}")
                continue
            try:
                found[key] = read_range(key, spec)
            except InputError as e:
                wrong.append(str(e))
    if wrong:
        raise InputErrors(wrong)
    if not found:
        raise InputError(
            "search.space: it is empty, so there is nothing to search\n"
            "Give a key and its range, as in conf/search/cma.yaml."
        )
    return list(found.values())


def start(run: Run, gene: Gene) -> Any:
    """The value at which a gene starts, that of the composed run.

    Raises:
        InputError: where the run has no such key, or a value outside the range.
    """
    value = _look(run, gene.key)
    if isinstance(value, (list, dict)):  # a gradient or a mapping that becomes one number
        numbers = list(_numbers(value))
        value = sum(numbers) / len(numbers) if numbers else None
    key = f"search.space.{gene.key}"
    if gene.choices:
        if value not in gene.choices:
            raise InputError(f"{key}: it starts at {value!r}, which is not one of its choices {gene.text}")
        return value
    assert gene.low is not None and gene.high is not None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{key}: it starts at {value!r}, which is not a number")
    if not gene.low <= value <= gene.high:
        message = f"{key}: the search starts at {value:g}, outside {gene.text}"
        raise InputError(f"{message}\nWiden the range, or set {gene.key} within it.")
    return value


def apply(run: Run, genome: Mapping[str, Any]) -> Run:
    """The run with the values of a genome.

    Args:
        run: the composed run.
        genome: from keys to values.
    Raises:
        InputError: for a key that the run does not have.
    """
    new = copy.deepcopy(run)
    settings: dict[tuple[str, ...], dict[tuple[str, ...], Any]] = {}
    for key, value in genome.items():
        path, part = _split(key)
        settings.setdefault(path, {})[part] = value
    for path, parts in settings.items():
        holder = _holder(new, path)
        old = _get(holder, path[-1], ".".join(path))
        value = _refined(DEFAULTS.get(path[-1]) if old is None else old, parts)
        if isinstance(holder, dict):
            holder[path[-1]] = value
        else:
            setattr(holder, path[-1], value)
    return new


def overrides(run: Run, genome: Mapping[str, Any]) -> list[str]:
    """The arguments that give a run the settings that a genome has decided.

    Args:
        run: the genome's run.
        genome: as it was applied.
    """
    settings = {_split(key)[0]: key for key in genome}
    out = []
    for path, key in settings.items():
        value = genome[key] if len(path) == 1 else _get(_holder(run, path), path[-1], ".".join(path))
        text = value if isinstance(value, str) else value_text(value, " ")  # a choice needs no quotes
        out.append(f"{'.'.join(path)}={text}")
    return out


# ---------------------------------------------------------------- keys


def _split(key: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A key as the path of a setting in the run, and the part of that setting."""
    parts = key.split(".")
    if parts[0] == "experts" and len(parts) > 2:
        at = 4 if parts[2] == "parameters" else 3
    else:
        at = 3 if parts[:2] == ["method", "parameters"] else len(parts)
    return tuple(parts[:at]), tuple(parts[at:])


def _holder(run: Run, path: Sequence[str]) -> Any:
    """The dataclass or mapping that has the setting at a path."""
    node: Any = run
    for i, name in enumerate(path[:-1]):
        node = _get(node, name, ".".join(path[: i + 1]))
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
    """What the run has at a key."""
    path, part = _split(key)
    holder = _holder(run, path)
    if isinstance(holder, dict) and path[-1] not in holder and isinstance(run.experts.get(path[1]), Expert):
        setting = ".".join(path)
        raise InputError(
            f"search.space.{key}: {setting} is not set; the search needs a value to start from\n"
            f"Set it, such as {setting}=0.5."
        )
    value = _get(holder, path[-1], ".".join(path))
    if value is None:
        value = DEFAULTS.get(path[-1])
    return _part(value, part)


def _part(value: Any, part: Sequence[str]) -> Any:
    """The value of a part of a setting."""
    for i, name in enumerate(part):
        if isinstance(value, dict):
            value = value.get(name, value.get(REST))
        elif isinstance(value, list) and name.isdigit():
            return value[min(int(name), len(value) - 1)] if i == len(part) - 1 else value
    return value


def _refined(old: Any, parts: Mapping[tuple[str, ...], Any]) -> Any:
    """A setting with some of its parts replaced; a number becomes a gradient or a mapping where it has to."""
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


def _point(old: Any, index: int, count: int) -> Any:
    """A point of a setting seen as a gradient of `count` points."""
    return value_at(old, "", index / max(count - 1, 1))


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for v in value:
            yield from _numbers(v)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)
