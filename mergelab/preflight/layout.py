"""What a recipe asks for: which models meet in which layers, with which parameters. Pure.

Works on mergekit's YAML as a plain dict, whether a Run was turned into it or somebody wrote it.
mergekit ignores keys that it does not know; here each is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mergelab.errors import did_you_mean
from mergelab.preflight.architecture import Weight, weights
from mergelab.preflight.findings import Finding, error

Place = Callable[[tuple[Any, ...]], str]
"""From a path into the recipe to the key that the user knows."""

TOP = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)
MODEL = ("model", "parameters")
SLICE = ("sources", "base_model", "residual_weight", "parameters")
SOURCE = ("model", "layer_range", "parameters")
MODULE = ("slices", "models", "parameters")
TOKENIZER = ("source", "tokens", "pad_to_multiple_of")
MERGEABLE = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Assignment:
    """One parameter given a setting, and the key where somebody gave it."""

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
    base: str | None
    ranges: list[tuple[int, int]] = field(default_factory=list)
    """The layers of each input; empty for all of them."""
    given: list[Assignment] = field(default_factory=list)
    """The closest settings first, as mergekit looks them up."""


def file_place(file: str) -> Place:
    """Keys as they stand in a user's YAML: `my.yaml: models[0].parameters.t`."""

    def place(path: tuple[Any, ...]) -> str:
        text = ""
        for p in path:
            text += f"[{p}]" if isinstance(p, int) else f".{p}" if text else str(p)
        return f"{file}: {text}" if text else file

    return place


def check_structure(recipe: Any, place: Place) -> list[Finding]:
    """Unknown keys, wrong types, and which of models, slices and modules is there."""
    if not isinstance(recipe, dict):
        return [error("structure", place(()), "it is not a mapping, so it is no mergekit configuration")]
    out = list(_keys(recipe, TOP, (), place))
    if not isinstance(recipe.get("merge_method"), str):
        out.append(error("structure", place(("merge_method",)), "it has to name a merge method"))
    forms = [k for k in ("models", "slices", "modules") if recipe.get(k)]
    if len(forms) != 1:
        found = " and ".join(forms) if forms else "none of them"
        out.append(error("structure", place(()), f"needs one of models, slices and modules; it has {found}"))
    if recipe.get("tokenizer") and recipe.get("tokenizer_source"):
        out.append(error("structure", place(("tokenizer",)), "is given beside tokenizer_source; keep one"))
    if isinstance(recipe.get("tokenizer"), dict):
        out += _keys(recipe["tokenizer"], TOKENIZER, ("tokenizer",), place)
    for k in ("dtype", "out_dtype"):
        if recipe.get(k) is not None and str(recipe[k]).removeprefix("torch.") not in MERGEABLE:
            out.append(
                error(
                    "dtype",
                    place((k,)),
                    f"'{recipe[k]}' is none of {', '.join(MERGEABLE)}."
                    f"{did_you_mean(str(recipe[k]), MERGEABLE)}",
                )
            )
    out += _check_models(recipe.get("models"), ("models",), place)
    out += _check_slices(recipe.get("slices"), ("slices",), place)
    modules = recipe.get("modules")
    if modules is not None and not isinstance(modules, dict):
        out.append(error("structure", place(("modules",)), "it has to map names to modules"))
    for name, m in (modules if isinstance(modules, dict) else {}).items():
        path = ("modules", name)
        if not isinstance(m, dict):
            out.append(error("structure", place(path), "it has to be a mapping"))
            continue
        out += _keys(m, MODULE, path, place)
        out += _check_models(m.get("models"), (*path, "models"), place)
        out += _check_slices(m.get("slices"), (*path, "slices"), place)
    return out


def _keys(
    node: Mapping[str, Any], known: tuple[str, ...], path: tuple[Any, ...], place: Place
) -> Iterator[Finding]:
    for k in node:
        if k not in known:
            yield error(
                "unknown-key",
                place((*path, k)),
                f"mergekit knows no such key.{did_you_mean(str(k), known)}",
                f"Known here: {', '.join(known)}.",
            )
    parameters = node.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        yield error("structure", place((*path, "parameters")), "it has to map parameters to settings")


