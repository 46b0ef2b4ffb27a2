"""Scores against the same numbers computed without lm_eval; the cache; silence; errors."""

from __future__ import annotations

import logging
import math
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_tasks import greedy, make_model, write_rows, write_task

from mergelab.core import run_log
from mergelab.core.errors import StepError
from mergelab.evaluation import Evaluator, Measure, load
from mergelab.evaluation.perplexity import documents, stderr
from mergelab.schema import Evaluation, Hardware

PROMPTS = [f"{word} {n}=" for n in range(5) for word in ("one", "two", "three", "four")]
HARDWARE = Hardware(threads=1)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> tuple[Any, Any]:
    return load(model_dir, HARDWARE)


@pytest.fixture(scope="module")
def answers(loaded: tuple[Any, Any]) -> dict[str, str]:
    """What the model says to each prompt."""
    said = {prompt: greedy(*loaded, prompt) for prompt in PROMPTS}
    assert len(set(said.values())) > 3, "a model that always says the same tests nothing"
    return said


@pytest.fixture(scope="module")
def rows(answers: dict[str, str]) -> list[dict[str, str]]:
    """Questions of which the model knows the first eight of twenty."""
    return [
        {"prompt": prompt, "answer": answers[prompt] if n < 8 else "never"}
        for n, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that reach the model."""
    from mergelab.evaluation.lm_eval_adapter import CountingLM

    prompts: list[str] = []
    original = CountingLM.generate_until

    def recording(self: Any, requests: Any, **options: Any) -> Any:
        prompts.extend(request.args[0] for request in requests)
        return original(self, requests, **options)

    monkeypatch.setattr(CountingLM, "generate_until", recording)
    return prompts


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the model answers."""
    from mergelab.evaluation.lm_eval_adapter import CountingLM

    texts: list[str] = []
    original = CountingLM.generate_until

    def recording(self: Any, requests: Any, **options: Any) -> Any:
        answers = original(self, requests, **options)
        texts.extend(answers)
        return answers

    monkeypatch.setattr(CountingLM, "generate_until", recording)
    return texts


def evaluator(
    tasks: Path | None = None, home: Path | None = None, seed: int = 0, **settings: Any
) -> Evaluator:
    return Evaluator(
        Evaluation(**{"kind": "tasks", "batch_size": 7, **settings}),
        hardware=HARDWARE,
        seed=seed,
        tasks_path=tasks,
        home=home,
    )


def test_exact_match_is_what_greedy_decoding_gives(
    tmp_path: Path, loaded: tuple[Any, Any], rows: list[dict[str, str]]
) -> None:
    task = write_task(tmp_path / "tasks", "echo", rows)
    score = evaluator(tmp_path / "tasks").score(*loaded, [Measure("echo", task)])["echo"]
    hits = [greedy(*loaded, row["prompt"]) == row["answer"] for row in rows]
    share = sum(hits) / len(hits)
    assert 0 < share < 1
    assert score.value == pytest.approx(share)
    assert score.stderr == pytest.approx(math.sqrt(share * (1 - share) / (len(hits) - 1)))
    assert (score.samples, score.metric, score.higher_is_better) == (20, "exact_match", True)


def test_choices_are_judged_by_their_log_likelihood(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    choices = ["ab", "cdef", "x"]
    rows = [{"prompt": prompt, "choices": choices, "label": n % 3} for n, prompt in enumerate(PROMPTS)]
    changes = {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "generation_kwargs": None,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc_norm", "acc")
        ],
    }
    write_task(tmp_path / "tasks", "choose", rows, **changes)
    bench = evaluator(tmp_path / "tasks")
    first = bench.score(*loaded, [Measure("c", "choose")])["c"]
    named = bench.score(*loaded, [Measure("c", "choose", "acc")])["c"]

    def likelihood(prompt: str, choice: str) -> float:
        model, tokenizer = loaded
        ids = tokenizer(prompt + choice)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(logits[-len(choice) - 1 + n, ids[n - len(choice)]]) for n in range(len(choice)))

    table = [[likelihood(row["prompt"], choice) for choice in choices] for row in rows]
    acc = np.mean([np.argmax(line) == row["label"] for line, row in zip(table, rows, strict=True)])
    lengths = [len(choice) for choice in choices]
    norm = np.mean(
        [np.argmax(np.array(line) / lengths) == row["label"] for line, row in zip(table, rows, strict=True)]
    )
    assert (first.metric, first.value, first.others) == ("acc_norm", norm, {"acc": acc})
    assert (named.metric, named.value, named.others) == ("acc", acc, {"acc_norm": norm})


