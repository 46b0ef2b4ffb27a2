"""The parameters of a mergekit YAML file, as the method that it names reads them. Pure.

mergekit takes no notice of a parameter that the method lacks or that stands where the method does not look,
and reads every value in the declared type: 1.0 as true, "0.5" as a number. Here the first is said, and both
are gone afterwards.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from mergelab.core.errors import closest
from mergelab.core.findings import Finding, error, warning
from mergelab.methods.declared import NUMBERS, Parameter
from mergelab.methods.registry import MethodInfo
from mergelab.recipes.recipe import mapped, number
from mergelab.recipes.recipe_groups import KeyOf

TRUTH = {"1": True, "on": True, "t": True, "true": True, "y": True, "yes": True,
         "0": False, "off": False, "f": False, "false": False, "n": False, "no": False}  # fmt: skip
"""Texts that stand for a boolean."""
MASK = "int8_mask"
"""How a mask is held in memory: it never changes a result."""

Path = tuple[Any, ...]


def read(
    recipe: Mapping[str, Any], d: MethodInfo, words: Collection[str], place: KeyOf
) -> tuple[dict[str, Any], list[Finding]]:
    """The recipe with parameters that have an effect, in the declared types; and what is wrong.

    Args:
        recipe: a sound one.
        d: its method.
        words: the parameters of all methods. None of them is taken for a misspelling.
        place: from a path into the recipe to the key that the user knows.
    """
    found: list[Finding] = []

    def walk(node: Mapping[str, Any], path: Path, outer: str | None) -> dict[str, Any]:
        base = node.get("base_model") or outer
        out = dict(node)
        for k in ("models", "slices", "sources"):
            if node.get(k):
                out[k] = [walk(v, (*path, k, i), base) for i, v in enumerate(node[k])]
        if node.get("modules"):
            out["modules"] = {n: walk(m, (*path, "modules", n), base) for n, m in node["modules"].items()}
        kept = {}
        for name, value in (out.pop("parameters", None) or {}).items():
            wrong = _wrong(name, d, words, (*path, "parameters", name), place, node.get("model"), base)
            if wrong:
                found.append(wrong)
            else:
                kept[name] = mapped(value, partial(typed, d.parameters[name]))
        return out | ({"parameters": kept} if kept else {})

    return walk(recipe, (), None), found


def _wrong(
    name: str,
    d: MethodInfo,
    words: Collection[str],
    path: Path,
    place: KeyOf,
    model: str | None,
    base: str | None,
) -> Finding | None:
    """Why a parameter has no effect at this place."""
    key = place(path)
    p = d.parameters.get(name)
    takes = f"It takes {', '.join(sorted(d.parameters))}." if d.parameters else "It takes no parameters."
    if p is None:
        near = None if name in words else closest(name, d.parameters)
        if near is None:
            return warning("no-effect", key, f"no effect: {d.name} has no {name}", takes)
        message = f"{d.name} has no parameter '{name}'. Did you mean '{near}'?"
        remedy = f"{takes} With allow=[unknown-key] it is ignored."
        return error("unknown-key", key, message, remedy)
    if name == MASK:
        return None
    if name in d.traits.unused:
        return warning("no-effect", key, f"no effect: {d.name} does not use {name}")
    if model is not None and not p.per_model:
        message = f"no effect: {d.name} takes {name} once for the merge, not for each model"
        return warning("no-effect", key, message, f"It has an effect as {place(('parameters', name))}.")
    if model is not None and model == base and not p.on_base and d.inputs.base != "ignored":
        return warning("no-effect", key, f"no effect: {d.name} takes no {name} for the base model")
    return None


def typed(p: Parameter, value: Any) -> Any:
    """A value in the type of a parameter, where mergekit reads it so."""
    if p.kind not in NUMBERS:
        return value
    if p.kind is bool and isinstance(value, str):
        return TRUTH.get(value.strip().lower(), value)
    value = number(value)
    if p.kind is bool:
        return bool(value) if value in (0, 1) else value
    return p.kind(value) if isinstance(value, bool) else value
