"""Keys of config.json that belong to single layers, for a model made of layers taken from others. Pure.

transformers has two kinds of such keys: lists (`layer_types`, `no_rope_layers`), and numbers from which each
layer works out what it is (`first_k_dense_replace`, `decoder_sparse_step`). A list follows its layers entry
by entry. A number is replaced by one that comes to the same in the new order, where there is one. Whether all
has followed is not decided here: `layer_modules` compares the layers themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Values = Mapping[str, Any]
Order = Sequence[tuple[int, int]]
"""For each layer of the result, the number of the model it is taken from, and its number there."""


@dataclass(frozen=True)
class Donor:
    """A model that lends layers, at the level of its config that counts them."""

    file: Values
    """As config.json has it."""
    read: Values
    """As transformers reads it: with the lists that it works out."""
    depth: int


NOT_BY_LAYER = re.compile(
    r"(token_ids?|architectures|multipliers|_limit|kernel_sizes?|mtp_.*|output_channels|channels|section)$"
)
"""Lists that mean something else, although their length may happen to be the number of layers."""

INDICES = re.compile(r"(^|_)(layers?|idxs?|ids|indices|indexes)$")
"""Lists of the numbers of those layers that have something."""

LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers")
"""Lists with an entry for each layer, of whatever model."""

FLAGS = ("no_rope_layers",)
"""What is named like such a list, and has a flag for each layer."""

FROM_ONE = ("kda_layers", "full_attn_layers")
"""Those of them that count from 1."""

PREFIX = ("first_k_dense_replace", "num_dense_layers", "num_hash_layers", "dense_mlp_idx")
"""How many of the first layers differ from the others."""

SUFFIX = ("num_kv_shared_layers",)
"""How many of the last ones do."""

NESTED = ("linear_attn_config", "sparse_attention_config", "attention_config", "attn_config")
"""Mappings inside config.json that may have such lists."""

CYCLES = ("block_types",)
"""Lists that are repeated until each layer has an entry."""


def rewritten(source: int, donors: Sequence[Donor], order: Order) -> dict[str, Any]:
    """The keys of config.json that change with the layers, with their new values.

    Args:
        source: Whose config.json the result gets.
        donors: All models that lend layers, and the source.
        order: The layers of the result.
    """
    own = donors[source]
    out: dict[str, Any] = {}
    for form in ("read", "file"):  # the file's own form of a key comes last
        values = [getattr(d, form) for d in donors]
        for key, value in values[source].items():
            new = _followed(key, value, [v.get(key) for v in values], donors, order)
            if new is not None and (new != value or key not in own.file):
                out[key] = new
    for rule in RULES:
        out |= rule(own, donors, order)
    return out


def _followed(key: str, value: Any, all_values: list[Any], donors: Sequence[Donor], order: Order) -> Any:
    """A key's value for the new order, or None if it is not one that is indexed by layer."""
    if NOT_BY_LAYER.search(key):
        return None
    if all(_is_indices(v, d, key) for v, d in zip(all_values, donors, strict=True)):
        first = int(key in FROM_ONE)
        return [n + first for n, (d, i) in enumerate(order) if i + first in all_values[d]]
    extra = [len(v) - d.depth for v, d in zip(all_values, donors, strict=True) if isinstance(v, (list, str))]
    if len(extra) == len(donors) and (isinstance(value, list) or "pattern" in key):
        # Some files go on with the entries of layers that predict further tokens.
        spare = [int(d.file.get("num_nextn_predict_layers") or 0) for d in donors]
        if all(e in (0, s) for e, s in zip(extra, spare, strict=True)):
            entries = [all_values[d][i] for d, i in order]
            tail = value[len(value) - max(0, extra[0]) :] if extra[0] > 0 else value[:0]
            return "".join(entries) + tail if isinstance(value, str) else entries + tail
    if isinstance(value, dict) and value:
        return _followed_inside(key, value, all_values, donors, order)
    return None


def _is_indices(value: Any, donor: Donor, key: str) -> bool:
    """Whether a value is a list of numbers of layers: each at most once, as no list of flags for each is."""
    first = int(key in FROM_ONE)
    return (
        isinstance(value, list)
        and INDICES.search(key) is not None
        and key not in FLAGS
        and all(type(i) is int and first <= i < donor.depth + first for i in value)
        and len(set(value)) == len(value)
    )


def _followed_inside(
    key: str, value: Values, all_values: list[Any], donors: Sequence[Donor], order: Order
) -> dict[str, Any] | None:
    """The same for a mapping: one from the numbers of layers, or one that has lists by layer in it."""
    if not all(isinstance(v, dict) for v in all_values):
        return None
    if "layer" in key and all(str(k).isdecimal() for v in all_values for k in v):
        kind = type(next(iter(value)))
        found = {n: all_values[d].get(i, all_values[d].get(str(i))) for n, (d, i) in enumerate(order)}
        return {kind(n): v for n, v in found.items() if v is not None}
    if key not in NESTED:
        return None
    inner = {k: _followed(k, v, [a.get(k) for a in all_values], donors, order) for k, v in value.items()}
    new = {k: v for k, v in inner.items() if v is not None}
    return {**value, **new} if new else None


def _members(order: Order, has: Callable[[int, int], bool]) -> list[int]:
    """The layers of the result that have something, by what says so of a donor's layer."""
    return [n for n, (d, i) in enumerate(order) if has(d, i)]


