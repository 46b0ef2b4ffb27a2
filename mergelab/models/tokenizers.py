"""A tokenizer as its files describe it: the token of each id, and how text is tokenized.

A tokenizer.json is read by itself. Which other files hold a tokenizer, and what they mean, is known to its
class in transformers. So all others are read by that, which takes the seconds of importing it, once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.core.errors import typed_line
from mergelab.core.findings import Finding, error, first_few, warning
from mergelab.core.hashing import file_hash, stamp
from mergelab.core.library_output import silence_libraries
from mergelab.core.model_folder import TEMPLATES, companions_of
from mergelab.core.remembered import remembered
from mergelab.models import remote_code
from mergelab.models.json_files import is_pointer, load_json, pointer, reason

FAST = "tokenizer.json"
"""The file of the `tokenizers` library."""

FILES = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab.*|merges\.txt|tekken\.json|bpe\.codes|dict\.txt|"
    rf".*\.(model|spm|tiktoken)|chat_template\.jinja|{TEMPLATES}.*"
)
"""The files that only a tokenizer reads. One that a merge builds writes its own, and must not find others."""

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files of a tokenizer that say nothing without those of its vocabulary."""

RENAMED = re.compile(r"tekken\.json|tokenizer\.model.*|tiktoken\.model")
"""What transformers takes for any class where the class's own files are missing."""

SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokenizer:
    """The part of a tokenizer that can be compared with another's."""

    file: str
    """The file it was read from."""
    vocab: Mapping[str, int]
    """Id by token; empty if only the tokenizer's own code can read it."""
    digest: str
    """sha256 of the vocabulary, the merges and everything else that affects tokenization."""
    chat_template: str | None
    problem: str = ""
    """Why transformers cannot load it; empty if it can."""
    kind: str = ""
    """The model of the `tokenizers` library, such as BPE; empty for other implementations."""


class _Absent(Exception):
    """There is no tokenizer."""


def read(folder: Path, key: str, remedy: str) -> tuple[Tokenizer | None, list[Finding]]:
    """The tokenizer in a model folder, or None, and what is wrong with its files.

    Args:
        folder: The model.
        key: The model's key in the configuration, for findings.
        remedy: What to do about damaged files.
    """
    settings, findings = _settings(folder, key, remedy)
    template, more = _chat_template(folder, settings, key)
    findings += more
    path = folder / FAST
    if path.exists():
        content, wrong = load_json(path, key, remedy)
        if wrong:
            return Tokenizer(FAST, {}, "", template), [*findings, *wrong]
        try:
            vocab, digest, kind = _fast(content, _declared(folder, settings))
            return Tokenizer(FAST, vocab, digest, template, kind=kind), findings
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            pass  # of a kind that only its own library knows
    if findings or not (there := companions_of(folder)):
        return (Tokenizer("", {}, "", template) if path.exists() else None), findings
    try:
        return _by_transformers(folder, template), findings
    except _Absent:
        return None, findings
    except Exception as e:  # tokenizers raise exceptions of every type
        if pointers := [pointer(folder / name, key) for name in there if is_pointer(folder / name)]:
            return Tokenizer("", {}, "", template), pointers
        if path.exists():
            message = f"{path} does not describe a tokenizer: {typed_line(e)}"
            return Tokenizer(FAST, {}, "", template), [error("corrupt", key, message, remedy)]
        return Tokenizer("", {}, "", template, typed_line(e)), findings


def _fast(content: Any, declared: Mapping[str, None]) -> tuple[dict[str, int], str, str]:
    """Vocabulary, digest and model of a tokenizer.json."""
    model = content["model"]
    raw = model["vocab"]
    vocab = dict(raw) if isinstance(raw, dict) else {entry[0]: i for i, entry in enumerate(raw)}
    vocab |= {t["content"]: int(t["id"]) for t in content.get("added_tokens") or []}
    new = max(vocab.values(), default=-1) + 1
    for token in declared:
        if token not in vocab:
            vocab[token], new = new, new + 1
    # Merges are pairs or, as older software wrote them, texts with a space between.
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []]
    digest = _digest(vocab, merges, content.get("normalizer"), content.get("pre_tokenizer"))
    return vocab, digest, str(model.get("type") or "")


def _declared(folder: Path, settings: Mapping[str, Any]) -> dict[str, None]:
    """The tokens that transformers adds behind the vocabulary where it lacks them, in their order."""
    path = folder / "added_tokens.json"
    numbered = settings.get("added_tokens_decoder") or {}  # which replaces the file where both are there
    added = json.loads(path.read_text(encoding="utf-8")) if path.exists() and not numbered else {}
    tokens: list[Any] = sorted(added, key=added.__getitem__)
    tokens += [numbered[i] for i in sorted(numbered, key=int)]
    tokens += [settings.get(name) for name in SPECIAL]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(name) or []
        tokens += more.values() if isinstance(more, dict) else more
    texts = (t.get("content") if isinstance(t, dict) else t for t in tokens)
    return dict.fromkeys(t for t in texts if isinstance(t, str) and t)


