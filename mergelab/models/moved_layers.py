"""What becomes of config.json where a model is made of layers of others, and what cannot follow them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergelab.core.findings import first_few
from mergelab.core.hashing import folder_stamp, stamp
from mergelab.core.library_output import silence_libraries
from mergelab.core.remembered import remembered
from mergelab.core.run_dir import read_json
from mergelab.models import checkpoint, layer_settings
from mergelab.models.layer_settings import Donor, Order

log = logging.getLogger(__name__)

Layers = Sequence[Sequence[tuple[Path, int]]]
"""For each layer of the result, the layers of models that it is merged of. The first one's settings count."""

PLAIN = {"gemma", "llama", "mistral", "mixtral", "qwen2", "qwen3"}
"""Model types whose layers are all alike, unless their config.json has a list that says otherwise."""

DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_blocks")
"""Names of the number of layers. A file may have several."""

LINE = 300
"""Characters of a message that are shown."""

MOVED, UNLIKE, UNFIT = "moved", "unlike", "unfit"
"""Kinds of problems: a setting does not follow its layer, the sources of a layer disagree about one, and the
result cannot be built."""


def moved(
    source: Path, layers: Layers, *, key: str | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """How config.json follows the layers.

    Args:
        source: The model whose config.json the result gets.
        layers: The layers of the result.
        key: Where the layers are counted, such as `text_config.num_hidden_layers`. None: in the config of the
            language model.
        trust_remote_code: Whether code that comes with the models may run.

    Returns:
        `changes`: new values by key, as in `text_config.layer_types`. `problems`: what cannot follow, each
        with `kind` and `message`.
    """
    folders = list(dict.fromkeys([source, *(folder for sources in layers for folder, _ in sources)]))
    files = [read_json(folder / "config.json") for folder in folders]
    numbers = [[(folders.index(folder), i) for folder, i in sources] for sources in layers]
    if plain := _plain(files, [sources[0] for sources in numbers]):
        return plain

    def answer() -> dict[str, Any]:
        with silence_libraries():
            return _asked(folders, files, numbers, key, trust_remote_code)

    if any("auto_map" in file for file in files):
        return answer()
    code = [stamp(Path(__file__).with_name(f"{name}.py")) for name in ("layer_settings", "layer_modules")]
    names = [[str(folder), folder_stamp(folder)] for folder in folders]  # the weights may hold buffers
    return remembered("layers", [names, files, numbers, key, code], answer)


def _plain(files: list[dict[str, Any]], order: Order) -> dict[str, Any] | None:
    """The answer for models whose layers are all alike, which needs no library; else None."""
    alike = []
    for file in files:
        depth = file.get("num_hidden_layers")
        if (
            file.get("model_type") not in PLAIN
            or file.get("use_sliding_window")
            or not isinstance(depth, int)
        ):
            return None
        lists = dict(layer_settings.of_each_layer(file, depth))
        if any(v.count(v[0]) < depth for v in lists.values()):
            return None
        alike.append(
            {k: v[0] for k, v in lists.items()} | {k: v for k, v in file.items() if "per_layer" in k}
        )
    if any(values != alike[0] for values in alike) or "per_layer_config" in alike[0]:
        return None
    donors = [Donor(file, file, file["num_hidden_layers"]) for file in files]
    changes = {"num_hidden_layers": len(order), **layer_settings.rewritten(0, donors, order)}
    return {"changes": changes, "problems": []}


def _asked(
    folders: list[Path],
    files: list[dict[str, Any]],
    layers: list[list[tuple[int, int]]],
    key: str | None,
    trust: bool,
) -> dict[str, Any]:
    from mergelab.models import layer_modules

    order = [sources[0] for sources in layers]
    configs = [layer_modules.read(folder, trust_remote_code=trust) for folder in folders]
    path = tuple(key.split(".")[:-1]) if key else layer_modules.path_of_text(configs[0])
    donors = [layer_modules.donor(f, c, path) for f, c in zip(files, configs, strict=True)]
    level = layer_modules.at(configs[0], path)

    def rewritten(order: Order) -> dict[str, Any]:
        return _with_depth(donors[0], level, order) | layer_settings.rewritten(0, donors, order)

    changes = rewritten(order)
    nested = layer_modules.file_at(files[0], path) is not files[0]
    dotted = {".".join([*path * nested, k]): v for k, v in changes.items()}
    problems: list[dict[str, str]] = []
    try:
        built = [layer_modules.build(c, path, trust_remote_code=trust) for c in configs]
    except Exception as e:  # transformers raises exceptions of every type for a config that it cannot use
        log.warning("layers are not compared: %s", _line(e))
        return {"changes": dotted, "problems": problems}
    for folder, model in zip(folders, built, strict=True):
        if not model.layers:
            return {
                "changes": dotted,
                "problems": [_problem(UNFIT, f"which modules of {folder} are its layers is not clear")],
            }
    names = [str(folder) for folder in folders]
    for d, i in (one for sources in layers for one in sources):
        if i >= built[d].depth:
            message = f"layer {i} of {names[d]}, which has {built[d].depth} layers there"
            return {"changes": dotted, "problems": [_problem(UNFIT, message)]}

    def made(order: Order, changes: Mapping[str, Any]) -> layer_modules.Model:
        config = layer_modules.reread(configs[0], _changed(files[0], path, nested, changes))
        return layer_modules.build(config, path, trust_remote_code=trust)

    try:
        result = made(order, changes)
        if result.depth != len(order):
            raise ValueError(f"it would have {result.depth} layers instead of {len(order)}")
    except Exception as e:  # as above
        log.exception("no model of these layers")
        message = f"transformers cannot build a model of these layers: {_line(e)}"
        return {"changes": dotted, "problems": [_problem(UNFIT, message)]}
    problems += _differences(layer_modules.differences(result, built, 0, order), order, names)
    if not problems:
        problems += _unsaved(layer_modules.unsaved(result, built, order), order, folders)
        problems += _outside(result, built, order, rewritten, made)
    problems += _unlike(built, layers, names)
    return {"changes": dotted, "problems": problems}


def _problem(kind: str, message: str) -> dict[str, str]:
    return {"kind": kind, "message": message}


def _line(e: BaseException) -> str:
    """An exception's message on one line: those of transformers begin with the name of the rule."""
    text = " ".join(str(e).split()) or type(e).__name__
    return text if len(text) < LINE else f"{text[:LINE]}..."


def _with_depth(own: Donor, level: Any, order: Order) -> dict[str, Any]:
    """The number of layers, under each name that the file has for it."""
    mapped = (level.attribute_map or {}).get("num_hidden_layers", "num_hidden_layers")
    names = [n for n in dict.fromkeys((mapped, *DEPTHS)) if own.file.get(n) == own.depth] or [mapped]
    return dict.fromkeys(names, len(order))


def _changed(
    file: Mapping[str, Any], path: tuple[str, ...], nested: bool, changes: Mapping[str, Any]
) -> dict[str, Any]:
    out = copy.deepcopy(dict(file))
    part = out
    for name in path if nested else ():
        part = part[name]
    part.update(copy.deepcopy(dict(changes)))
    return out


def _differences(found: Iterable[Any], order: Order, names: list[str]) -> list[dict[str, str]]:
    """One problem for each kind of difference: settings, and weights that would not fit."""
    found = list(found)
    for kind, few in ((UNFIT, [d for d in found if d.structural]), (MOVED, found)):
        if few:
            first = few[0].layer
            d, i = order[first]
            what = first_few(f"{f.name}={f.now} instead of {f.before}" for f in few if f.layer == first)
            layers = len({f.layer for f in few})
            more = f", and {layers - 1:,} more layers differ" if layers > 1 else ""
            message = f"layer {first}, which is layer {i} of {names[d]}, would have {what}{more}"
            return [_problem(kind, message)]
    return []


def _unlike(built: list[Any], layers: list[list[tuple[int, int]]], names: list[str]) -> list[dict[str, str]]:
    """The first layer whose sources disagree about a setting of layers."""
    from mergelab.models.layer_modules import ABSENT, varying

    by_layer = sorted({n for model in built for n in varying(model)})
    for n, sources in enumerate(layers):
        (d, i), *others = sources
        for e, j in others:
            one, other = built[d].layers[i], built[e].layers[j]
            unlike = [k for k in by_layer if one.get(k, ABSENT) != other.get(k, ABSENT)]
            if unlike:
                what = first_few(f"{k}={one.get(k, ABSENT)} and {other.get(k, ABSENT)}" for k in unlike)
                message = (
                    f"layer {n} is merged of layer {i} of {names[d]} and layer {j} of {names[e]}: {what}"
                )
                return [_problem(UNLIKE, message)]
    return []


def _unsaved(found: Iterable[tuple[int, str]], order: Order, folders: list[Path]) -> list[dict[str, str]]:
    """The first buffer that is worked out from a layer's number, and that no file holds."""
    for layer, name in found:
        d, i = order[layer]
        if not any(n.endswith(f".{i}.{name}") for n in checkpoint.weights(folders[d]).tensors):
            message = (
                f"{name} of layer {layer}, which is layer {i} of {folders[d]}, is worked out from its number"
            )
            return [_problem(MOVED, message)]
    return []


def _outside(
    result: Any,
    built: list[Any],
    order: Order,
    rewritten: Callable[[Order], dict[str, Any]],
    made: Callable[[Order, Mapping[str, Any]], Any],
) -> list[dict[str, str]]:
    """Weights that have a part for each layer, or that are those of several: no merge moves these."""
    own = built[0]
    if [i for _, i in order] == list(range(own.depth)) or own.depth == 1:
        return []
    if shared := [n for model in built for n in model.shared]:
        return [_problem(UNFIT, f"{first_few(shared)} are those of another layer, too")]
    if len(order) == own.depth:
        try:
            fewer = [(0, i) for i in range(own.depth - 1)]
            result = made(fewer, rewritten(fewer))
        except Exception as e:  # transformers raises exceptions of every type for a config that it cannot use
            log.info("no model with fewer layers: %s", _line(e))
            return []
    names = {**own.outside, **result.outside}
    wrong = [n for n in names if own.outside.get(n) != result.outside.get(n)]
    return [_problem(UNFIT, f"{first_few(wrong)}: it has a part for each layer")] if wrong else []
