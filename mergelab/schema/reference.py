"""The schema as data for a reference page: every key with its type, default, values and meaning.

Everything comes from the dataclasses: types and defaults from their fields, limits, choices and conditions
from the fields' metadata, meanings from the docstrings below the fields.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from mergelab.schema.fields import setting_of
from mergelab.schema.run import Run

TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "any"}
NAME = "NAME"
"""What stands in a key for a name that the user chooses: `experts.NAME.weight`."""


@dataclass(frozen=True)
class Entry:
    """One key of the configuration."""

    key: str
    """From the top, such as `hardware.slurm.cpus`."""
    type: str
    """`whole number`, `number`, `text`, `true or false`, `any`, `list of texts`, `mapping to numbers`, and
    `section` for a key with keys of its own; with ` or null` where it may be null."""
    default: str
    """As it is written in YAML; empty where there is none, and for sections that are always there."""
    values: str
    """Limits, choices or form, such as `at least 1`; empty where any value of the type will do."""
    meaning: str
    """The docstring, Markdown, on one line; for a section without one, that of its class."""
    no_effect: tuple[str, ...]
    """Conditions that complete "It has no effect ", such as `without a Slurm cluster`."""

    @property
    def is_section(self) -> bool:
        """Whether it has keys of its own, which follow it."""
        return self.type.startswith("section")


def entries(kind: type[Any] = Run, key: str = "", default: Any = None) -> list[Entry]:
    """Every key of a dataclass of settings, each section before its own keys, in the order of the schema.

    Args:
        kind: the dataclass; `Run` is the whole configuration.
        key: its key, empty for the whole.
        default: an instance with the default values; None: what the class makes.
    """
    return list(_entries(kind, key, kind() if default is None else default))


def _entries(kind: type[Any], key: str, default: Any) -> Iterator[Entry]:
    hints, docs = get_type_hints(kind), docstrings(kind)
    for f in fields(kind):
        if f.metadata.get("omegaconf_ignore"):
            continue
        declared = setting_of(f)
        place, value = f"{key}.{f.name}" if key else f.name, getattr(default, f.name)
        inner, optional = _without_null(hints[f.name])
        section, named = _section(inner)
        required = f.default is MISSING or (f.default is NO_DEFAULT and f.default_factory is NO_DEFAULT)
        shown = "" if required or (is_dataclass(value) and not isinstance(value, type)) else _yaml(value)
        yield Entry(
            key=place,
            type=("section" if section else _type(inner)) + (" or null" if optional else ""),
            default=shown,
            values="; ".join(rule.text for rule in declared.rules),
            meaning=docs.get(f.name, "") or (" ".join((section.__doc__ or "").split()) if section else ""),
            no_effect=tuple(c.condition for c in declared.no_effect),
        )
        if section:
            below = f"{place}.{NAME}" if named else place
            yield from _entries(section, below, value if is_dataclass(value) else section())


def _without_null(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, UnionType) and type(None) in get_args(hint):
        (inner,) = (a for a in get_args(hint) if a is not type(None))
        return inner, True
    return hint, False


def _section(hint: Any) -> tuple[type[Any] | None, bool]:
    """The dataclass of a section, and whether there is one for each of some names."""
    if get_origin(hint) is dict and is_dataclass(get_args(hint)[1]):
        return get_args(hint)[1], True
    return (hint, False) if isinstance(hint, type) and is_dataclass(hint) else (None, False)


def _type(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is list:
        return f"list of {_plural(inner[0])}"
    if origin is dict:
        return f"mapping to {_plural(inner[1])}"
    return TYPES[hint]


def _plural(hint: Any) -> str:
    if get_args(hint):
        return f"lists of {_plural(get_args(hint)[0])}"
    return "anything" if hint is Any else f"{TYPES[hint]}s"


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def docstrings(kind: type[Any]) -> dict[str, str]:
    """The texts below the fields of a dataclass, each on one line."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for declared, below in zip(tree.body, tree.body[1:], strict=False):
        if not isinstance(declared, ast.AnnAssign) or not isinstance(declared.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[declared.target.id] = " ".join(str(below.value.value).split())
    return found
