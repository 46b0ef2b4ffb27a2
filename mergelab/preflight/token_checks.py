"""Where the rows of single tokens come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergelab.core.findings import Finding, error
from mergelab.models.checkpoint import ModelMetadata
from mergelab.models.resolver import Source
from mergelab.recipes.recipe_groups import KeyOf


def check(
    recipe: Mapping[str, Any], sources: list[Source], facts: Mapping[str, ModelMetadata], place: KeyOf
) -> Iterator[Finding]:
    """Tokens that are taken from models that do not have them, which mergekit finds out in the merge.

    Args:
        recipe: A merge.
        sources: Its models.
        facts: What is known of them, by name.
        place: From a path into the recipe to the key that the user knows.
    """
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