CYCLE = "fourteen bytes"
"""Repeats in windows of 16 that then hold the same input, of which the last judges less."""
TEXT = "the first one.\nits second line\n\n" + CYCLE * 9 + "\n \t\n\nshort ones: é\n"


def direct(loaded: tuple[Any, Any], document: str, window: int) -> tuple[float, int, int]:
    """A document's log-likelihood in nats, its bytes and its words; the last window is full."""
    model, tokenizer = loaded
    ids = [tokenizer.eos_token_id, *tokenizer(document)["input_ids"]]
    total = 0.0
    for start in range(0, len(ids) - 1, window):
        end = min(start + window + 1, len(ids))
        part = torch.tensor(ids[max(0, end - window - 1) : end])
        with torch.no_grad():
            logits = model(part[None, :-1]).logits[0].log_softmax(-1)
        own = end - start - 1
        total += float(logits.gather(1, part[1:, None])[-own:].sum())
    return total, len(document.encode()), len(re.split(r"\s+", document))


@pytest.mark.parametrize("window", [None, 16])
def test_bits_per_byte_is_what_torch_gives(
    tmp_path: Path, loaded: tuple[Any, Any], window: int | None
) -> None:
    file = tmp_path / "my.txt"
    file.write_text(TEXT, encoding="utf-8")
    seen: list[tuple[str, int, int]] = []
    bench = evaluator(kind="perplexity", text=str(file), max_length=window, batch_size=2)
    score = bench.score(*loaded, [Measure("text", "text")], progress=lambda *at: seen.append(at))
    got = score["text"]

    length = window or 64
    assert documents(file) == [part.strip("\n") for part in TEXT.split("\n\n")[:1]] + [
        CYCLE * 9,
        "short ones: é",
    ]
    parts = [direct(loaded, document, length) for document in documents(file)]
    likelihood, size, words = (np.array(column, dtype=float) for column in zip(*parts, strict=True))
    assert got.value == pytest.approx(-likelihood.sum() / size.sum() / math.log(2), rel=1e-5)
    assert got.others["byte_perplexity"] == pytest.approx(2**got.value)
    assert got.others["word_perplexity"] == pytest.approx(math.exp(-likelihood.sum() / words.sum()), rel=1e-4)
    assert (got.metric, got.higher_is_better, got.samples) == ("bits_per_byte", False, 3)
    windows = sum(math.ceil(len(document.encode()) / length) for document in documents(file))
    assert seen[-1] == ("text", windows, windows)
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})


def test_the_error_of_bits_per_byte_is_that_of_resampled_documents(
    tmp_path: Path, loaded: tuple[Any, Any]
) -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choices("abc =.", k=rng.randrange(5, 50))) + "." for _ in range(60)]
    file = tmp_path / "my.txt"
    file.write_text("\n\n".join(texts))
    bench = evaluator(kind="perplexity", text=str(file), batch_size=60)
    parts = np.array([direct(loaded, document, 64) for document in documents(file)])
    picks = np.random.default_rng(0).integers(0, len(parts), (4000, len(parts)))
    sums = parts[picks].sum(axis=1)
    for metric, resampled in {
        "bits_per_byte": -sums[:, 0] / sums[:, 1] / math.log(2),
        "byte_perplexity": np.exp(-sums[:, 0] / sums[:, 1]),
        "word_perplexity": np.exp(-sums[:, 0] / sums[:, 2]),
    }.items():
        score = bench.score(*loaded, [Measure("text", "text", metric)])["text"]
        if metric != "word_perplexity":  # a skewed number, of which the delta method knows no tail
            assert score.stderr == pytest.approx(resampled.std(), rel=0.1)
        assert score.stderr is not None and score.stderr > 0
    equal = [(-float(n * n), 1) for n in range(9)]  # then it is the error of a plain mean
    plain = np.std([a for a, _ in equal], ddof=1) / 3 / math.log(2)
    assert stderr("bits_per_byte", equal) == pytest.approx(plain)
    file.write_text("one document alone has no standard error")
    alone = evaluator(kind="perplexity", text=str(file)).score(*loaded, [Measure("text", "text")])
    assert alone["text"].stderr is None


