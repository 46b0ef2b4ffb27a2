"""Whether layers still compute the same in a model that is made of them, by building both without weights.

A layer is compared by everything that transformers built it with: the classes of its modules, the shapes of
their weights, their plain attributes (`use_rope`, `sliding_window`, `scaling`) and the values of their
buffers. So no key of config.json has to be known here, and what a key does is not guessed.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from mergelab.core.model_class import empty
from mergelab.models import layer_settings
from mergelab.models.json_files import write_as_read
from mergelab.models.layer_settings import Donor, Order

log = logging.getLogger(__name__)

Signature = dict[str, Any]
"""What a layer is made of, by name: classes, attributes, and the shapes of weights as tuples."""

NUMBER = re.compile(r"(^|\.)(layer_idx|layer_id|layer_index|layer_number|idx)$")
"""Attributes that are the number of a layer, by which it finds its part of the cache."""

INITIAL = re.compile(r"initializer|init_(std|range|scale|method|variance)|num_hidden_layers|^training$")
"""Attributes that are used only where weights are made anew or trained, and the number of all layers."""

OF_CONFIG = "config."
"""What the names of a config's lists start with in a signature."""

MAX_BUFFER = 1 << 20
"""Elements of a buffer up to which its values are compared."""


@dataclass
class Model:
    """A model as transformers builds it of a config."""

    config: Any
    """The whole config, as read."""
    level: Any
    """The part of it that counts the layers."""
    layers: list[Signature] = field(default_factory=list)
    saved: list[Signature] = field(default_factory=list)
    """The values of buffers that a checkpoint may hold, by layer."""
    shared: list[str] = field(default_factory=list)
    """Weights of a layer that are those of another one, too."""
    outside: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The shapes of weights that belong to no layer."""

    @property
    def depth(self) -> int:
        """The number of layers."""
        return depth(self.level)


def depth(level: Any) -> int:
    """The number of layers. Where it is worked out (of layers with two attentions, say), of what."""
    worked_out = isinstance(getattr(type(level), "num_hidden_layers", None), property)
    return int(level.num_layers if worked_out and hasattr(level, "num_layers") else level.num_hidden_layers)


def read(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """A model's config as transformers reads it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def reread(config: Any, file: Mapping[str, Any]) -> Any:
    """The config that a config.json with this content would be read as."""
    with TemporaryDirectory() as folder:
        write_as_read(Path(folder) / "config.json", dict(file))
        new = type(config).from_pretrained(folder)
    new._name_or_path = config._name_or_path  # where code that comes with the model is
    return new


def path_of_text(config: Any) -> tuple[str, ...]:
    """Where in a config the layers of the language model are counted."""
    text = config.get_text_config(decoder=True)
    return _find(config, text) or ()


def _find(config: Any, wanted: Any) -> tuple[str, ...] | None:
    if config is wanted:
        return ()
    for name in getattr(type(config), "sub_configs", {}):
        inner = getattr(config, name, None)
        if inner is not None and (below := _find(inner, wanted)) is not None:
            return (name, *below)
    return None


def at(config: Any, path: tuple[str, ...]) -> Any:
    """A part of a config."""
    for name in path:
        config = getattr(config, name)
    return config


def donor(file: Mapping[str, Any], config: Any, path: tuple[str, ...]) -> Donor:
    """What `layer_settings` asks about a model."""
    inside = file_at(file, path)
    level = at(config, path)
    return Donor(inside, level.to_dict(), depth(level))


def file_at(file: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any]:
    """The part of a config.json that counts the layers: the whole, where all keys stand at its top."""
    for name in path:
        inner = file.get(name)
        if not isinstance(inner, Mapping):
            return file
        file = inner
    return file


def _lists(level: Any) -> Iterator[tuple[str, list[Any]]]:
    """All lists of a config with an entry for each layer, also those that it works out when asked."""
    names = [*vars(level), *(n for n in dir(type(level)) if isinstance(getattr(type(level), n), property))]
    found = {}
    for name in names:
        if name.startswith("_"):
            continue
        with contextlib.suppress(Exception):  # a property may refuse for reasons of its own
            found[name] = getattr(level, name)
    found = {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}
    for key, value in layer_settings.of_each_layer(found, depth(level)):
        if not any(isinstance(v, (list, dict)) for v in value):
            yield key, value


def build(config: Any, path: tuple[str, ...], *, trust_remote_code: bool = False) -> Model:
    """Build the model of a config and describe its layers."""
    import torch
    from transformers.initialization import no_init_weights

    level = at(config, path)
    model = Model(config, level)
    name = (config.architectures or [""])[0]

    def made() -> Any:
        return empty(copy.deepcopy(config), trust_remote_code=trust_remote_code)

    try:
        with _weightless():
            built = made()
    except Exception as e:  # of every type: some buffers are worked out from large ones, which have no values
        log.info("buffers of %s are not compared: %s", name, e)
        with torch.device("meta"), no_init_weights():
            built = made()
    stacks = dict(_stacks(built, level, model.depth))
    lists = dict(_lists(level))
    for i in range(model.depth if stacks else 0):
        signature = {f"{OF_CONFIG}{k}": v[i] for k, v in lists.items()}
        saved: Signature = {}
        for stack in stacks.values():
            signature |= _signature(stack[i], model.depth)
            saved |= _saved(stack[i])
        model.layers.append(signature)
        model.saved.append(saved)
    built.tie_weights()
    model.shared = list(_shared(built, list(stacks)))
    model.outside = {
        n: tuple(p.shape)
        for n, p in built.named_parameters()
        if not any(n.startswith(f"{stack}.") for stack in stacks)
    }
    return model


