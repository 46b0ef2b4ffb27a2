"""Tokenizers beside the models: one that is missing, tokens without a row, an adapter's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergelab.core.findings import Finding, error, first_few, note, warning
from mergelab.models import tensor_checks, tokenizers
from mergelab.models.checkpoint import ModelMetadata
from mergelab.models.resolver import Source
from mergelab.preflight import evaluation_checks
from mergelab.preflight.resolve_inputs import Inputs
from mergelab.recipes import mixtures
from mergelab.recipes import recipe as recipes
from mergelab.schema import Run

MEASURED = "the merged model, which gets this one's, is measured"
"""Why a model needs a tokenizer."""


def needs(run: Run, asked: Inputs, merges: bool, fitted: bool) -> list[str]:
    """What needs the tokenizer of the model whose tokenizer the output gets.

    Args:
        run: The run.
        asked: Its models.
        merges: Whether it merges.
        fitted: Whether mergekit builds a tokenizer.
    """
    if not merges:
        return []
    template = run.model.chat_template if asked.file is None else asked.file.get("chat_template")
    why = {
        "a tokenizer is to be built from it": fitted,
        "a chat template needs one": template is not None,
        "the gates of a mixture are made from prompts": mixtures.wanted(run)
        or (asked.file is not None and recipes.is_mixture(asked.file)),
        MEASURED: evaluation_checks.measures_language(run),
    }
    return [text for text, needed in why.items() if needed]


def missing(
    s: Source, own: ModelMetadata, needed: Sequence[str], *, lends: bool, measured: bool, fitted: bool
) -> Finding:
    """The finding for a model whose tokenizer cannot be loaded: an error where something needs it.

    Args:
        s: The model.
        own: Its metadata.
        needed: What needs its tokenizer, if the merged model gets it; see `needs`.
        lends: Whether the merged model gets its tokenizer.
        measured: Whether it is measured itself.
        fitted: Whether mergekit builds a tokenizer.
    """
    message = own.no_tokenizer
    if needed:
        remedy = "Copy the tokenizer's files into it, those of the base for a fine-tune of it"
        remedy += ", or set eval=none." if [*needed] == [MEASURED] else "."
        return error("no-tokenizer", s.key, f"{message}, and {needed[0]}", remedy)
    if measured:
        remedy = "Copy the base's tokenizer files into it, or set eval.baselines=false."
        return error("no-tokenizer", s.key, f"{message}, so it cannot be measured", remedy)
    if lends:
        gets = "none" if own.tokenizer is None else "the same files"
        return warning("no-tokenizer", s.key, f"{message}, so the merged model gets {gets}")
    if fitted:
        return warning("no-tokenizer", s.key, f"{message}; its ids are taken for those of the base")
    return warning("no-tokenizer", s.key, f"{message}, so it cannot be compared with the others'")


def check(
    sources: Sequence[Source], facts: Mapping[str, ModelMetadata], recipe: Mapping[str, Any] | None
) -> Iterator[Finding]:
    """Check that tokens have rows, and adapters the tokenizers of their bases.

    Args:
        sources: The models; the first one is the base, or used instead.
        facts: Their metadata by name.
        recipe: What mergekit gets; None if nothing is merged.
    """
    rowless = {s.name: tokens for s in sources if (tokens := _rowless(facts.get(s.name)))}
    built = _built(sources, facts, rowless, recipe or {})
    for s in sources:
        if s.name in rowless:
            yield _no_rows(s, facts[s.name], rowless[s.name], built, _base(sources, recipe or {}))
        if s.adapter is not None and s.name in facts:
            yield from _check_adapter(s, facts[s.name], templated=bool((recipe or {}).get("chat_template")))


def _rowless(own: ModelMetadata | None) -> dict[str, int]:
    """The tokens of a model that its embedding has no row for, with their ids."""
    if own is None or own.tokenizer is None or not own.tokenizer.vocab:
        return {}
    largest = max(own.tokenizer.vocab.values())
    if isinstance(size := own.text_config.get("vocab_size"), int) and largest < size:
        return {}  # the usual case, for which no headers are needed
    found = tensor_checks.rows(own)
    if found is None or largest < found[1]:
        return {}
    vocab = tokenizers.as_loaded(own.folder, own.tokenizer).vocab
    return {t: i for t, i in sorted(vocab.items(), key=lambda entry: entry[1]) if i >= found[1]}


def _source(recipe: Mapping[str, Any]) -> str | None:
    """What a recipe builds a tokenizer from: union, base or a model; None if it does not build one."""
    own = recipe.get("tokenizer")
    if isinstance(own, Mapping):
        return str(own.get("source") or "union")
    return str(recipe["tokenizer_source"]) if recipe.get("tokenizer_source") else None


def _base(sources: Sequence[Source], recipe: Mapping[str, Any]) -> str:
    """The name of the model whose tokenizer mergekit begins with."""
    named = next((s.name for s in sources if s.reference == recipe.get("base_model")), None)
    return named or (sources[0].name if sources else "")


def _built(
    sources: Sequence[Source],
    facts: Mapping[str, ModelMetadata],
    rowless: Mapping[str, Mapping[str, int]],
    recipe: Mapping[str, Any],
) -> set[str] | None:
    """The tokens of the tokenizer that mergekit builds; None if it does not build one."""
    source = _source(recipe)
    if source is None:
        return None
    tokens = {*((recipe.get("tokenizer") or {}).get("tokens") or {})}
    base = _base(sources, recipe)
    for s in sources:
        own = facts[s.name].tokenizer if s.name in facts else None
        if own is None:
            continue
        if s.reference == source:
            tokens |= {*own.vocab}  # whole: mergekit takes it as it is
        elif source == "union" or (source == "base" and s.name == base):
            tokens |= {*own.vocab} - {*rowless.get(s.name, {})}
    return tokens


def _no_rows(
    s: Source, own: ModelMetadata, tokens: Mapping[str, int], built: set[str] | None, base: str
) -> Finding:
    code, rows = "token-rows", tensor_checks.rows(own)
    count = len(own.tokenizer.vocab) if own.tokenizer else 0
    size = rows[1] if rows else 0
    has = f"{count:,} tokens" if count > size else f"ids up to {max(tokens.values()):,}"
    message = f"its tokenizer has {has}, its embedding {size:,} rows: {first_few(tokens)} have none"
    remedy = "Remove these tokens from its tokenizer's files, or use the model that they belong to."
    if built is None:
        return warning(code, s.key, f"{message} ({own.folder})", "Texts with them cannot be processed.")
    if needed := [t for t in tokens if t in built]:
        message += f", and the tokenizer to be built has {first_few(needed)}"
        return error(code, s.key, f"{message} ({own.folder})", remedy)
    if s.name == base and own.tokenizer and own.tokenizer.kind != "BPE":
        message += ", and mergekit can leave such tokens out of a BPE tokenizer only"
        return error(code, s.key, f"{message} ({own.folder})", remedy)
    return warning(code, s.key, f"{message} ({own.folder})", "The tokenizer to be built does not get them.")


def _check_adapter(s: Source, own: ModelMetadata, *, templated: bool) -> Iterator[Finding]:
    """Compare an adapter's own tokenizer with that of its base, which is the one that is used."""
    assert s.adapter is not None
    ours, _ = tokenizers.read(s.adapter, s.key, "")
    if ours is None or ours.problem or own.tokenizer is None:
        return
    yield from tokenizers.compare(ours, own.tokenizer, s.key, "the base's", own="its adapter's")
    if ours.chat_template and not templated and ours.chat_template != own.tokenizer.chat_template:
        message = f"its adapter comes with a chat template ({s.adapter}); that of the model below it is used"
        yield note("adapter-template", s.key, message, "Set model.chat_template if the output needs it.")
