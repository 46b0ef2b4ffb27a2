"""A text's rolling log-likelihood, whatever special tokens its tokenizer adds, against plain torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tiny_tasks import make_model, with_tokenizer, write_task
from transformers import PreTrainedTokenizerFast

from mergelab.core.errors import StepError
from mergelab.evaluation import Evaluator, Measure, cache, load
from mergelab.evaluation.windows import cut, lead
from mergelab.schema import Evaluation, Hardware

SPECIAL = ["<s>", "<one>", "<two>"]
"""Tokens beside the bytes and `<eos>`."""
BOS, ONE, TWO, EOS = 257, 258, 259, 0
TEXTS = ["a first text", "the second is longer than the context is " * 3, "é"]

KINDS: dict[str, tuple[str | None, dict[str, str], list[int]]] = {
    "no BOS at all": (None, {"eos_token": "<eos>"}, [EOS]),
    "BOS, not added": (None, {"bos_token": "<s>", "eos_token": "<eos>"}, [BOS]),
    "adds BOS": ("<s> $A", {"bos_token": "<s>", "eos_token": "<eos>"}, [BOS]),
    "adds BOS and EOS": ("<s> $A <eos>", {"bos_token": "<s>", "eos_token": "<eos>"}, [BOS]),
    "adds EOS at the end": ("$A <eos>", {"eos_token": "<eos>"}, [EOS]),
    "adds two that are no BOS": ("<one> <two> $A", {"eos_token": "<eos>"}, [ONE, TWO]),
}
"""What the tokenizer puts around a text, its special tokens, and what a text is read after."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny", more=SPECIAL)


def own(model: Any, before: list[int], texts: list[list[int]], window: int) -> float:
    """The sum of all tokens' log-likelihoods: each window as long as may be, each token scored once."""
    total = 0.0
    for text in texts:
        ids, at = [*before, *text], len(before)
        while at < len(ids):
            end = min(len(ids), window + 1 if at == len(before) else at + window)
            part = torch.tensor([ids[max(0, end - window - 1) : end]])
            with torch.no_grad():
                told = model(part[:, :-1]).logits[0].log_softmax(-1)
            total += float(told.gather(1, part[0, 1:, None])[at - end :].sum())
            at = end
    return total


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_before_a_text_are_its_context(
    folder: Path, tmp_path: Path, kind: str, window: int | None
) -> None:
    form, tokens, before = KINDS[kind]
    path = with_tokenizer(folder, tmp_path / "model", SPECIAL, form, **tokens)
    texts = [*TEXTS, *(["<s>it has one already"] if before == [BOS] else [])]
    (tmp_path / "my.txt").write_text("\n\n".join(texts), encoding="utf-8")
    model, tokenizer = load(path, Hardware(threads=1))
    bare = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    assert [len(ids) for ids in bare[:3]] == [len(t.encode()) for t in TEXTS]
    bare[3:] = [ids[1:] for ids in bare[3:]]
    likelihood = own(model, before, bare, window or 64)

    settings = Evaluation(kind="perplexity", text=str(tmp_path / "my.txt"), max_length=window, batch_size=2)
    bench = Evaluator(settings, hardware=Hardware(threads=1))
    score = bench.score(model, tokenizer, [Measure("text", "text")])["text"]
    size = sum(len(t.encode()) for t in texts)
    assert score.value == pytest.approx(-likelihood / size / math.log(2), rel=1e-5)

    rows = [{"text": t} for t in texts]
    metrics = [{"metric": "bits_per_byte", "higher_is_better": False}]
    write_task(
        tmp_path / "tasks", "mine", rows, output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}}", generation_kwargs=None, metric_list=metrics,
    )  # fmt: skip
    asked = Evaluator(
        Evaluation(kind="tasks", max_length=window, batch_size=7),
        hardware=Hardware(threads=1),
        tasks_path=tmp_path / "tasks",
    )
    assert asked.score(model, tokenizer, [Measure("mine", "mine")])["mine"].value == pytest.approx(
        score.value, rel=1e-5
    )


def test_a_tokenizer_with_nothing_to_read_a_text_after_is_told(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folder, Hardware(threads=1))
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<eos>")
    (tmp_path / "my.txt").write_text("text")
    settings = Evaluation(kind="perplexity", text=str(tmp_path / "my.txt"))
    with pytest.raises(StepError, match="neither a BOS nor an EOS token"):
        Evaluator(settings, hardware=Hardware(threads=1)).score(model, bare, [Measure("text", "text")])


def test_scores_that_counted_bos_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "my.txt"
    text.write_text("text")
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{prompt}}"}
    write_task(tmp_path / "tasks", "rolling", [{"prompt": "a", "answer": "b"}], **rolling)
    write_task(tmp_path / "tasks", "other", [{"prompt": "a", "answer": "b"}])

    def keys() -> dict[str, str | None]:
        settings = {
            "text": Evaluation(kind="perplexity", text=str(text)),
            "rolling": Evaluation(kind="tasks"),
            "other": Evaluation(kind="tasks"),
        }
        return {
            name: cache.key("model", measure, bench.content(measure), bench.conditions)
            for name, s in settings.items()
            for bench in [Evaluator(s, hardware=Hardware(), tasks_path=tmp_path / "tasks")]
            for measure in [Measure(name, name)]
        }

    now = keys()
    monkeypatch.setattr("mergelab.evaluation.windows.VERSION", 1)
    before = keys()
    assert [name for name in now if now[name] != before[name]] == ["text", "rolling"]


def test_windows_after_one_token_are_those_of_lm_eval() -> None:
    for longest in range(2, 7):
        for size in range(20):
            tokens = list(range(size))
            theirs = get_rolling_token_windows(tokens, 99, longest, 1)
            assert [*cut([99], tokens, longest)] == [make_disjoint_window(w) for w in theirs]


def test_a_lead_longer_than_the_context_still_lets_every_token_be_scored() -> None:
    found = [*cut([7, 8, 9, 10, 11], range(6), 2)]
    assert [t for _, scored in found for t in scored] == list(range(6))
    assert all(len(before) >= 1 and len(before) + len(scored) <= 3 for before, scored in found)
    assert lead(lambda text, special: []) == []
