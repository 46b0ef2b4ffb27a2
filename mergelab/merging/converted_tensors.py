"""Tensors that a checkpoint holds in another form than the model, where layers are not all alike.

mergekit converts a mixture's experts, which lie apart on the hub, to the packed ones of the model. But a
tensor that not every layer has is optional to it, and an optional one it looks for by the packed name only:
the experts of a model with some dense layers would be left out. And its lists for mixtures know no dense
layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergelab.models import blueprint, checkpoint
from mergelab.models.architecture import LAYER
from mergelab.recipes import tensor_list


def architecture(config: Any, options: Any) -> Any:
    """mergekit's architecture of a merge: its list, or an inferred one where that does not fit."""
    from mergekit.architecture import get_architecture_info
    from mergekit.architecture.auto import infer_architecture_info

    models = config.referenced_models()
    source = config.base_model or models[0]
    if tensor_list.why_not_mergekit(checkpoint.read(Path(source.model.path), "", pickled=True)):
        return infer_architecture_info(tuple(models), config.base_model, options)
    return get_architecture_info(config, options)


def planner(base: Any, models: Sequence[Any]) -> Any:
    """A kind of mergekit's planner that finds tensors under the names and in the form of the checkpoint.

    Args:
        base: `MergePlanner`.
        models: mergekit's references; the loaders of all of them are open.
    """
    own = {model: _own_names(model) for model in models}

    class Planner(base):  # type: ignore[misc]
        def plan_tensor(
            self, weight: Any, weights_in: Sequence[Any], models: Any, *args: Any, **options: Any
        ) -> None:
            if len(weights_in) != len(models):  # what lies behind the layers is counted by the first slice
                weights_in = [weight] * len(models)
            inputs = list(zip(models, weights_in, strict=True))
            if weight.optional and any(w.name in own[m] or _converts(m, w.name) for m, w in inputs):
                weight = weight.model_copy(update={"optional": False})
            new = [
                w.model_copy(update={"aliases": (*(w.aliases or ()), own[m][w.name])})
                if w.name in own[m]
                else w
                for m, w in inputs
            ]
            super().plan_tensor(weight, new, models, *args, **options)

    return Planner


def _own_names(model: Any) -> dict[str, str]:
    """The name in a model's checkpoint of each tensor of the model that has another one there."""
    from mergekit.io.tasks import LoaderCache

    folder = Path(LoaderCache().get(model).index.base_path)
    found = blueprint.of(checkpoint.read(folder, "", pickled=True))
    return {own: name for name, own in found.names.items()} if found else {}


def _converts(model: Any, name: str) -> bool:
    """Whether a model's checkpoint has a tensor of the model only in another form."""
    from mergekit.architecture.conversion import can_convert_checkpoint_keys
    from mergekit.io.tasks import LoaderCache

    names = LoaderCache().get(model).index.tensor_paths
    layer = LAYER.search(name)
    if name in names:
        return False
    same = {n for n in names if (layer[0] in n if layer else not LAYER.search(n))}
    kind = model.config(trust_remote_code=LoaderCache().trust_remote_code).model_type
    return bool(can_convert_checkpoint_keys(kind, same, name))