def _counts(own: Donor, donors: Sequence[Donor], order: Order) -> dict[str, Any]:
    """Numbers of first or last layers. Of the right ones if they stand together; else not all are met."""
    out = {}
    for key in (k for k in PREFIX if isinstance(own.read.get(k, own.file.get(k)), int)):
        limits = [_number(d, key) for d in donors]
        out[key] = _leading([i < limits[d] for d, i in order])
    for key in (k for k in SUFFIX if isinstance(own.read.get(k), int)):
        starts = [d.depth - _number(d, key) for d in donors]
        out[key] = _leading([i >= starts[d] for d, i in reversed(order)])
    return {k: v for k, v in out.items() if v != own.file.get(k, own.read.get(k))}


def _number(d: Donor, key: str) -> int:
    return int(d.read.get(key, d.file.get(key)) or 0)


def _leading(flags: list[bool]) -> int:
    return flags.index(False) if False in flags else len(flags)


def _sparse_steps(own: Donor, donors: Sequence[Donor], order: Order) -> dict[str, Any]:
    """Qwen's mixtures: dense layers are listed, and besides only every so many layers is sparse."""
    if "decoder_sparse_step" not in own.read or "mlp_only_layers" not in own.read:
        return {}

    def dense(d: int, i: int) -> bool:
        step = int(donors[d].read.get("decoder_sparse_step") or 1)
        return i in (donors[d].read.get("mlp_only_layers") or []) or (i + 1) % step != 0

    new = {"mlp_only_layers": _members(order, dense), "decoder_sparse_step": 1}
    if new["mlp_only_layers"] == (own.read["mlp_only_layers"] or []) and own.read["decoder_sparse_step"] == 1:
        return {}
    return new


def _periods(own: Donor, donors: Sequence[Donor], order: Order) -> dict[str, Any]:
    """Jamba: the layers whose number, divided by a period, leaves an offset."""
    out: dict[str, Any] = {}
    for what in ("attn", "expert"):
        keys = f"{what}_layer_period", f"{what}_layer_offset"
        if not all(isinstance(d.read.get(k), int) for d in donors for k in keys):
            continue
        by = [(int(d.read[keys[0]]), int(d.read[keys[1]])) for d in donors]
        wanted = _members(order, lambda d, i, by=by: i % by[d][0] == by[d][1])  # type: ignore[misc]
        n = len(order)
        pairs = [by[0], *((p, o) for p in range(1, n + 2) for o in range(p))]
        fits = (pair for pair in pairs if [i for i in range(n) if i % pair[0] == pair[1]] == wanted)
        if found := next(fits, None):
            out |= dict(zip(keys, found, strict=True))
    return out


def _intervals(own: Donor, donors: Sequence[Donor], order: Order) -> dict[str, Any]:
    """Ernie: every so many layers between a first and a last one."""
    keys = "moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index"
    if not all(isinstance(d.read.get(k), int) for d in donors for k in keys):
        return {}

    def sparse(d: int, i: int) -> bool:
        step, first, last = (donors[d].read[k] for k in keys)
        return bool((i + 1) % step == 0 and first <= i <= (donors[d].depth - 1 if last == -1 else last))

    n, wanted = len(order), _members(order, sparse)
    if not wanted:
        return dict(zip(keys, (1, n, n), strict=True))
    first, last = wanted[0], wanted[-1]
    for step in range(1, n + 1):
        if [i for i in range(first, last + 1) if (i + 1) % step == 0] == wanted:
            return dict(zip(keys, (step, first, last), strict=True))
    return {}


def _cycles(own: Donor, donors: Sequence[Donor], order: Order) -> dict[str, Any]:
    """Lists that are repeated, written out."""
    return {
        key: [(donors[d].read[key] * donors[d].depth)[i] for d, i in order]
        for key in CYCLES
        if all(d.read.get(key) for d in donors)
    }


def _attention_types(own: Donor, donors: Sequence[Donor], order: Order) -> dict[str, Any]:
    """GPT-Neo: lists of kinds, each with the number of times that it is repeated."""
    if not all(isinstance(d.read.get("attention_layers"), list) for d in donors):
        return {}
    return {"attention_types": [[[donors[d].read["attention_layers"][i]], 1] for d, i in order]}


RULES: tuple[Callable[[Donor, Sequence[Donor], Order], dict[str, Any]], ...] = (
    _counts, _sparse_steps, _periods, _intervals, _cycles, _attention_types,
)  # fmt: skip


def windows(config: Values) -> list[int | None]:
    """The attention window of each layer of a dense model of which mixtures are built; None: all tokens."""
    depth = int(config.get("num_hidden_layers") or 0)
    kind = config.get("model_type")
    width = config.get("sliding_window", 4096)
    if kind == "mistral":
        return [width] * depth
    if kind not in ("qwen2", "qwen3") or not config.get("use_sliding_window"):
        return [None] * depth
    types = config.get("layer_types")
    if types:
        return [width if t == "sliding_attention" else None for t in types]
    return [width if i >= config.get("max_window_layers", 28) else None for i in range(depth)]


def of_each_layer(values: Values, depth: int) -> Iterator[tuple[str, list[Any]]]:
    """The keys of a config, as read, that have an entry for each layer."""
    for key, value in values.items():
        if not isinstance(value, list) or len(value) != depth or NOT_BY_LAYER.search(key):
            continue
        if not _is_indices(value, Donor(values, values, depth), key):
            yield key, value
