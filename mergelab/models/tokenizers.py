"""A tokenizer as its files describe it: which id means which token, and how text becomes ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.core.findings import Finding, error, some, warning
from mergelab.models.json_files import load_json, reason


@dataclass(frozen=True)
class Tokenizer:
    """The part of a tokenizer that can be compared with another's."""

    file: str
    """The file that it comes from."""
    vocab: Mapping[str, int]
    """Id by token; empty where the file is not one that can be read without its library."""
    digest: str
    """sha256 of the vocabulary, the merges and everything else that makes ids of text."""
    chat_template: str | None


def read(folder: Path, place: str, remedy: str) -> tuple[Tokenizer | None, list[Finding]]:
    """The tokenizer in a model folder, None where there is none, and what is wrong with its files.

    Args:
        place: how findings call the model.
        remedy: how to get sound files.
    """
    template, findings = _chat_template(folder, place, remedy)
    for name, reader in _READERS.items():
        path = folder / name
        if not path.exists():
            continue
        try:
            vocab, digest = reader(path)
        except json.JSONDecodeError as e:
            findings.append(error("corrupt", place, f"{path} is not JSON (line {e.lineno}: {e.msg})", remedy))
        except OSError as e:
            findings.append(error("unreadable", place, f"cannot read {path}: {reason(e)}"))
        except (AttributeError, KeyError, TypeError, ValueError):
            findings.append(error("corrupt", place, f"{path} is not a tokenizer's", remedy))
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
    # Merges are pairs or, as older software wrote them, pairs with a space between.
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


def _chat_template(folder: Path, place: str, remedy: str) -> tuple[str | None, list[Finding]]:
    jinja, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if jinja.exists():
        try:
            return jinja.read_text(encoding="utf-8"), []
        except (OSError, UnicodeDecodeError) as e:
            return None, [error("unreadable", place, f"cannot read {jinja}: {reason(e)}")]
    if not config.exists():
        return None, []
    content, findings = load_json(config, place, remedy)
    template = content.get("chat_template") if isinstance(content, dict) else None
    return (template if isinstance(template, str) else None), findings


def compare(ours: Tokenizer, theirs: Tokenizer, place: str, whose: str) -> Iterator[Finding]:
    """Findings of an expert's tokenizer beside the one that the output gets.

    Args:
        whose: the other model as a possessive, such as `the base's`.
    """
    if ours.digest == theirs.digest or not (ours.digest and theirs.digest):
        return
    if bool(ours.vocab) != bool(theirs.vocab):
        yield warning(
            "tokenizer-files",
            place,
            f"its tokenizer is a {ours.file}, {whose} a {theirs.file}: they cannot be compared",
            "See to it that ids mean the same tokens.",
        )
        return
    by_id: dict[int, list[str]] = {}
    for t, i in theirs.vocab.items():
        by_id.setdefault(i, []).append(t)
    moved = [(t, i) for t, i in ours.vocab.items() if t not in by_id.get(i, [t])]
    if moved or not ours.vocab:
        token, i = moved[0] if moved else ("", 0)
        shown = f": id {i} is {token!r} here and {by_id[i][0]!r} there" if moved else ""
        yield error(
            "tokenizer",
            place,
            f"its tokenizer is not {whose}, {f'{len(moved):,}' if moved else 'some'} ids mean something "
            f"else{shown}",
            "Set model.tokenizer=union to let mergekit fit the embeddings, or use another expert.",
        )
        return
    new, gone = sorted({*ours.vocab} - {*theirs.vocab}), sorted({*theirs.vocab} - {*ours.vocab})
    if new or gone:
        parts = [f"adds {some(new)}"] if new else []
        parts += [f"lacks {some(gone)}"] if gone else []
        yield warning(
            "added-tokens",
            place,
            f"beside {whose} tokenizer, its own {' and '.join(parts)}",
            f"The output gets {whose} tokenizer.",
        )
        return
    yield warning(
        "tokenizer-rules",
        place,
        f"its tokenizer has {whose} vocabulary, but other rules to split text",
        f"The output gets {whose} tokenizer.",
    )
