"""Tokens that have no row in the embedding of their model, or that a model does not have at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergelab.core.findings import Finding, error, first_few, warning
from mergelab.models import tensor_checks
from mergelab.models.checkpoint import ModelMetadata
from mergelab.models.resolver import Source
from mergelab.recipes import recipe as recipes
from mergelab.recipes.recipe_groups import KeyOf


def check(
    recipe: Mapping[str, Any], sources: list[Source], facts: Mapping[str, ModelMetadata], place: KeyOf
) -> Iterator[Finding]:
    """What mergekit finds out in the middle of a merge, or never.

    Args:
        recipe: A merge, or a mixture.
        sources: Its models. The first one lends the tokenizer, or the base of one that is built.
        facts: What is known of them, by name.
        place: From a path into the recipe to the key that the user knows.
    """
    builds = not recipes.is_mixture(recipe) and recipes.builds_tokenizer(recipe)
    if not builds:
        sources = sources[:1]
    beyond = {s.name: _without_row(facts[s.name]) for s in sources if s.name in facts}
    made = _made_tokens(recipe, sources, facts, beyond) if builds else set()
    for s in sources:
        tokens = beyond.get(s.name)
        if not tokens:
            continue
        own = facts[s.name]
        _, rows = tensor_checks.rows(own) or ("", 0)
        count = max(own.tokenizer.vocab.values()) + 1 if own.tokenizer else 0
        message = f"{own.folder}: its tokenizer has {count:,} tokens, its embedding {rows:,} rows"
        lost = sorted(made & tokens)
        if lost:
            remedy = "Use a tokenizer whose tokens all have rows: tokenizer_source: base."
            yield error(
                "token-rows", s.key, f"{message}; the merge would need that of {first_few(lost)}", remedy
            )
        else:
            what = "left out" if builds else "kept in the tokenizer, and no prompt may have them"
            yield warning("token-rows", s.key, f"{message}; {first_few(sorted(tokens))} is {what}")
    if builds:
        yield from _check_sources(recipe, sources, facts, place)


def _without_row(own: ModelMetadata) -> set[str]:
    """The tokens for which the embedding has no row."""
    rows = tensor_checks.rows(own)
    if rows is None or own.tokenizer is None:
        return set()
    return {t for t, i in own.tokenizer.vocab.items() if i >= rows[1]}


def _made_tokens(
    recipe: Mapping[str, Any],
    sources: list[Source],
    facts: Mapping[str, ModelMetadata],
    beyond: Mapping[str, set[str]],
) -> set[str]:
    """The tokens of the tokenizer that is built."""
    tokenizer = recipe.get("tokenizer") or {}
    asked = tokenizer.get("source", "union") if tokenizer else recipe.get("tokenizer_source")
    out = set(tokenizer.get("tokens") or {})
    for s in sources:
        own = facts[s.name].tokenizer if s.name in facts else None
        if own is None:
            continue
        if s.reference == asked:
            out |= {*own.vocab}
        elif asked == "union" or (asked == "base" and s is sources[0]):
            out |= own.vocab.keys() - beyond[s.name]
    return out


def _check_sources(
    recipe: Mapping[str, Any], sources: list[Source], facts: Mapping[str, ModelMetadata], place: KeyOf
) -> Iterator[Finding]:
    """That a model has the token that is taken from it."""
    known = {
        s.reference: (s, own.vocab)
        for s in sources
        if s.name in facts and (own := facts[s.name].tokenizer) is not None and own.vocab
    }
    for token, spec in ((recipe.get("tokenizer") or {}).get("tokens") or {}).items():
        everywhere = len(known) == len(sources) and all(token in vocab for _, vocab in known.values())
        if not isinstance(spec, Mapping) or (everywhere and not spec.get("force")):
            continue
        origin = spec.get("source")
        wanted = token
        if isinstance(origin, Mapping):
            wanted, origin = origin.get("token"), origin.get("model")
        if origin in known and wanted is not None and wanted not in known[origin][1]:
            source = known[origin][0]
            at = place(("tokenizer", "tokens", token))
            remedy = "Name a model that has it, or give it `kind: zero`."
            yield error("no-token", at, f"{source.label} has no token '{wanted}'", remedy)