def _check_models(items: Any, path: tuple[Any, ...], place: Place) -> Iterator[Finding]:
    if items is None:
        return
    if not isinstance(items, list):
        yield error("structure", place(path), "it has to be a list of models")
        return
    for i, item in enumerate(items):
        if not isinstance(item, dict) or not isinstance(item.get("model"), str):
            yield error("structure", place((*path, i)), "it has to be a mapping with `model: PATH`")
        else:
            yield from _keys(item, MODEL, (*path, i), place)


def _check_slices(items: Any, path: tuple[Any, ...], place: Place) -> Iterator[Finding]:
    if items is None:
        return
    if not isinstance(items, list):
        yield error("structure", place(path), "it has to be a list of slices")
        return
    for i, item in enumerate(items):
        at = (*path, i)
        if not isinstance(item, dict) or not isinstance(item.get("sources"), list) or not item["sources"]:
            yield error("structure", place(at), "it has to be a mapping with a list of `sources`")
            continue
        yield from _keys(item, SLICE, at, place)
        lengths = set()
        for j, source in enumerate(item["sources"]):
            here = (*at, "sources", j)
            if not isinstance(source, dict) or not isinstance(source.get("model"), str):
                yield error("structure", place(here), "it has to be a mapping with `model` and `layer_range`")
                continue
            yield from _keys(source, SOURCE, here, place)
            r = source.get("layer_range")
            if not (isinstance(r, list) and len(r) == 2 and all(type(x) is int for x in r)):
                yield error("layer-range", place((*here, "layer_range")), f"{r!r} is not [first, end]")
            elif not 0 <= r[0] < r[1]:
                yield error(
                    "layer-range",
                    place((*here, "layer_range")),
                    f"{r} holds no layers; the end must be above the start, and the start at least 0",
                )
            else:
                lengths.add(r[1] - r[0])
        if len(lengths) > 1:
            yield error(
                "layer-range", place(at), f"its sources have {sorted(lengths)} layers; they must be equal"
            )


def groups(recipe: Mapping[str, Any], place: Place) -> list[Group]:
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
        out.append(Group(place(path), [m["model"] for m in items], base, [], given + outer))

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
            out.append(Group(place((*path, i)), inputs, s.get("base_model") or base, ranges, given + outer))

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


def _given(parameters: Any, model: str | None, path: tuple[Any, ...], place: Place) -> list[Assignment]:
    items = (parameters or {}).items()
    return [Assignment(place((*path, p)), str(p), model, v) for p, v in items if v is not None]


def output_tensors(config: Mapping[str, Any], all_groups: list[Group]) -> list[list[tuple[str, float]]]:
    """For each group, (name, t) of the output tensors that it makes; empty where unknown.

    t is the layer's place within its group, 0 to 1, and 0 outside the layers: mergekit's rule
    (MergePlanner.plan_slice), which makes a gradient restart with each slice.
    """
    counts = [g.ranges[0][1] - g.ranges[0][0] if g.ranges else None for g in all_groups]
    total = None if None in counts else sum(c for c in counts if c is not None)
    listed = weights(config, total)
    if listed is None:
        return [[] for _ in all_groups]
    layered = [w for w in listed if w.layer is not None]
    depth = 1 + max((w.layer or 0 for w in layered), default=-1)
    before = [w for w in listed if w.layer is None and "embed" in w.name]
    after = [w for w in listed if w.layer is None and "embed" not in w.name]
    out, start = [], 0
    for i, count in enumerate(counts):
        n = depth if count is None else count
        own = [w for w in layered if start <= (w.layer or 0) < start + n]
        names = [(w.name, _t((w.layer or 0) - start, n)) for w in own]
        if i == 0:
            names = _outside(before) + names
        if i == len(counts) - 1:
            names += _outside(after)
        out.append(names)
        start += 0 if count is None else n
    return out


def _t(index: int, count: int) -> float:
    return index / (count - 1) if count > 1 else 1.0


def _outside(ws: list[Weight]) -> list[tuple[str, float]]:
    return [(w.name, 0.0) for w in ws]
