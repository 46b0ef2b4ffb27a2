"""The parts of a model that are compared separately: layers, groups of layers, kinds of tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from operator import add
from typing import TypeVar

from mergelab.analysis.statistics import Statistics
from mergelab.models.architecture import LAYER

Key = TypeVar("Key", bound=Hashable)

THIRDS = 3

EMBEDDINGS, HEAD = "embeddings", "head"

ORDER = (
    "embed",
    "lm_head",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "self_attn",
    "gate",
    "up_proj",
    "down_proj",
)
"""Parts of the kinds' names, in the order of computation; the head beside the embeddings."""

NORMS, BIASES = "norms", "biases"
"""Kinds of vectors. Norms start at one in every model, so they make unrelated models look related."""


def layer(tensor: str) -> int | None:
    """The layer that a tensor belongs to; None for embeddings, the final norm and the head."""
    found = LAYER.search(tensor)
    return int(found[1]) if found else None


def kind(tensor: str) -> str:
    """The kind of a tensor, which is the same in all layers: `self_attn.q_proj`, `embed_tokens`, `norms` ...

    The experts of a mixture are one kind.
    """
    if "norm" in tensor.lower():
        return NORMS
    if tensor.endswith(".bias"):
        return BIASES
    rest = LAYER.split(tensor, maxsplit=1)[-1]
    return re.sub(r"\.\d+\.", ".*.", rest).removesuffix(".weight").removeprefix("model.")


@dataclass(frozen=True)
class Comparison:
    """A base and experts, tensor by tensor."""

    experts: tuple[str, ...]
    top: float | None
    """The share of a tensor's entries that counts as its largest; None if only distances were measured."""
    tensors: Mapping[str, Statistics]
    cut: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Tensors with different numbers of rows: the rows that were compared, which all models have, and the
    largest number of rows."""
    left_out: tuple[str, ...] = ()
    """Tensors that some models lack or have in another shape."""

    @cached_property
    def whole(self) -> Statistics:
        """Statistics of all tensors."""
        return reduce(add, self.tensors.values())

    @cached_property
    def matrices(self) -> Comparison:
        """The comparison without norms and biases; unchanged if there is nothing else."""
        found = {name: s for name, s in self.tensors.items() if kind(name) not in (NORMS, BIASES)}
        return replace(self, tensors=found or self.tensors)

    @cached_property
    def layers(self) -> dict[int, Statistics]:
        """Statistics by layer."""
        return dict(sorted(self._by(layer).items()))

    @cached_property
    def groups(self) -> dict[str, Statistics]:
        """Statistics of embeddings, first, middle and last third of the layers, and head with final norm."""
        ends = list(self._thirds.values())
        found = self._by(lambda tensor: self._group(layer(tensor), tensor))
        return {name: found[name] for name in (EMBEDDINGS, *dict.fromkeys(ends), HEAD) if name in found}

    @cached_property
    def kinds(self) -> dict[str, Statistics]:
        """Statistics by kind of tensor: outer ones first, then a layer's in the order of computation."""
        found = self._by(kind)
        last = (NORMS, BIASES)
        return {k: found[k] for k in sorted(found, key=lambda k: (k in last, "." in k, _order(k)))}

    def _group(self, number: int | None, tensor: str) -> str:
        if number is None:
            return EMBEDDINGS if "embed" in tensor else HEAD
        return self._thirds[number]

    @cached_property
    def _thirds(self) -> dict[int, str]:
        """The name of each layer's group."""
        numbers = sorted({n for n in map(layer, self.tensors) if n is not None})
        parts = min(THIRDS, len(numbers))
        cuts = [numbers[i * len(numbers) // parts : (i + 1) * len(numbers) // parts] for i in range(parts)]
        return {n: _range(part) for part in cuts for n in part}

    def _by(self, key: Callable[[str], Key | None]) -> dict[Key, Statistics]:
        out: dict[Key, Statistics] = {}
        for name, sums in self.tensors.items():
            k = key(name)
            if k is not None:
                out[k] = out[k] + sums if k in out else sums
        return out


def _range(numbers: Sequence[int]) -> str:
    first, last = numbers[0], numbers[-1]
    return f"layer {first}" if first == last else f"layers {first}–{last}"


def _order(kind: str) -> int:
    """The position of a kind in ORDER; unknown kinds come last."""
    return next((i for i, part in enumerate(ORDER) if part in kind), len(ORDER))
