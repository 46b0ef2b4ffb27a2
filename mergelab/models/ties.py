"""Tensors that have two names: a head that is the embedding.

A checkpoint may hold such a tensor under one of its names or, in two equal copies, under both. It is one
tensor all the same: merged once, under the embedding's name, with one random mask, and with the settings
whose filters name the embedding. Where the copies differ, transformers (5) loads both, whatever config.json
says, and then they are two tensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from mergelab.core.findings import Finding, warning
from mergelab.core.hashing import stamp
from mergelab.models import architecture, blueprint
from mergelab.models.checkpoint import ModelMetadata, TensorInfo

BLOCK = 1 << 24


def names(metadata: ModelMetadata) -> dict[str, str]:
    """The second names of tensors, each with the first one, as transformers ties them by config.json.

    They are names as they are in the file.
    """
    found = blueprint.of(metadata)
    if found is not None and not found.problem:
        here = {found.own(name): name for name in metadata.tensors}
        return {here.get(s, s): here.get(f, f) for s, f in found.ties.items()}
    if not metadata.config or not architecture.tied(metadata.text_config):
        return {}
    listed = {w.name: w for w in architecture.weights(metadata.config, layers=0) or ()}
    return {w.name: first for w in listed.values() for first in w.tied if first in listed}


def of(models: Collection[ModelMetadata]) -> dict[str, str]:
    """The second names of tensors that are one tensor in all of these models, each with the first one.

    Reads two tensors of a model that holds both, the first time that it is asked.
    """
    found = [names(m) for m in models]
    return {
        second: first
        for second, first in (found[0] if found else {}).items()
        if all(own.get(second) == first for own in found) and all(_alike(m, second, first) for m in models)
    }


def changes(config_source: ModelMetadata, written: Collection[str]) -> dict[str, bool]:
    """What changes in config.json where a merged model has a tensor of its own under a second name."""
    return {"tie_word_embeddings": False} if {*names(config_source)} & {*written} else {}


def check(metadata: ModelMetadata, key: str) -> Iterator[Finding]:
    """Tell which tensors are not one, although config.json ties them."""
    for second, first in names(metadata).items():
        if not _alike(metadata, second, first):
            yield warning(
                "tied-differ",
                key,
                f"{second} differs from {first}, although {metadata.folder / 'config.json'} ties them. "
                "transformers loads both, so they are merged as two tensors, and the merged model has "
                "tie_word_embeddings=false",
                "Remove the one that does not belong to the model.",
            )


def _alike(metadata: ModelMetadata, second: str, first: str) -> bool:
    """Whether a model does not hold two different tensors under these names."""
    both = [metadata.tensors.get(name) for name in (second, first)]
    a, b = both
    if a is None or b is None or not a.file:
        return True
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if metadata.pickled:
        return _same_pickled((a.file, second), (b.file, first), _stamps(a, b))
    return _same_bytes((a.file, second), (b.file, first), _stamps(a, b))


def _stamps(*tensors: TensorInfo) -> tuple[int, ...]:
    return tuple(n for t in tensors for n in stamp(Path(t.file)))


@lru_cache(maxsize=256)
def _same_bytes(a: tuple[str, str], b: tuple[str, str], stamps: tuple[int, ...]) -> bool:
    """Whether two tensors of safetensors files, of one dtype and shape, have the same bytes.

    Args:
        a, b: a file and the tensor's name in it.
        stamps: of both files, as they are now.
    """
    (one, start, size), (other, place, _) = _position(*a), _position(*b)
    if size == 0 or (one, start) == (other, place):
        return True
    with Path(one).open("rb") as left, Path(other).open("rb") as right:
        left.seek(start)
        right.seek(place)
        sizes = (min(BLOCK, size - at) for at in range(0, size, BLOCK))
        return all(left.read(n) == right.read(n) for n in sizes)


def _position(file: str, name: str) -> tuple[str, int, int]:
    """The file in which a tensor is, its first byte there, and how many it has."""
    with Path(file).open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: Mapping[str, Mapping[str, list[int]]] = json.loads(stream.read(length))
    start, end = header[name]["data_offsets"]
    return file, 8 + length + start, end - start


@lru_cache(maxsize=256)
def _same_pickled(a: tuple[str, str], b: tuple[str, str], stamps: tuple[int, ...]) -> bool:
    import torch

    one, other = (torch.load(f, map_location="cpu", weights_only=True)[n] for f, n in (a, b))
    return one.data_ptr() == other.data_ptr() or bool((one == other).all())