def test_limit_is_a_number_of_prompts_or_a_share_of_them(
    tmp_path: Path, loaded: tuple[Any, Any], rows: list[dict[str, str]], asked: list[str]
) -> None:
    task = Measure("echo", write_task(tmp_path / "tasks", "echo", rows))
    for limit, expected in ((5, 5), (0.5, 10), (1.0, 1), (99, 20)):
        asked.clear()
        score = evaluator(tmp_path / "tasks", limit=limit).score(*loaded, [task])["echo"]
        assert (score.samples, asked) == (expected, PROMPTS[:expected])


@pytest.mark.parametrize(
    "split", [{}, {"test_split": None, "validation_split": "test", "fewshot_split": "test"}]
)
def test_examples_are_drawn_by_the_seed_and_never_hold_the_question(
    tmp_path: Path, loaded: tuple[Any, Any], asked: list[str], split: dict[str, Any]
) -> None:
    rows = [{"prompt": f"{letter}=", "answer": letter} for letter in "abcd"]
    task = Measure("few", write_task(tmp_path / "tasks", "few", rows, **split))
    own = write_task(tmp_path / "tasks", "none", rows, num_fewshot=0)

    def prompts(seed: int) -> list[str]:
        asked.clear()
        bench = evaluator(tmp_path / "tasks", seed=seed, num_fewshot=3)
        bench.score(*loaded, [task])
        again, first = asked.copy(), asked.clear()
        bench.score(*loaded, [task])
        assert asked == again and first is None, "an Evaluator used twice draws the same examples"
        return again

    for prompt, row in zip(prompts(0), rows, strict=True):
        examples = prompt.split("\n\n")
        assert sorted(examples) == sorted(
            f"{r['prompt']}{r['answer']}" if r is not row else r["prompt"] for r in rows
        )
    assert prompts(0) == prompts(0) != prompts(1)
    asked.clear()
    evaluator(tmp_path / "tasks", num_fewshot=3).score(*loaded, [Measure("none", own)])
    assert asked == [row["prompt"] for row in rows], "a task that says 0 keeps 0"


def test_the_chat_template_is_applied_or_its_lack_is_told(
    tmp_path: Path, loaded: tuple[Any, Any], rows: list[dict[str, str]], asked: list[str]
) -> None:
    model, tokenizer = loaded
    task = Measure("echo", write_task(tmp_path / "tasks", "echo", rows[:3]))
    bench = evaluator(tmp_path / "tasks", chat_template=True)
    with pytest.raises(StepError, match="has no chat template"):
        bench.score(model, tokenizer, [task])
    tokenizer.chat_template = "{% for m in messages %}<{{m.role[0]}}>{{m.content}}{% endfor %}!"
    try:
        bench.score(model, tokenizer, [task])
        assert asked == [f"<u>{row['prompt']}!" for row in rows[:3]]
        asked.clear()
        more = evaluator(tmp_path / "tasks", chat_template=True, num_fewshot=1)
        more.score(model, tokenizer, [task])
        assert all(re.fullmatch(r"<u>[^<]+<a>[^<]+<u>[^<]+!", prompt) for prompt in asked)
    finally:
        tokenizer.chat_template = None


