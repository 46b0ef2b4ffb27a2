"""Tensors with two names on mergekit's path, which would merge each of them by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergelab.models import checkpoint, ties


def of(models: Sequence[Any]) -> dict[str, str]:
    """The second names of tensors that are one tensor in all models, each with the first one.

    Args:
        models: mergekit's references; the loaders of all of them are open, with adapters applied.
    """
    from mergekit.io.tasks import LoaderCache

    folders = [Path(LoaderCache().get(model).index.base_path) for model in models]
    return ties.of([checkpoint.read(folder, "", pickled=True) for folder in folders])


def planner(base: Any, tied: Mapping[str, str]) -> Any:
    """A kind of mergekit's planner that plans a tied tensor once, under its first name.

    Args:
        base: `MergePlanner`.
        tied: as `of` gives it.
    """

    class Planner(base):  # type: ignore[misc]
        def plan_tensor(self, weight: Any, weights_in: Sequence[Any], *args: Any, **options: Any) -> None:
            if weight.name in tied:
                return
            other = tuple(second for second, first in tied.items() if first == weight.name)
            if other:  # a model may hold it under the second name alone
                weights_in = [
                    w.model_copy(update={"tied_names": (*(w.tied_names or ()), *other)}) for w in weights_in
                ]
            super().plan_tensor(weight, weights_in, *args, **options)

    return Planner


def changes(config_source: Path, out: Path) -> dict[str, Any]:
    """What changes in config.json where a second name has got a tensor of its own.

    Args:
        config_source: the folder of the model whose config.json is copied.
        out: that of the merged weights.
    """
    files = [checkpoint.file_headers(file, "", "")[0] for file in out.glob("*.safetensors")]
    return dict(ties.changes(checkpoint.weights(config_source), [name for f in files for name in f]))
