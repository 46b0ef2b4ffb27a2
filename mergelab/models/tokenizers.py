"""A tokenizer as its files describe it: the token of each id, and how text is tokenized."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.core.findings import Finding, error, first_few, warning
from mergelab.models.json_files import load_json, reason


@dataclass(frozen=True)
class Tokenizer:
    """The part of a tokenizer that can be compared with another's."""

    file: str
    """The file it was read from."""
    vocab: Mapping[str, int]
    """Id by token; empty if the file can only be read with its own library."""
    digest: str
    """sha256 of the vocabulary, the merges and everything else that affects tokenization."""
    chat_template: str | None


def read(folder: Path, key: str, remedy: str) -> tuple[Tokenizer | None, list[Finding]]:
    """The tokenizer in a model folder, or None, and what is wrong with its files.

    Args:
        folder: The model.
        key: The model's key in the configuration, for findings.
        remedy: What to do about damaged files.
    """
    template, findings = _chat_template(folder, key, remedy)
    for name, reader in _READERS.items():
        path = folder / name
        if not path.exists():
            continue
        try:
            vocab, digest = reader(path)
        except json.JSONDecodeError as e:
            findings.append(error("corrupt", key, f"{path} is not JSON (line {e.lineno}: {e.msg})", remedy))
        except OSError as e:
            findings.append(error("unreadable", key, f"cannot read {path}: {reason(e)}"))
        except (AttributeError, KeyError, TypeError, ValueError):
            findings.append(error("corrupt", key, f"{path} does not describe a tokenizer", remedy))
        else:
            return Tokenizer(name, vocab, digest, template), findings
        return Tokenizer(name, {}, "", template), findings
    return None, findings


def _fast(path: Path) -> tuple[dict[str, int], str]:
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    raw = model["vocab"]
    vocab = dict(raw) if isinstance(raw, dict) else {entry[0]: i for i, entry in enumerate(raw)}
    vocab |= {t["content"]: int(t["id"]) for t in content.get("added_tokens") or []}
    # Merges are pairs or, as older software wrote them, texts with a space between.
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []]
    return vocab, _digest(vocab, merges, content.get("normalizer"), content.get("pre_tokenizer"))


def _vocab_and_merges(path: Path) -> tuple[dict[str, int], str]:
    vocab = {str(t): int(i) for t, i in json.loads(path.read_text(encoding="utf-8")).items()}
    added, merges = path.with_name("added_tokens.json"), path.with_name("merges.txt")
    if added.exists():
        vocab |= {str(t): int(i) for t, i in json.loads(added.read_text(encoding="utf-8")).items()}
    return vocab, _digest(vocab, merges.read_text(encoding="utf-8") if merges.exists() else None)


def _sentencepiece(path: Path) -> tuple[dict[str, int], str]:
    return {}, hashlib.sha256(path.read_bytes()).hexdigest()


_READERS = {"tokenizer.json": _fast, "vocab.json": _vocab_and_merges, "tokenizer.model": _sentencepiece}


def _digest(vocab: Mapping[str, int], *rest: Any) -> str:
    text = json.dumps([sorted(vocab.items()), *rest], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _chat_template(folder: Path, key: str, remedy: str) -> tuple[str | None, list[Finding]]:
    jinja, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if jinja.exists():
        try:
            return jinja.read_text(encoding="utf-8"), []
        except (OSError, UnicodeDecodeError) as e:
            return None, [error("unreadable", key, f"cannot read {jinja}: {reason(e)}")]
    if not config.exists():
        return None, []
    content, findings = load_json(config, key, remedy)
    template = content.get("chat_template") if isinstance(content, dict) else None
    return (template if isinstance(template, str) else None), findings


def compare(ours: Tokenizer, theirs: Tokenizer, key: str, possessive: str) -> Iterator[Finding]:
    """Compare an expert's tokenizer with the one that the merged model gets.

    Args:
        ours: The expert's tokenizer.
        theirs: The tokenizer of the merged model.
        key: The expert's key in the configuration, for findings.
        possessive: The owner of the other tokenizer, such as `the base's`.
    """
    if ours.digest == theirs.digest or not (ours.digest and theirs.digest):
        return
    if bool(ours.vocab) != bool(theirs.vocab):
        yield warning(
            "tokenizer-files",
            key,
            f"its tokenizer is a {ours.file}, {possessive} is a {theirs.file}: they cannot be compared",
            "Make sure that equal ids mean equal tokens.",
        )
        return
    by_id: dict[int, list[str]] = {}
    for t, i in theirs.vocab.items():
        by_id.setdefault(i, []).append(t)
    moved = [(t, i) for t, i in ours.vocab.items() if t not in by_id.get(i, [t])]
    if moved or not ours.vocab:
        token, i = moved[0] if moved else ("", 0)
        shown = f": id {i} is {token!r} here, and {by_id[i][0]!r} in the other" if moved else ""
        yield error(
            "tokenizer",
            key,
            f"its tokenizer differs from {possessive}: {f'{len(moved):,}' if moved else 'some'} ids "
            f"mean other tokens{shown}",
            "Set model.tokenizer=union to let mergekit fit the embeddings, or use another expert.",
        )
        return
    new, gone = sorted({*ours.vocab} - {*theirs.vocab}), sorted({*theirs.vocab} - {*ours.vocab})
    if new or gone:
        parts = [f"adds {first_few(new)}"] if new else []
        parts += [f"lacks {first_few(gone)}"] if gone else []
        yield warning(
            "added-tokens",
            key,
            f"compared with {possessive} tokenizer, its own {' and '.join(parts)}",
            f"The output gets {possessive} tokenizer.",
        )
        return
    yield warning(
        "tokenizer-rules",
        key,
        f"its tokenizer has {possessive} vocabulary, but splits text by other rules",
        f"The output gets {possessive} tokenizer.",
    )
