"""What mergekit's planner does not know: tensors with two names, and dtypes that single tensors keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergelab.core import dtypes
from mergelab.models import checkpoint, ties


def tied_in(models: Sequence[Any]) -> dict[str, str]:
    """The second names of tensors that are one tensor in all models, each with the first one.

    Args:
        models: mergekit's references; the loaders of all of them are open, with adapters applied.
    """
    from mergekit.io.tasks import LoaderCache

    folders = [Path(LoaderCache().get(model).index.base_path) for model in models]
    return ties.of([checkpoint.read(folder, "", pickled=True) for folder in folders])


def planner(base: Any, tied: Mapping[str, str], own_dtypes: Mapping[str, str]) -> Any:
    """A kind of mergekit's planner that plans a tied tensor once, under its first name, and keeps dtypes.

    Args:
        base: `MergePlanner`.
        tied: as `tied_in` gives it.
        own_dtypes: safetensors' name of the dtype of tensors that are written in one of their own.
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
            names = (weight.name, *(weight.aliases or ()), *other)
            own = next((own_dtypes[n] for n in names if n in own_dtypes), None)
            if own is not None and weight.force_dtype is None:
                weight = weight.model_copy(update={"force_dtype": dtypes.BY_CODE[own].name})
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
