"""Tokenizers of every kind are read as transformers loads them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mergelab.models import tokenizers

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def settings(folder: Path, kind: str, **more: object) -> None:
    text = json.dumps({"tokenizer_class": kind, **more})
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def pieces(folder: Path, name: str, kind: str, model: str = "unigram") -> None:
    """A small SentencePiece model."""
    import sentencepiece

    content = io.BytesIO()
    text = iter([" ".join(LETTERS), "hello world", "one two three"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text, model_writer=content, vocab_size=60, model_type=model, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    (folder / name).write_bytes(content.getvalue())
    settings(folder, kind, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def lines(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    settings(folder, "BertTokenizer")


def pairs(folder: Path) -> None:
    vocab = {t: i for i, t in enumerate(["<s>", *LETTERS, "he", "ll"])}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\r\nh e\r\nl l\r\n", encoding="utf-8")
    settings(folder, "GPT2Tokenizer", unk_token="<s>", bos_token="<s>", eos_token="<s>")


def tekken(folder: Path) -> None:
    each = [
        {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None}
        for i in range(256)
    ]
    special = [
        {"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(["<unk>", "<s>", "</s>"])
    ]
    about = {"pattern": r"\p{L}+|\p{N}", "num_vocab_tokens": 256, "default_vocab_size": 259,
             "default_num_special_tokens": 3, "version": "v3"}  # fmt: skip
    content = {"config": about, "vocab": each, "special_tokens": special}
    (folder / "tekken.json").write_text(json.dumps(content), encoding="utf-8")


KINDS: dict[str, Callable[[Path], None]] = {
    "tokenizer.model": lambda f: pieces(f, "tokenizer.model", "LlamaTokenizer", "bpe"),
    "spiece.model": lambda f: pieces(f, "spiece.model", "T5Tokenizer"),
    "sentencepiece.bpe.model": lambda f: pieces(f, "sentencepiece.bpe.model", "XLMRobertaTokenizer"),
    "vocab.txt": lines,
    "vocab.json": pairs,
    "tekken.json": tekken,
    "tokenizer_config.json": lambda f: settings(f, "ByT5Tokenizer"),
}


@pytest.mark.parametrize("file", KINDS)
def test_a_tokenizer_of_any_kind_is_read(tmp_path: Path, file: str) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    KINDS[file](tmp_path)
    read, findings = tokenizers.read(tmp_path, "", "")
    assert findings == []
    assert read is not None
    assert (read.file, read.problem) == (file, "")
    assert read.vocab == AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    again, _ = tokenizers.read(tmp_path, "", "")
    assert again == read


def test_the_same_tokenizer_in_other_files_is_the_same(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    lines(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "fast")
    (tmp_path / "fast" / "vocab.txt").unlink(missing_ok=True)
    old, _ = tokenizers.read(tmp_path, "", "")
    new, _ = tokenizers.read(tmp_path / "fast", "", "")
    assert old is not None
    assert new is not None
    assert (old.file, new.file) == ("vocab.txt", "tokenizer.json")
    assert list(tokenizers.compare(old, new, "a", "the base's")) == []


@pytest.mark.parametrize("kind", [None, "LlamaTokenizer"])
def test_a_class_without_its_files_is_no_tokenizer(tmp_path: Path, kind: str | None) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    if kind:
        settings(tmp_path, kind)
    assert tokenizers.read(tmp_path, "", "") == (None, [])


def test_a_tokenizer_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    settings(tmp_path, "T5Tokenizer")
    (tmp_path / "spiece.model").write_text("x", encoding="utf-8")
    read, findings = tokenizers.read(tmp_path, "", "")
    assert findings == []
    assert read is not None
    assert read.problem


def test_tokens_that_the_settings_add_are_counted_as_transformers_does(sound: Path, tmp_path: Path) -> None:
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(sound / "base", tmp_path / "a")
    file = tmp_path / "a" / "tokenizer_config.json"
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    added = {"900": {"content": "<Y>", "special": True, **flags}}
    content = json.loads(file.read_text(encoding="utf-8"))
    content |= {"added_tokens_decoder": added, "unk_token": "<unknown>", "additional_special_tokens": ["<Z>"]}
    file.write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "a" / "added_tokens.json").write_text('{"<ignored>": 304}', encoding="utf-8")
    read, _ = tokenizers.read(tmp_path / "a", "", "")
    assert read is not None
    assert set(read.vocab) == set(AutoTokenizer.from_pretrained(tmp_path / "a").get_vocab())
    assert len(read.vocab) == len(AutoTokenizer.from_pretrained(sound / "base")) + 3
