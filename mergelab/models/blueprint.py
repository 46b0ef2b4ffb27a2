"""What a checkpoint has to hold: the model that transformers makes of its config.json.

The names in a file are not always those of the model (a mixture's experts lie apart on the hub and are
packed in the model), some tensors of a file are not weights (masks, indices), and one tensor may have two
names. transformers knows all of this, so it is asked, with the headers alone and on the meta device. For the
common dense decoders a table says the same without importing it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from mergelab.core.remembered import remembered
from mergelab.models import architecture
from mergelab.models.checkpoint import ModelMetadata

TABLED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
"""Model types whose defaults the table of shapes knows."""

DAMAGED = {"missing-file", "missing-tensor", "corrupt", "unreadable", "quantized"}
"""Codes of findings about a folder whose headers are not those of all its weights."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Blueprint:
    """A checkpoint beside transformers' model of its config.json."""

    parameters: Mapping[str, Shape]
    """Shape of each weight of the model under the model's own name; the floating-point buffers that a
    checkpoint holds are among them."""
    names: Mapping[str, str] = field(default_factory=dict)
    """The model's own name of a tensor of the file, where it is another one."""
    packed: frozenset[str] = frozenset()
    """Tensors of the file that are converted: several become one, or one becomes several."""
    left_out: frozenset[str] = frozenset()
    """Tensors of the file that are not weights: masks, indices, and what the model's class ignores."""
    indices: frozenset[str] = frozenset()
    """Those of them that the model needs all the same, such as the experts that a router gives to a token."""
    ties: Mapping[str, str] = field(default_factory=dict)
    """By the model's own names, each weight that is another one under a second name, and that one."""
    vocabulary: Mapping[str, int] = field(default_factory=dict)
    """By the model's own names, the axis that has an entry for each token."""
    missing: tuple[str, ...] = ()
    """The model's own names of weights that the file does not give."""
    unpooled: tuple[str, ...] = ()
    """Those of a pooling layer that the file does not give and the class can do without."""
    unexpected: tuple[str, ...] = ()
    """Tensors of the file of which the model makes nothing."""
    mismatched: tuple[tuple[str, Shape, Shape], ...] = ()
    """(the model's own name, shape by the file, shape by config.json)"""
    problem: str = ""
    """Why transformers cannot make a model of config.json; all else is then empty."""

    def own(self, name: str) -> str:
        """The model's own name of a tensor of the file."""
        return self.names.get(name, name)

    def canonical(self, name: str) -> str:
        """The model's own name of a tensor of the file; of tied ones that of the one that is stored."""
        own = self.own(name)
        return self.ties.get(own, own)

    def vocabulary_axis(self, name: str) -> int | None:
        """The axis of a tensor of the file that has an entry for each token, or None."""
        return None if name in self.packed else self.vocabulary.get(self.own(name))


@lru_cache(maxsize=32)
def of(metadata: ModelMetadata) -> Blueprint | None:
    """The blueprint of a model folder.

    None where nothing can be said: there is no folder yet, config.json or headers could not be read, or the
    model's class is not one of transformers' own.
    """
    if not metadata.folder.parts or not has_all_headers(metadata):
        return None
    return _from_table(metadata) or _ask(metadata)


def has_all_headers(metadata: ModelMetadata) -> bool:
    """Whether config.json and the headers of all weights could be read."""
    damaged = any(f.code in DAMAGED for f in metadata.findings)
    return bool(metadata.config and metadata.tensors) and not damaged


def _ask(metadata: ModelMetadata) -> Blueprint | None:
    headers = {n: (t.dtype, t.shape) for n, t in metadata.tensors.items()}

    def answer() -> dict[str, Any]:
        from mergelab.models import transformers_blueprint

        return transformers_blueprint.blueprint(metadata.folder, headers)

    found = remembered("blueprint", [metadata.config, headers], answer)
    if found.get("unknown"):
        return None

    def shapes(of: Mapping[str, list[int]]) -> dict[str, Shape]:
        return {n: tuple(s) for n, s in of.items()}

    return Blueprint(
        parameters=shapes(found["parameters"]),
        names=found["names"],
        packed=frozenset(found["packed"]),
        left_out=frozenset(found["left_out"]),
        indices=frozenset(found["indices"]),
        ties=found["ties"],
        vocabulary=found["vocabulary"],
        missing=tuple(found["missing"]),
        unpooled=tuple(found["unpooled"]),
        unexpected=tuple(found["unexpected"]),
        mismatched=tuple((n, tuple(a), tuple(b)) for n, a, b in found["mismatched"]),
        problem=found["problem"],
    )


def _from_table(metadata: ModelMetadata) -> Blueprint | None:
    """The blueprint of a whole dense decoder by the table of shapes; None where that does not settle it."""
    config = metadata.config
    if config.get("model_type") not in TABLED:
        return None
    shapes = architecture.shapes(config)
    own = {n: t.shape for n, t in metadata.tensors.items()}
    frequencies = {n for n in own if n.endswith("rotary_emb.inv_freq")}
    if shapes is None or own.keys() - frequencies != shapes.keys():
        return None
    if any(own[n] != shape for n, shape in shapes.items()):
        return None
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    tied = architecture.tied(config)
    parameters = shapes | ({head: shapes[embedding]} if tied else {})
    return Blueprint(
        parameters,
        left_out=frozenset(frequencies),
        ties={head: embedding} if tied else {},
        vocabulary={embedding: 0, head: 0},
    )