def test_a_measure_does_not_depend_on_its_companions(
    tmp_path: Path, loaded: tuple[Any, Any], rows: list[dict[str, str]], said: list[str]
) -> None:
    sampling = {"until": ["\n"], "max_gen_toks": 3, "do_sample": True, "temperature": 1.0}
    one = Measure("one", write_task(tmp_path / "tasks", "one", rows))
    two = Measure("two", write_task(tmp_path / "tasks", "two", rows, generation_kwargs=sampling))
    bench = evaluator(tmp_path / "tasks")
    both = bench.score(*loaded, [one, two])
    together = said.copy()
    assert list(both) == ["one", "two"]
    said.clear()
    apart = bench.score(*loaded, [two]) | bench.score(*loaded, [one])
    assert apart == both
    assert [*said[20:], *said[:20]] == together
    other = evaluator(tmp_path / "tasks", seed=1)
    said.clear()
    other.score(*loaded, [two])
    assert said != together[20:]


def test_weights_changed_in_place_are_seen(
    tmp_path: Path, model_dir: Path, rows: list[dict[str, str]]
) -> None:
    task = Measure("echo", write_task(tmp_path / "tasks", "echo", rows))
    model, tokenizer = load(model_dir, HARDWARE)
    bench = evaluator(tmp_path / "tasks")
    before = bench.score(model, tokenizer, [task])["echo"].value
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    assert bench.score(model, tokenizer, [task])["echo"].value < before


def test_groups_filters_and_bootstrapped_errors(
    tmp_path: Path, loaded: tuple[Any, Any], rows: list[dict[str, str]]
) -> None:
    folder = tmp_path / "tasks"
    right = [row for row in rows if row["answer"] != "never"]
    median = [{"metric": "exact_match", "aggregation": "median", "higher_is_better": True}]
    write_task(folder, "right", right)
    write_task(folder, "mixed", rows)
    write_task(folder, "middle", rows, metric_list=median)
    write_task(
        folder,
        "filtered",
        rows,
        filter_list=[
            {"name": "first", "filter": [{"function": "regex", "regex_pattern": "(.)"}]},
            {"name": "whole", "filter": [{"function": "take_first"}]},
        ],
    )
    (folder / "all.yaml").write_text(
        "group: all\ntask: [right, mixed]\naggregate_metric_list:\n"
        "  - {metric: exact_match, weight_by_size: true}\n"
    )
    names = ("right", "mixed", "middle", "all")
    scores = evaluator(folder).score(
        *loaded,
        [
            *(Measure(name, name) for name in names),
            Measure("whole", "filtered", "exact_match,whole"),
            Measure("first", "filtered", "exact_match"),
        ],
    )
    assert scores["right"].value == 1
    assert (scores["all"].samples, scores["all"].higher_is_better) == (28, True)
    assert scores["all"].value == pytest.approx((8 + 20 * scores["mixed"].value) / 28)
    assert scores["all"].stderr is not None
    assert scores["middle"].stderr is not None and scores["middle"].stderr >= 0
    assert scores["whole"].metric == "exact_match,whole"
    assert scores["whole"].value == scores["mixed"].value
    assert scores["first"].metric == "exact_match,first"
    assert scores["first"].others == {"exact_match,whole": scores["mixed"].value}
    with pytest.raises(StepError, match=r"no metric 'exactmatch'.*Did you mean 'exact_match'"):
        evaluator(folder).score(*loaded, [Measure("m", "mixed", "exactmatch")])


