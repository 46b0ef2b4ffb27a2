"""Whether a mergekit YAML file is one: its keys, their types, and what fits together. Pure.

mergekit ignores keys that it does not know; here each is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergelab.core.dtypes import MERGEABLE, plain_name
from mergelab.core.errors import InputError, did_you_mean, none_of
from mergelab.core.findings import Finding, error
from mergelab.recipes.recipe import models, setting
from mergelab.recipes.recipe_groups import KeyOf

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
SLICE = ("sources", "base_model", "parameters")
SOURCE = ("model", "layer_range", "parameters")
MODULE = ("slices", "models", "parameters")
TOKENIZER = ("source", "tokens", "pad_to_multiple_of")


def file_place(file: str) -> KeyOf:
    """Keys as they stand in a user's YAML: `my.yaml: models[0].parameters.t`."""

    def place(path: tuple[Any, ...]) -> str:
        text = ""
        for p in path:
            text += f"[{p}]" if isinstance(p, int) else f".{p}" if text else str(p)
        return f"{file}: {text}" if text else file

    return place


def check(recipe: Any, place: KeyOf) -> list[Finding]:
    """Unknown keys, wrong types, and which of models, slices and modules is there."""
    if not isinstance(recipe, dict):
        return [error("structure", place(()), "it is not a mapping, so it is not a mergekit configuration")]
    out = list(_keys(recipe, TOP, (), place))
    if not isinstance(recipe.get("merge_method"), str):
        out.append(error("structure", place(("merge_method",)), "it has to name a merge method"))
    for k in ("base_model", "tokenizer_source", "chat_template", "dtype", "out_dtype"):
        if not isinstance(recipe.get(k), str | None):
            out.append(error("structure", place((k,)), f"{recipe[k]!r} is not text"))
    for k in ("dtype", "out_dtype"):
        name = plain_name(recipe.get(k) or MERGEABLE[0])
        if name not in MERGEABLE:
            out.append(error("dtype", place((k,)), none_of(name, MERGEABLE)))
    out += _one_form(recipe, ("models", "slices", "modules"), (), place)
    out += _check_tokenizer(recipe, place)
    out += _check_models(recipe.get("models"), ("models",), place)
    out += _check_slices(recipe.get("slices"), ("slices",), place)
    modules = recipe.get("modules")
    if not isinstance(modules, dict | None):
        out.append(error("structure", place(("modules",)), "it has to map names to modules"))
    for name, m in (modules if isinstance(modules, dict) else {}).items():
        path = ("modules", name)
        if not isinstance(m, dict):
            out.append(error("structure", place(path), "it has to be a mapping"))
            continue
        out += _keys(m, MODULE, path, place)
        out += _one_form(m, ("models", "slices"), path, place)
        out += _check_models(m.get("models"), (*path, "models"), place)
        out += _check_slices(m.get("slices"), (*path, "slices"), place)
    return out


def _one_form(
    node: Mapping[str, Any], forms: tuple[str, ...], path: tuple[Any, ...], place: KeyOf
) -> Iterator[Finding]:
    there = [k for k in forms if node.get(k)]
    if len(there) != 1:
        has = " and ".join(there) if there else "none of them"
        yield error("structure", place(path), f"it needs one of {', '.join(forms)}; it has {has}")


def _check_tokenizer(recipe: Mapping[str, Any], place: KeyOf) -> Iterator[Finding]:
    tokenizer, source = recipe.get("tokenizer"), recipe.get("tokenizer_source")
    if tokenizer is not None and source is not None:
        yield error("structure", place(("tokenizer",)), "it stands beside tokenizer_source; keep one")
    if not isinstance(tokenizer, dict | None):
        yield error("structure", place(("tokenizer",)), "it has to be a mapping with `source`")
        return
    yield from _keys(tokenizer or {}, TOKENIZER, ("tokenizer",), place)
    path: tuple[str, ...] = ("tokenizer_source",) if tokenizer is None else ("tokenizer", "source")
    named = source if tokenizer is None else tokenizer.get("source")
    known = ("union", "base", *models(recipe))
    if named is not None and named not in known:
        yield error("structure", place(path), f"'{named}' is none of {', '.join(known)}")
    tokens = (tokenizer or {}).get("tokens")
    if not isinstance(tokens, dict | None):
        yield error("structure", place(("tokenizer", "tokens")), "it has to map tokens to their sources")
        return
    for token, spec in (tokens or {}).items():
        origin = spec.get("source") if isinstance(spec, dict) else spec
        model = origin.get("model") if isinstance(origin, dict) else origin
        if model is not None and model not in known[2:]:
            at = place(("tokenizer", "tokens", token))
            yield error("structure", at, f"'{model}' is not a model of this merge: {', '.join(known[2:])}")


def _keys(
    node: Mapping[str, Any], known: tuple[str, ...], path: tuple[Any, ...], place: KeyOf
) -> Iterator[Finding]:
    for k in node:
        if k not in known:
            yield error(
                "unknown-key",
                place((*path, k)),
                f"mergekit does not know this key.{did_you_mean(str(k), known)}",
                f"Known here: {', '.join(known)}.",
            )
    parameters = node.get("parameters")
    if not isinstance(parameters, dict | None):
        yield error("structure", place((*path, "parameters")), "it has to map parameters to settings")
        return
    for p, value in (parameters or {}).items():
        try:
            setting(value, "")
        except InputError as e:
            inside, _, message = str(e).partition(": ")
            yield error("setting", place((*path, "parameters", p)) + inside, message)


def _check_models(items: Any, path: tuple[Any, ...], place: KeyOf) -> Iterator[Finding]:
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


def _check_slices(items: Any, path: tuple[Any, ...], place: KeyOf) -> Iterator[Finding]:
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
