"""Tokens without a row, and what an adapter brings along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from broken_models import Models

from mergelab.core.findings import Finding
from mergelab.models import checkpoint
from mergelab.models.resolver import Source
from mergelab.preflight import tokenizer_checks


def add(folder: Path, *tokens: str) -> None:
    """Tokens behind the last one."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    last = max([*content["model"]["vocab"].values(), *(t["id"] for t in content["added_tokens"])])
    flags = dict.fromkeys(("special", "lstrip", "rstrip", "single_word", "normalized"), False)
    content["added_tokens"] += [{"content": t, "id": last + i, **flags} for i, t in enumerate(tokens, 1)]
    file.write_text(json.dumps(content), encoding="utf-8")


def check(models: Models, recipe: dict[str, Any] | None = None, adapter: Path | None = None) -> list[Finding]:
    names = ("base", "math", "physics")
    at = {"math": adapter}
    sources = [Source(n, n, n, folder=models[n], adapter=at.get(n)) for n in names]
    facts = {s.name: checkpoint.read(models[s.name], s.name) for s in sources}
    if recipe is not None:
        recipe = {"base_model": str(models["base"]), **recipe}
    return list(tokenizer_checks.check(sources, facts, recipe))


def told(findings: list[Finding]) -> list[tuple[str, str, str]]:
    return [(f.severity, f.place, f.code) for f in findings]


@pytest.mark.parametrize("name", ["base", "math"])
def test_tokens_beyond_the_rows_are_said_of_any_model(models: Models, name: str) -> None:
    add(models[name], "<PRE>", "<SUF>")
    for recipe in (None, {}, {"tokenizer_source": "union"}, {"tokenizer": {"source": "base"}}):
        (found,) = check(models, recipe)
        assert (found.severity, found.place, found.code) == ("warning", name, "token-rows")
        assert "its tokenizer has 306 tokens, its embedding 304 rows: <PRE>, <SUF> have none" in found.message


def test_tokens_that_the_built_tokenizer_needs_have_to_have_rows(models: Models) -> None:
    add(models["math"], "<PRE>", "<SUF>")
    assert told(check(models, {"tokenizer_source": str(models["math"])})) == [("error", "math", "token-rows")]
    named = {"tokenizer": {"source": "base", "tokens": {"<SUF>": {"source": "math"}}}}
    assert told(check(models, named)) == [("error", "math", "token-rows")]
    shutil.rmtree(models["physics"])
    models.make(models["physics"], vocab_size=306)
    add(models["physics"], "<PRE>")
    (found,) = check(models, {"tokenizer_source": "union"})
    assert (found.severity, found.place) == ("error", "math")
    assert "the tokenizer to be built has <PRE> (" in found.message
    assert told(check(models, {"tokenizer_source": "base"})) == [("warning", "math", "token-rows")]


def test_a_padded_embedding_has_rows_for_more_tokens(models: Models) -> None:
    models.again("math", vocab_size=320)
    add(models["math"], "<PRE>")
    assert check(models, {"tokenizer_source": "union"}) == []


def test_an_adapter_has_the_tokenizer_of_its_base(models: Models, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    assert check(models, {}, adapter) == []
    for file in models["math"].glob("*token*"):
        shutil.copy(file, adapter)
    assert check(models, {}, adapter) == []
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}!", encoding="utf-8")
    assert told(check(models, {}, adapter)) == [("note", "math", "adapter-template")]
    assert check(models, {"chat_template": "chatml"}, adapter) == []
    add(adapter, "<|im_end|>")
    (added, _) = check(models, {}, adapter)
    assert (added.severity, added.code) == ("warning", "added-tokens")
    assert added.message == "compared with the base's, its adapter's tokenizer adds <|im_end|>"
