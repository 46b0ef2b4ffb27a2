"""A random little language model, and task files for it, to measure with lm_eval for real."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def make_model(folder: Path, seed: int = 0, more: Sequence[str] = ()) -> Path:
    """Write a random Qwen2 of 25 thousand parameters that reads single bytes, and `more` tokens."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    vocab = {"<eos>": 0, **{byte: n + 1 for n, byte in enumerate(sorted(ByteLevel.alphabet()))}}
    vocab |= {token: len(vocab) + n for n, token in enumerate(more)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], eos_token="<eos>", pad_token="<eos>")
    config = Qwen2Config(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_tokenizer(folder: Path, out: Path, more: Sequence[str], form: str | None, **tokens: str) -> Path:
    """A model of `make_model` with another tokenizer of the same bytes.

    Args:
        folder: the model.
        out: where it is copied to.
        more: as `make_model` had it.
        form: what is put around a text, such as `<s> $A`.
        tokens: special tokens, such as `bos_token`.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    shutil.copytree(folder, out)
    backend = Qwen2Tokenizer.from_pretrained(folder).backend_tokenizer
    backend.add_special_tokens(["<eos>", *more])
    if form is not None:
        ids = [(t, backend.token_to_id(t)) for t in ("<eos>", *more) if t in form]
        backend.post_processor = TemplateProcessing(single=form, special_tokens=ids)
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(out)
    return out


def greedy(model: Any, tokenizer: Any, prompt: str, length: int = 4) -> str:
    """The model's continuation, token by token, up to its end of text or the end of the line."""
    import torch

    ids = tokenizer(prompt)["input_ids"]
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < length:
            token = int(model(torch.tensor([ids + answer])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            answer.append(token)
    return str(tokenizer.decode(answer, skip_special_tokens=True)).split("\n")[0]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_task(folder: Path, name: str, rows: Sequence[dict[str, Any]], **changes: Any) -> str:
    """A generating task over `rows` of prompt and answer, scored by exact match; its name.

    `changes` replace keys of its YAML; None leaves one out.
    """
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    write_rows(data, rows)
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **changes,
    }
    said = {key: value for key, value in config.items() if value is not None}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(said, sort_keys=False))
    return name
