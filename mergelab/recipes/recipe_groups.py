"""What a recipe asks for: which models meet in which layers, with which parameters. Pure.

Works on mergekit's YAML as a plain dict, whether it was made from a Run or written by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mergelab.models.architecture import Weight
from mergelab.models.checkpoint import ModelMetadata
from mergelab.recipes import tensor_list
from mergelab.recipes.recipe import setting

KeyOf = Callable[[tuple[Any, ...]], str]
"""From a path into the recipe to the key that the user knows."""


@dataclass(frozen=True)
class Assignment:
    """One parameter given a setting, and the key that gave it."""

    key: str
    parameter: str
    model: str | None
    """The model's reference, or None for a setting of all of them."""
    value: Any


@dataclass(frozen=True)
class Group:
    """Models whose layers are merged with each other."""

    place: str
    inputs: list[str]
    """The models, with the base among them where mergekit adds it."""
    base: str | None
    added: bool = False
    """Whether the base is among the inputs only because mergekit adds it."""
    ranges: list[tuple[int, int]] = field(default_factory=list)
    """The layers of each input; empty for all of them."""
    given: list[Assignment] = field(default_factory=list)
    """The closest settings first, as mergekit looks them up."""


def groups(recipe: Mapping[str, Any], place: KeyOf) -> list[Group]:
    """The groups of a recipe whose structure is sound, in the order of the output's layers."""
    top = _given(recipe.get("parameters"), None, ("parameters",), place)
    base = recipe.get("base_model")
    out: list[Group] = []

    def of_models(items: list[Any], path: tuple[Any, ...], outer: list[Assignment]) -> None:
        given = [
            a
            for i, m in enumerate(items)
            for a in _given(m.get("parameters"), m["model"], (*path, i, "parameters"), place)
        ]
        inputs = [m["model"] for m in items]
        added = base is not None and base not in inputs
        out.append(Group(place(path), inputs + [str(base)] * added, base, added, [], given + outer))

    def of_slices(items: list[Any], path: tuple[Any, ...], outer: list[Assignment]) -> None:
        for i, s in enumerate(items):
            given = [
                a
                for j, m in enumerate(s["sources"])
                for a in _given(
                    m.get("parameters"), m["model"], (*path, i, "sources", j, "parameters"), place
                )
            ] + _given(s.get("parameters"), None, (*path, i, "parameters"), place)
            ranges = [(m["layer_range"][0], m["layer_range"][1]) for m in s["sources"]]
            inputs = [m["model"] for m in s["sources"]]
            own_base = s.get("base_model") or base
            out.append(Group(place((*path, i)), inputs, own_base, False, ranges, given + outer))

    if recipe.get("models"):
        of_models(recipe["models"], ("models",), top)
    if recipe.get("slices"):
        of_slices(recipe["slices"], ("slices",), top)
    for name, m in (recipe.get("modules") or {}).items():
        path = ("modules", name)
        outer = _given(m.get("parameters"), None, (*path, "parameters"), place) + top
        if m.get("models"):
            of_models(m["models"], (*path, "models"), outer)
        if m.get("slices"):
            of_slices(m["slices"], (*path, "slices"), outer)
    return out


def _given(parameters: Any, model: str | None, path: tuple[Any, ...], place: KeyOf) -> list[Assignment]:
    items = (parameters or {}).items()
    return [Assignment(place((*path, p)), str(p), model, setting(v, "")) for p, v in items if v is not None]


def output_tensors(
    config_source: ModelMetadata, all_groups: list[Group], tied: Collection[str] = ()
) -> list[list[tuple[str, float]]]:
    """For each group, (name, t) of the output tensors that it makes; empty where unknown.

    t is the layer's place within its group, 0 to 1, and 0 outside the layers: mergekit's rule
    (MergePlanner.plan_slice), which makes a gradient restart with each slice. Layers of different kinds,
    such as those of a text and of an image model, are counted apart.

    Args:
        config_source: the model whose config the merged one gets.
        all_groups: those of a recipe.
        tied: names of tensors that are made under another name.
    """
    counts = [g.ranges[0][1] - g.ranges[0][0] if g.ranges else None for g in all_groups]
    total = None if None in counts else sum(c for c in counts if c is not None)
    listed = tensor_list.listed(config_source, total)
    if listed is None:
        return [[] for _ in all_groups]
    listed = [w for w in listed if w.name not in tied]
    layered = [w for w in listed if w.layer is not None]
    depths: dict[str, int] = {}
    for w in layered:
        depths[w.kind] = max(depths.get(w.kind, 0), 1 + (w.layer or 0))
    before = [w for w in listed if w.layer is None and "embed" in w.name]
    after = [w for w in listed if w.layer is None and "embed" not in w.name]
    out, start = [], 0
    for i, count in enumerate(counts):
        own = [w for w in layered if count is None or start <= (w.layer or 0) < start + count]
        names = [(w.name, _t((w.layer or 0) - start, count or depths[w.kind])) for w in own]
        if i == 0:
            names = _outside(before) + names
        if i == len(counts) - 1:
            names += _outside(after)
        out.append(names)
        start += count or 0
    return out


def _t(index: int, count: int) -> float:
    return index / (count - 1) if count > 1 else 1.0


def _outside(ws: list[Weight]) -> list[tuple[str, float]]:
    return [(w.name, 0.0) for w in ws]