@contextlib.contextmanager
def _weightless() -> Iterator[None]:
    """Make parameters and other large tensors without memory, but small buffers with their values."""
    import torch
    from torch.overrides import TorchFunctionMode
    from transformers.initialization import no_init_weights

    makers = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}
    register = torch.nn.Module.register_parameter

    class LargeOnMeta(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            options = dict(kwargs or {})
            if func in makers:
                size = options.get("size", args[:1] if args and isinstance(args[0], (tuple, list)) else args)
                flat = size[0] if len(size) == 1 and isinstance(size[0], (tuple, list)) else size
                if math.prod(n for n in flat if isinstance(n, int)) > MAX_BUFFER:
                    options["device"] = "meta"
            return func(*args, **options)

    def on_meta(module: Any, name: str, parameter: Any) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    patched = mock.patch.object(torch.nn.Module, "register_parameter", on_meta)
    with patched, LargeOnMeta(), no_init_weights(), torch.no_grad():
        yield


def _stacks(built: Any, level: Any, count: int) -> Iterator[tuple[str, Any]]:
    """The lists of modules with one for each layer, by their names."""
    from torch.nn import ModuleList

    modules = dict(built.named_modules())
    for name, module in modules.items():
        if not isinstance(module, ModuleList) or len(module) != count:
            continue
        above = [name.rsplit(".", k)[0] if k else name for k in range(1, name.count(".") + 1)] + [""]
        owner = next((m.config for m in (modules[a] for a in above) if hasattr(m, "config")), None)
        if type(owner) is type(level) and not any(r in name for r in (".experts",)):
            yield name, module


def _signature(layer: Any, count: int) -> Signature:
    """What a layer is made of. A list with an entry for each layer belongs to the model."""
    out: Signature = {}
    for name, module in layer.named_modules():
        out[name] = type(module).__name__
        inside = f"{name}." if name else ""
        own = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        for key, value in own.items():
            table = isinstance(value, (list, tuple)) and len(value) == count
            if not table and not NUMBER.search(key) and not INITIAL.search(key) and _is_plain(value):
                out[f"{inside}{key}"] = list(value) if isinstance(value, tuple) else value
        for key, p in module._parameters.items():
            out[f"{inside}{key}"] = None if p is None else tuple(p.shape)
        for key, b in module._buffers.items():
            if b is not None and key in module._non_persistent_buffers_set and _has_values(b):
                out[f"{inside}{key}"] = b.tolist()
            else:
                out[f"{inside}{key}"] = None if b is None else tuple(b.shape)
    return out


def _has_values(buffer: Any) -> bool:
    return bool(buffer.numel() <= MAX_BUFFER and buffer.device.type != "meta")


def _saved(layer: Any) -> Signature:
    return {
        f"{name}.{key}": b.tolist()
        for name, module in layer.named_modules()
        for key, b in module._buffers.items()
        if b is not None and key not in module._non_persistent_buffers_set and _has_values(b)
    }


def _shared(built: Any, stacks: list[str]) -> Iterator[str]:
    seen: dict[int, str] = {}
    for name, p in built.named_parameters(remove_duplicate=False):
        stack = next((s for s in stacks if name.startswith(f"{s}.")), None)
        if stack is None:
            continue
        layer = name.removeprefix(f"{stack}.").partition(".")[0]
        if seen.setdefault(id(p), layer) != layer:
            yield name


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


@dataclass(frozen=True)
class Difference:
    """One way in which a layer would not be what it was."""

    layer: int
    """Its number in the result."""
    name: str
    """What differs."""
    now: Any
    before: Any
    structural: bool
    """Whether its weights would not fit."""


ABSENT = "absent"


def differences(result: Model, donors: list[Model], source: int, order: Order) -> list[Difference]:
    """Everything in which layers of a result differ from those that they were taken from.

    A setting that is the same in all layers of each model is a difference between models, not one of layers;
    others tell of it. Only in layers of the source itself does it count here: there it hangs on their number.
    """
    by_layer = {n for m in (*donors, result) for n in varying(m)}
    out = []
    for layer, (d, i) in enumerate(order):
        now, before = result.layers[layer], donors[d].layers[i]
        for name in sorted({*before, *(n for n in now if not n.startswith(OF_CONFIG))}):
            a, b = now.get(name, ABSENT), before.get(name, ABSENT)
            if a != b and (d == source or name in by_layer):
                out.append(Difference(layer, name, a, b, isinstance(a, tuple) or isinstance(b, tuple)))
    return out


def varying(model: Model) -> set[str]:
    """The names that are not the same in all layers of a model."""
    first = model.layers[0] if model.layers else {}
    names = {n for layer in model.layers for n in layer}
    return {n for n in names if any(layer.get(n, ABSENT) != first.get(n, ABSENT) for layer in model.layers)}


def unsaved(result: Model, donors: list[Model], order: Order) -> Iterator[tuple[int, str]]:
    """Layers of a result, and buffers of theirs that would be made anew with other values.

    That is so where no checkpoint holds them.
    """
    for layer, (d, i) in enumerate(order):
        for name, value in donors[d].saved[i].items():
            if result.saved[layer].get(name) != value:
                yield layer, name