def _by_transformers(folder: Path, template: str | None) -> Tokenizer:
    """The tokenizer as transformers loads it. Code that comes with it is not run.

    Raises:
        _Absent: There is none.
    """
    own = [n for n in companions_of(folder) if FILES.fullmatch(n)]
    if code := remote_code.of_tokenizer(folder):
        data = [n for n in own if n not in SETTINGS and not n.startswith(("chat_template", TEMPLATES))]
        contents = {n: file_hash(folder / n) for n in data or code if (folder / n).is_file()}
        return Tokenizer(code[0], {}, _digest({}, contents), template)

    def answer() -> dict[str, Any]:
        return _asked(folder, own)

    named = {n: file_hash(folder / n) for n in ("config.json", *own) if (folder / n).is_file()}
    others = [[n, *stamp(folder / n)] for n in companions_of(folder) if n not in named]
    found = remembered("tokenizer", [named, others], answer)
    return Tokenizer(found["file"], found["vocab"], found["digest"], template, kind=found["kind"])


def _asked(folder: Path, own: list[str]) -> dict[str, Any]:
    """What transformers says of a tokenizer: its main file, vocabulary and digest."""
    from transformers import AutoTokenizer

    try:
        with silence_libraries():
            loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:
        if any(n not in SETTINGS for n in own):
            raise
        raise _Absent from e
    names = [*(getattr(type(loaded), "vocab_files_names", None) or {}).values()]
    files = [n for n in names if n not in SETTINGS and (folder / n).exists()]
    files += [n for n in own if RENAMED.fullmatch(n)]
    if names and not files:
        raise _Absent  # many classes have a rudimentary vocabulary without any file
    if backend := getattr(loaded, "backend_tokenizer", None):
        vocab, digest, kind = _fast(json.loads(backend.to_str()), {})
    else:
        kind = ""
        vocab = dict(loaded.get_vocab())
        digest = _digest(vocab, [file_hash(folder / n) for n in files])
    return {"file": (files or ["tokenizer_config.json"])[0], "vocab": vocab, "digest": digest, "kind": kind}


def _digest(vocab: Mapping[str, int], *rest: Any) -> str:
    text = json.dumps([sorted(vocab.items()), *rest], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _settings(folder: Path, key: str, remedy: str) -> tuple[dict[str, Any], list[Finding]]:
    """The content of tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    content, findings = load_json(path, key, remedy) if path.exists() else ({}, [])
    return (content if isinstance(content, dict) else {}), findings


def _chat_template(folder: Path, settings: Mapping[str, Any], key: str) -> tuple[str | None, list[Finding]]:
    """The default chat template: of a file of its own, else of tokenizer_config.json."""
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        try:
            return jinja.read_text(encoding="utf-8"), []
        except (OSError, UnicodeDecodeError) as e:
            return None, [error("unreadable", key, f"cannot read {jinja}: {reason(e)}")]
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return (template if isinstance(template, str) else None), []


def as_loaded(folder: Path, own: Tokenizer) -> Tokenizer:
    """A tokenizer that was read from its files, as transformers loads it."""
    try:
        return _by_transformers(folder, own.chat_template) if own.vocab else own
    except Exception:  # tokenizers raise exceptions of every type; then the files are all that is known
        log.exception("transformers cannot load the tokenizer of %s", folder)
        return own


def compare(
    ours: Tokenizer, theirs: Tokenizer, key: str, possessive: str, own: str = "its"
) -> Iterator[Finding]:
    """Compare an expert's tokenizer with the one that the merged model gets.

    Args:
        ours: The expert's tokenizer.
        theirs: The tokenizer of the merged model.
        key: The expert's key in the configuration, for findings.
        possessive: The owner of the other tokenizer, such as `the base's`.
        own: The owner of the first.
    """
    if ours.digest == theirs.digest or not (ours.digest and theirs.digest):
        return
    if bool(ours.vocab) != bool(theirs.vocab):
        yield warning(
            "tokenizer-files",
            key,
            f"{own} tokenizer is a {ours.file}, {possessive} is a {theirs.file}: they cannot be compared",
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
            f"{own} tokenizer differs from {possessive}: {f'{len(moved):,}' if moved else 'some'} ids "
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
            f"compared with {possessive}, {own} tokenizer {' and '.join(parts)}",
            f"The output gets {possessive} tokenizer.",
        )
        return
    yield warning(
        "tokenizer-rules",
        key,
        f"{own} tokenizer has {possessive} vocabulary, but splits text by other rules",
        f"The output gets {possessive} tokenizer.",
    )
