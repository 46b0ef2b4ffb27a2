"""Which layers of which models become the layers of the result. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mergelab.models.moved_layers import Layers

DEFAULT = "default"
"""mergekit's name of the only module of a model."""


def stacks(recipe: Mapping[str, Any], names: list[str]) -> Iterator[tuple[str, tuple[Any, ...], list[Any]]]:
    """Name, path in the recipe, and slices of each module that is made of slices.

    Args:
        recipe: mergekit's YAML.
        names: The modules of the architecture. Slices at the top of the recipe are those of all of them.
    """
    modules = recipe.get("modules") or {}
    for name in dict.fromkeys([*names, *modules]):
        own = (modules.get(name) or {}).get("slices")
        if own:
            yield name, ("modules", name, "slices"), own
        elif recipe.get("slices") and name not in modules:
            yield name, ("slices",), recipe["slices"]


def layers(slices: list[Any], folder: Callable[[str], Path]) -> Layers:
    """The layers of the result, each as those that it is merged of; the first source of a slice comes first.

    Args:
        slices: Of one module.
        folder: From a model's reference to its folder.
    """
    return [
        [(folder(s["model"]), s["layer_range"][0] + i) for s in one["sources"]]
        for one in slices
        for i in range(one["sources"][0]["layer_range"][1] - one["sources"][0]["layer_range"][0])
    ]
