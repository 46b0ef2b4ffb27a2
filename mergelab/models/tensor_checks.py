"""The tensors of a model folder against its own config.json, and against those of another model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mergelab.core.dtypes import is_mergeable
from mergelab.core.findings import Finding, error, first_few, more_differ, note, warning
from mergelab.models import blueprint, tokenizers
from mergelab.models.blueprint import Blueprint, Shape
from mergelab.models.checkpoint import FETCH, ModelMetadata, file_headers


def check_complete(
    metadata: ModelMetadata, key: str, fetch: str = FETCH, *, merged: bool = True
) -> Iterator[Finding]:
    """Check that a model has the tensors that its own config.json implies, and no others.

    Args:
        metadata: The model.
        key: Its key in the configuration, for findings.
        fetch: The remedy for missing tensors.
        merged: Whether its tensors are merged. Otherwise it is only loaded, and transformers ignores what it
            does not know.
    """
    if not blueprint.has_all_headers(metadata):
        return
    kind, folder = metadata.config["architectures"][0], metadata.folder
    found = blueprint.of(metadata)
    if merged:
        yield from _check_dtypes(metadata, key, found)
    if found is None:
        message = f"transformers has no class {kind} of its own, so its tensors could not be checked"
        yield note("unlisted", key, message)
        return
    if found.problem:
        yield error("unloadable", key, f"{folder / 'config.json'}: {found.problem}")
        return
    whole = "Save all of it again, or name the folder of the whole model." if fetch == FETCH else fetch
    if found.missing and (unlisted := _unlisted(metadata)):
        message = f"the index in {folder} does not list {first_few(unlisted)}, which its shards hold"
        remedy = "Load the model with transformers, and `save_pretrained` it to a new folder."
        yield error("missing-tensor", key, message, remedy)
    elif found.missing:
        message = f"{folder} lacks {first_few(found.missing)}, which a {kind} of its config.json has"
        yield error("missing-tensor", key, message, whole)
    if found.unpooled:
        message = f"{folder} has no pooling layer: it lacks {first_few(found.unpooled)}"
        yield warning("missing-tensor", key, message)
    if found.mismatched:
        name, own, wanted = found.mismatched[0]
        more = more_differ(found.mismatched)
        message = f"{name} is {list(own)}, but by config.json it is {list(wanted)}{more} ({folder})"
        yield error("shape", key, message, "Correct config.json, or use the weights that belong to it.")
    if found.unexpected:
        message = f"{folder} has {first_few(found.unexpected)}, which a {kind} of its config.json does not"
        if merged:
            remedy = "Pass allow=[extra-tensor] if they are not needed: they are then left out."
            yield error("extra-tensor", key, message, remedy)
        else:
            yield warning("extra-tensor", key, f"{message}; transformers ignores them")


def _unlisted(metadata: ModelMetadata) -> list[str]:
    """The tensors of the shards that the index leaves out: transformers loads them, mergekit does not."""
    files = dict.fromkeys(t.file for t in metadata.tensors.values())
    return [n for f in files for n in file_headers(Path(f), "", "")[0] if n not in metadata.tensors]


def _check_dtypes(metadata: ModelMetadata, key: str, found: Blueprint | None) -> Iterator[Finding]:
    """Check that weights have a dtype that can be merged. Masks and indices are not weights."""

    def is_weight(name: str, code: str) -> bool:
        if found is not None and not found.problem:
            return found.own(name) in found.parameters
        return code.startswith("F") or name.endswith("weight")

    codes = {n: t.dtype for n, t in metadata.tensors.items() if not is_mergeable(t.dtype)}
    odd = {n: code for n, code in codes.items() if is_weight(n, code)}
    if odd:
        named = f"{first_few(odd)} ({', '.join(sorted({*odd.values()}))})"
        message = f"{metadata.folder} has weights of a dtype that cannot be merged: {named}"
        yield error("dtype", key, message, "Use the unquantized checkpoint.")


def compare_shapes(
    reference: ModelMetadata, expert: ModelMetadata, key: str, possessive: str, remedy: str
) -> Iterator[Finding]:
    """Compare the shapes of tensors of the same name, but for axes with an entry for each token."""
    known = blueprint.of(expert)
    found = blueprint.of(reference) or known
    told = {name for name, _, _ in known.mismatched} if known else set()
    ours, theirs = (b.unpooled if b else () for b in (known, found))
    if bool(ours) != bool(theirs):
        lacking, other = (expert, reference) if ours else (reference, expert)
        message = f"{lacking.folder} lacks {first_few(ours or theirs)}, which {other.folder} has"
        alike = "Save all of the models with a pooling layer, or all of them without."
        yield error("missing-tensor", key, message, alike)
    shared = [
        (n, t.shape, reference.tensors[n].shape)
        for n, t in expert.tensors.items()
        if n in reference.tensors and n not in told
    ]
    differ = [(n, a, b) for n, a, b in shared if _inner(n, a, found) != _inner(n, b, found)]
    if differ:
        n, a, b = differ[0]
        message = f"{n} is {list(a)}, {possessive} is {list(b)}{more_differ(differ)} ({expert.folder})"
        yield error("shape", key, message, remedy)


def _inner(name: str, shape: Shape, found: Blueprint | None) -> Shape:
    """The axes that have nothing to do with the vocabulary."""
    axis = found.vocabulary_axis(name) if found else None
    return shape if axis is None else shape[:axis] + shape[axis + 1 :]


def rows(metadata: ModelMetadata) -> tuple[str, int] | None:
    """The first tensor of a file that has an entry for each token, and how many it has."""
    found = blueprint.of(metadata)
    for n, t in metadata.tensors.items() if found else ():
        axis = found.vocabulary_axis(n) if found else None
        if axis is not None:
            return n, t.shape[axis]
    return None


def compare_vocabularies(
    reference: ModelMetadata, expert: ModelMetadata, key: str, possessive: str, fit: str
) -> Iterator[Finding]:
    """Compare the numbers of rows for tokens, and the tokenizers.

    Args:
        fit: How the user asks for embeddings that are fitted to one tokenizer.
    """
    ours, theirs = rows(expert), rows(reference)
    if ours and theirs and ours[1] != theirs[1]:
        name, count = ours
        yield error(
            "vocabulary",
            key,
            f"{name} has {count:,} rows, {possessive} has {theirs[1]:,}: the vocabularies differ "
            f"({expert.folder})",
            f"Set {fit} to let mergekit fit the embeddings; allow=[vocabulary] cuts off the rows that not "
            "all have.",
        )
    if expert.tokenizer and reference.tokenizer:
        yield from tokenizers.compare(expert.tokenizer, reference.tokenizer, key, possessive)