def test_the_process_is_left_as_it_was_found(
    tmp_path: Path,
    model_dir: Path,
    rows: list[dict[str, str]],
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("multiprocessing.Pool")  # lm_eval's bootstrap would fork one
    median = [{"metric": "exact_match", "aggregation": "median", "higher_is_better": True}]
    task = Measure("m", write_task(tmp_path / "tasks", "m", rows, metric_list=median))
    caplog.set_level(logging.DEBUG)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    threads = torch.get_num_threads()
    loggers = {n: logging.getLogger(n).level for n in ("lm_eval", "transformers", "datasets")}
    expected = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    bench = Evaluator(Evaluation(), hardware=Hardware(threads=threads + 1), tasks_path=tmp_path / "tasks")
    inside: set[int] = set()
    bench.evaluate(model_dir, [task], progress=lambda *_: inside.add(torch.get_num_threads()))
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert state == expected
    assert (torch.get_num_threads(), inside) == (threads, {threads + 1})
    assert loggers == {name: logging.getLogger(name).level for name in loggers}
    assert capfd.readouterr() == ("", "")
    assert [r.name for r in caplog.records if r.name.startswith(("lm_eval", "mergelab"))] == []


def test_a_small_model_is_measured_in_one_thread(
    tmp_path: Path, model_dir: Path, rows: list[dict[str, str]]
) -> None:
    import torch

    task = Measure("echo", write_task(tmp_path / "tasks", "echo", rows))
    bench = Evaluator(Evaluation(), hardware=Hardware(), tasks_path=tmp_path / "tasks")
    inside: set[int] = set()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        bench.evaluate(model_dir, [task], progress=lambda *_: inside.add(torch.get_num_threads()))
        assert (torch.get_num_threads(), inside) == (2, {1})
    finally:
        torch.set_num_threads(before)


def test_progress_counts_every_prompt(
    tmp_path: Path, loaded: tuple[Any, Any], rows: list[dict[str, str]]
) -> None:
    one = Measure("one", write_task(tmp_path / "tasks", "a", rows))
    two = Measure("two", write_task(tmp_path / "tasks", "b", rows[:3]))
    seen: list[tuple[str, int, int]] = []
    evaluator(tmp_path / "tasks").score(*loaded, [one, two], progress=lambda *at: seen.append(at))
    assert seen == [("one", n + 1, 20) for n in range(20)] + [("two", n + 1, 3) for n in range(3)]


def test_templates_are_compiled_once_a_task_not_once_a_prompt(
    tmp_path: Path, loaded: tuple[Any, Any], rows: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.utils import env

    task = Measure("echo", write_task(tmp_path / "tasks", "echo", rows))
    bench = evaluator(tmp_path / "tasks")
    bench.build([task])
    compiled: list[str] = []
    original = env.compile
    monkeypatch.setattr(
        env, "compile", lambda source, **o: (compiled.append(source), original(source, **o))[1]
    )
    bench.score(*loaded, [task])
    assert sorted(compiled) == ["{{answer}}", "{{prompt}}"]


def test_a_prompt_cut_short_is_worth_one_line(
    tmp_path: Path, loaded: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "a" * (70 + n), "answer": "a"} for n in range(20)]
    task = Measure("long", write_task(tmp_path / "tasks", "long", rows))
    with run_log.written(tmp_path / "mergelab.log"):
        evaluator(tmp_path / "tasks").score(*loaded, [task])
    told = (tmp_path / "mergelab.log").read_text(encoding="utf-8").splitlines()
    assert len([line for line in told if "truncat" in line]) == 1
    assert len([r for r in caplog.records if "truncat" in r.getMessage()]) > 1


def test_scores_are_reused_for_as_long_as_nothing_that_decides_them_changes(
    tmp_path: Path, model_dir: Path, rows: list[dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    copy, home, folder = tmp_path / "copy", tmp_path / "home", tmp_path / "tasks"
    shutil.copytree(model_dir, copy)
    task = Measure("echo", write_task(folder, "echo", rows))
    first = evaluator(folder, home).evaluate(copy, [task], fingerprint="one")
    shutil.rmtree(copy)  # from here on a score comes from the cache or not at all

    def known(fingerprint: str | None = "one", measure: Measure = task, **settings: Any) -> bool:
        bench = evaluator(folder, home, **settings)
        try:
            return bench.evaluate(copy, [measure], fingerprint=fingerprint) == first
        except StepError as error:
            assert "no config.json" in str(error)
            return False

    assert known()
    assert known(measure=replace(task, share=3.0))
    assert not known("two") and not known(None) and not known(cache=False)
    assert not known(measure=replace(task, metric="exact_match"))
    for setting in (
        {"num_fewshot": 1}, {"limit": 3}, {"batch_size": 8}, {"max_length": 32}
    ):  # fmt: skip
        assert not known(**setting)
    write_rows(folder / "echo.jsonl", rows[:-1])
    assert not known()
    write_rows(folder / "echo.jsonl", rows)
    assert known()
    config = (folder / "echo.yaml").read_text()
    (folder / "echo.yaml").write_text(config.replace("max_gen_toks: 4", "max_gen_toks: 5"))
    assert not known()
    (folder / "echo.yaml").write_text(config)

    (stored,) = (home / "scores").iterdir()
    whole = stored.read_text()
    for broken in ("", whole[:40], "[1]", '{"value": 1.0}'):
        stored.write_text(broken)
        caplog.clear()
        assert not known()
        assert "not a cached score" in caplog.text
    assert evaluator(folder, home).evaluate(model_dir, [task], fingerprint="one") == first
    assert stored.read_text() == whole

    other = Measure("other", write_task(folder, "other", rows[:3]))
    both = evaluator(folder, home).evaluate(model_dir, [other, task], fingerprint="one")
    assert (list(both), both["echo"]) == (["other", "echo"], first["echo"])
    names = {
        device: Evaluator(Evaluation(kind="tasks"), hardware=Hardware(device=device), tasks_path=folder).key(
            "one", task
        )
        for device in ("cpu", "cuda", "cuda:1")
    }
    assert names["cpu"] != names["cuda"] == names["cuda:1"]


def test_data_that_are_not_here_are_told_by_name(
    tmp_path: Path, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder, rows = tmp_path / "tasks", [{"prompt": "a", "answer": "a"}]
    write_task(folder, "far", rows, dataset_path="nobody/nothing", dataset_name="x", dataset_kwargs={})
    write_task(folder, "gone", rows)
    (folder / "gone.jsonl").unlink()
    (folder / "g.yaml").write_text("group: g\ntask: [gone]\naggregate_metric_list: [{metric: exact_match}]\n")
    bench = evaluator(folder)
    with pytest.raises(StepError, match=r"task 'far'.*'nobody/nothing', 'x'.*load_dataset\("):
        bench.build([Measure("far", "far")])
    for task in ("gone", "g"):
        with pytest.raises(StepError, match=r"task 'gone'.*gone\.jsonl"):
            bench.build([Measure("gone", task)])


def test_what_cannot_be_measured_is_told_in_a_sentence(
    tmp_path: Path, model_dir: Path, loaded: tuple[Any, Any], rows: list[dict[str, str]]
) -> None:
    folder = tmp_path / "tasks"
    long = {"until": ["\n"], "max_gen_toks": 200}
    write_task(folder, "long", rows, generation_kwargs=long)
    write_task(folder, "code", rows, unsafe_code=True)
    write_task(folder, "broken", rows, doc_to_text="{{nothing}}")
    bench = evaluator(folder)
    with pytest.raises(StepError, match=r"'l' \(task long\).*200.*maximum sequence length \(64\)"):
        bench.score(*loaded, [Measure("l", "long")])
    with pytest.raises(StepError, match="runs code"):
        bench.build([Measure("c", "code")])
    with pytest.raises(StepError, match=r"'broken' cannot be built.*nothing"):
        bench.build([Measure("b", "broken")])
    with pytest.raises(StepError, match=r"no lm_eval task 'lnog'.*Did you mean 'long'"):
        bench.build([Measure("l", "lnog")])

    with pytest.raises(StepError, match=r"no config\.json"):
        load(tmp_path, HARDWARE)
    from safetensors.torch import load_file, save_file

    missing_severity = tmp_path / "missing_severity"
    shutil.copytree(model_dir, missing_severity)
    weights = load_file(missing_severity / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, missing_severity / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StepError, match=r"lacks the weights model\.layers\.1\.mlp\.up_proj\.weight"):
        load(missing_severity, HARDWARE)
    (missing_severity / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(StepError, match="cannot be loaded"):
        load(missing_severity, HARDWARE)


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "lm_eval", "transformers", "datasets", "numpy")
    code = f"import sys, mergelab.evaluation; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
