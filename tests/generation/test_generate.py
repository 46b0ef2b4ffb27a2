"""job=generate: models asked side by side, by a pipe and in conversation; what is kept, what is refused."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, Outcome
from patience import within
from refusals import refuse, told

from mergelab.core.errors import InputError
from mergelab.generation import generator
from mergelab.generation.prompting import prompt_encoder
from mergelab.generation.settings import findings
from mergelab.generation.streaming import BROKEN, Stream
from mergelab.schema import Generate, Hardware, Run
from mergelab.steps.generate import shown

ASKED = {"math": ("507+3=", "015"), "japanese": ("ぬつ>", "nutsu"), "code": ("rev(evdc)", "cdve"),
         "physics": ("135kg>g:", "135000")}  # fmt: skip
"""A question of each skill, and its answer."""

WORDY = "1"
"""A prompt to which the base answers for as long as it may."""


def prompts(*texts: str) -> str:
    return "generate.prompts=" + json.dumps(texts, ensure_ascii=False)


def lines(out: Outcome) -> list[dict[str, Any]]:
    assert out.status == 0, out.out + out.err
    assert out.err == ""
    text = (out.folder / "generations.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def texts(out: Outcome) -> dict[tuple[str, str], str]:
    return {(a["model"], a["prompt"]): a["text"] for a in lines(out)}


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | changes), encoding="utf-8")


@pytest.fixture
def changed(family: Any, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a member of the family with another template or other values in its files."""

    def make(role: str, template: str | None = "", **files: dict[str, Any]) -> Path:
        folder = tmp_path / "changed" / f"{role}{len(list(tmp_path.glob('changed/*')))}"
        shutil.copytree(family.checkpoint(role), folder)
        if template:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        elif template is None:
            (folder / "chat_template.jinja").unlink()
        for name, changes in files.items():
            edit(folder / f"{name}.json", **changes)
        return folder

    return make


# ---------------------------------------------------------------- prompts in, text out


def test_each_expert_is_right_on_its_own_skill(mergelab: Command) -> None:
    out = mergelab("job=generate", prompts(*(p for p, _ in ASKED.values())))
    found = texts(out)
    models = ["base", "math", "physics", "code", "japanese"]
    assert list(found) == [(m, p) for m in models for p, _ in ASKED.values()]
    for role, (prompt, answer) in ASKED.items():
        right = [m for m in models if found[m, prompt] == answer]
        assert right == [role]
    # The table: a row for each prompt, a column for each model.
    rows = [line.split() for line in out.out.splitlines()]
    assert models in rows
    assert ["rev(evdc)", *(found[m, "rev(evdc)"] for m in models)] in rows
    assert "4 prompts x 5 models" in out.out
    said = out.result["generation"]
    assert [(m, said[m]["path"], said[m]["answers"]) for m in said] == [(m, f"zoo:{m}", 4) for m in models]


def test_a_line_says_what_was_asked_and_how_it_was_answered(mergelab: Command) -> None:
    (line,) = lines(mergelab("job=generate", prompts("507+3="), "generate.models=[math]", "seed=7"))
    assert line["seconds"] > 0 and line["tokens_per_second"] > 0
    assert {k: v for k, v in line.items() if not k.startswith(("seconds", "tokens_per"))} == {
        "model": "math", "path": "zoo:math", "prompt": "507+3=", "text": "015", "ended": "end",
        "messages": [{"role": "user", "content": "507+3="}], "input": "507+3=",
        "prompt_tokens": 6, "tokens": 4,
        "settings": {"seed": 7, "max_new_tokens": 256, "temperature": 0.0, "top_p": 1.0, "top_k": 0,
                     "repetition_penalty": 1.0},
    }  # fmt: skip


def test_one_model_answers_below_each_prompt(mergelab: Command) -> None:
    out = mergelab("job=generate", prompts("507+3=", "ぬつ>"), "generate.models=[japanese]")
    assert "> 507+3=\n115\n\n> ぬつ>\nnutsu\n\n" in out.out
    assert "2 prompts x 1 model, " in out.out


def test_prompts_come_from_a_file_of_lines(mergelab: Command, tmp_path: Path) -> None:
    file = tmp_path / "my prompts.txt"
    file.write_bytes("\ufeff507+3=\r\n\n  \nぬつ>".encode())
    out = mergelab("job=generate", prompts("12"), f"generate.file='{file}'", "generate.models=[base]")
    assert [a["prompt"] for a in lines(out)] == ["12", "507+3=", "ぬつ>"]


def test_prompts_come_from_json_lines_and_may_have_several_lines(mergelab: Command, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "507+3=", "id": 1}\n\n{"prompt": "a\\nb\u2028c"}\n', encoding="utf-8")
    out = mergelab("job=generate", f"generate.file={file}", "generate.models=[base,math]",
                   "generate.max_new_tokens=3")  # fmt: skip
    assert [a["prompt"] for a in lines(out)] == ["507+3=", "a\nb\u2028c"] * 2
    # Not one line each: a block for each prompt, with the models' names as labels.
    assert "> 507+3=\nbase  115" in out.out and "> a\n> b" in out.out
    assert "· cut at generate.max_new_tokens: 2 answers of base, 2 answers of math\n" in out.out


def test_long_answers_fit_eighty_columns(mergelab: Command) -> None:
    out = mergelab("job=generate", prompts("12", "1" * 60), "generate.models=[base,math,code]")
    assert max(map(len, out.out.splitlines())) <= 80
    assert out.out.count("\n> ") == 2


def test_the_page_has_each_prompt_once_with_all_answers(mergelab: Command) -> None:
    out = mergelab("job=generate", prompts("507+3=", "```:x:"), "generate.models=[base,math]")
    lines(out)
    page = (out.folder / "generations.md").read_text(encoding="utf-8")
    first, second = page.split("\n## 1\n")[1].split("\n## 2\n")
    assert first.startswith("\n```text\n507+3=\n```\n")
    assert first.index("**base**") < first.index("115") < first.index("**math**") < first.index("015")
    assert second.startswith("\n````text\n```:x:\n````\n")
    assert second.count("**base**") == second.count("**math**") == 1
    assert "```:x:" in out.out  # which is no emoji
    assert "- math: `zoo:math`" in page and "seed=0, max_new_tokens=256, temperature=0," in page


def test_the_merged_model_is_found_by_its_run(mergelab: Command) -> None:
    made = mergelab("experts=single_math", "method=linear", "method.base=none", "eval=none")
    assert made.status == 0, made.err
    alone = lines(mergelab("job=generate", f"generate.path={made.folder}", prompts("507+3=")))
    assert [(a["model"], a["path"], a["text"]) for a in alone] == [
        ("merged", str(made.folder / "model"), "015")
    ]
    beside = mergelab(
        "job=generate", f"generate.path={made.folder / 'model'}", "generate.models=[base,merged]",
        prompts("507+3="),
    )  # fmt: skip
    assert texts(beside) == {("base", "507+3="): "115", ("merged", "507+3="): "015"}


def test_what_is_not_asked_need_not_be_there(mergelab: Command, family: Any) -> None:
    path = f"generate.path={family.checkpoint('math')}"
    out = mergelab("job=generate", "model=qwen7b", path, prompts("507+3="))
    assert texts(out) == {("merged", "507+3="): "015"}
    out = mergelab("job=generate", "experts.code.path=/nowhere", "generate.models=[math]", prompts("507+3="))
    assert texts(out) == {("math", "507+3="): "015"}


def test_a_recipe_of_mergekit_names_the_models(mergelab: Command, family: Any, tmp_path: Path) -> None:
    base, math = family.checkpoint("base"), family.checkpoint("math")
    recipe = f"merge_method: task_arithmetic\nbase_model: {base}\nmodels: [{{model: {math}}}]\n"
    (tmp_path / "my.yaml").write_text(recipe, encoding="utf-8")
    out = mergelab(
        "job=generate", "method=mergekit", f"method.path={tmp_path / 'my.yaml'}", prompts("507+3=")
    )
    assert texts(out) == {("base", "507+3="): "115", ("math", "507+3="): "015"}


# ---------------------------------------------------------------- how it is answered


def test_the_seed_decides_and_neither_order_nor_company_does(mergelab: Command) -> None:
    sampled = ["job=generate", "generate.temperature=2.0", "generate.max_new_tokens=12"]
    first = texts(mergelab(*sampled, prompts("507+3=", "ab", "ぬつ>"), "generate.models=[base,math]"))
    other = texts(mergelab(*sampled, prompts("ぬつ>", "507+3="), "generate.models=[math]"))
    assert other == {key: first[key] for key in other}
    assert len(set(first.values())) > 3  # it is sampled
    assert texts(mergelab(*sampled, prompts("507+3=", "ab", "ぬつ>"), "seed=1")) != first


def test_sampling_settings_act(mergelab: Command) -> None:
    common = ["job=generate", prompts("ab"), "generate.models=[math]", "generate.max_new_tokens=8"]
    greedy = texts(mergelab(*common))
    hot = [*common, "generate.temperature=5.0"]
    assert texts(mergelab(*hot)) != greedy
    assert texts(mergelab(*hot, "generate.top_k=1")) == greedy
    assert texts(mergelab(*hot, "generate.top_p=1e-6")) == greedy


def test_what_has_been_said_becomes_less_likely(mergelab: Command) -> None:
    wordy = ["job=generate", prompts(WORDY), "generate.models=[base]", "generate.max_new_tokens=8"]
    assert list(texts(mergelab(*wordy)).values()) == [WORDY * 8]
    (varied,) = texts(mergelab(*wordy, "generate.repetition_penalty=20.0")).values()
    assert WORDY not in varied


def test_the_models_own_sampling_defaults_do_not_count(mergelab: Command, changed: Any) -> None:
    own = {"do_sample": True, "temperature": 9.0, "top_k": 300, "max_new_tokens": 1, "num_beams": 3,
           "repetition_penalty": 9.0, "no_repeat_ngram_size": 1}  # fmt: skip
    folder = changed("math", generation_config=own)
    out = mergelab("job=generate", f"generate.path={folder}", prompts("990+1=", "11+0="))
    plain = mergelab("job=generate", "generate.models=[math]", prompts("990+1=", "11+0="))
    assert [a["text"] for a in lines(out)] == [a["text"] for a in lines(plain)]


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_the_chat_template_is_applied_where_there_is_one(mergelab: Command, changed: Any) -> None:
    folder = changed("math", TEMPLATE)
    asked = ["job=generate", f"generate.path={folder}", prompts("507+3="), "generate.max_new_tokens=2"]
    (line,) = lines(mergelab(*asked, "generate.system=Be brief."))
    assert line["input"] == "<system>Be brief.</><user>507+3=</><assistant>"
    assert line["messages"] == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "507+3="},
    ]  # fmt: skip
    assert line["prompt_tokens"] == len(line["input"])  # each of its characters is a token
    (line,) = lines(mergelab(*asked, "generate.chat_template=false"))
    assert (line["input"], line["messages"], line["text"]) == ("507+3=", None, "01")
    (line,) = lines(mergelab("job=generate", f"generate.path={changed('math', None)}", prompts("507+3=")))
    assert (line["input"], line["messages"], line["text"]) == ("507+3=", None, "015")


def test_an_answer_ends_where_the_template_ends_a_turn(mergelab: Command, changed: Any) -> None:
    # A model that ends its answers as its template does, while neither config nor tokenizer tells.
    end = "{% if m.role == 'assistant' %}<|endoftext|>{% endif %}"
    template = "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"
    folder = changed(
        "math", template, config={"eos_token_id": None}, generation_config={"eos_token_id": None},
        tokenizer_config={"eos_token": "<|pad|>"},
    )  # fmt: skip
    asked = ["job=generate", f"generate.path={folder}", prompts("507+3=")]
    (line,) = lines(mergelab(*asked))
    assert (line["text"], line["ended"]) == ("015", "end")
    out = mergelab(*asked, "generate.chat_template=false")
    (line,) = lines(out)
    assert line["ended"] == "context" and line["text"].startswith("015") and len(line["text"]) > 3
    assert "· cut where its context is full: 1 answer of merged" in out.out


def test_the_context_bounds_the_answer(mergelab: Command) -> None:
    (line,) = lines(mergelab("job=generate", prompts(WORDY * 60), "generate.models=[base]"))
    assert (line["ended"], line["prompt_tokens"], line["tokens"]) == ("context", 60, 4)


def test_an_adapter_is_put_on_its_base(mergelab: Command, family: Any, tmp_path: Path) -> None:
    lora, whole = make_adapter(family, tmp_path)
    asked = prompts(*(p for p, _ in ASKED.values()), "12", "ab", "しか")
    out = mergelab(
        "job=generate", f"experts.lora.path={family.checkpoint('base')}+{lora}", f"generate.path={whole}",
        "generate.models=[base,lora,merged]", asked,
    )  # fmt: skip
    found: dict[str, list[str]] = {}
    for (model, _), text in texts(out).items():
        found.setdefault(model, []).append(text)
    assert found["lora"] == found["merged"] != found["base"]


def make_adapter(family: Any, tmp_path: Path) -> tuple[Path, Path]:
    """A LoRA for the base, and the base with it merged in."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = family.checkpoint("base")
    base = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["down_proj"], task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(tmp_path / "lora")
    model.merge_and_unload().save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "whole")
    return tmp_path / "lora", tmp_path / "whole"


def test_an_adapter_that_does_not_fit_is_an_error(mergelab: Command, family: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    lora, _ = make_adapter(family, tmp_path)
    asked = ["job=generate", f"experts.lora.path={family.checkpoint('base')}+{lora}", prompts("1"),
             "generate.models=[lora]"]  # fmt: skip
    weights = load_file(lora / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, lora / "adapter_model.safetensors")
    out = mergelab(*asked)
    assert out.status == 1
    (error,) = told(out)
    assert "adapter" in error and "does not fit its base: 1 weights have no match" in error
    edit(lora / "adapter_config.json", peft_type="IA3")
    out = mergelab(*asked, "hardware.quantize=int8")
    assert out.status == 2
    first, *others = told(out)
    assert first.startswith(f"experts.lora: {lora} cannot be used with {family.checkpoint('base')}: ")
    assert others == [
        "hardware.quantize: int8 is not possible with the adapter of lora on a CPU "
        "Set hardware.quantize=none.",
    ]


def test_models_may_be_quantised(mergelab: Command) -> None:
    out = mergelab("job=generate", prompts("507+3="), "generate.models=[math]", "hardware.quantize=int8")
    assert texts(out) == {("math", "507+3="): "015"}


def test_models_are_in_memory_one_at_a_time(mergelab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen, alive = generator.load, [], []

    def load(path: Path, hardware: Hardware, **options: Any) -> tuple[Any, Any]:
        alive.append([r for r in seen if r() is not None])
        model, tokenizer = real(path, hardware, **options)
        seen.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(generator, "load", load)
    lines(mergelab("job=generate", prompts("1"), "generate.models=[base,math,code]"))
    assert alive == [[], [], []]


def test_what_was_answered_before_an_interruption_is_kept(
    mergelab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, names = generator.load, []

    def load(path: Path, hardware: Hardware, **options: Any) -> tuple[Any, Any]:
        names.append(path.name)
        if path.name == "code":
            raise KeyboardInterrupt
        return real(path, hardware, **options)

    monkeypatch.setattr(generator, "load", load)
    out = mergelab("job=generate", prompts("507+3="), "generate.models=[base,math,code]")
    assert (out.status, names, out.result["status"]) == (130, ["base", "math", "code"], "interrupted")
    kept = (out.folder / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in kept] == ["115", "015"]
    assert "015" in (out.folder / "generations.md").read_text(encoding="utf-8")
    (error,) = told(out)
    assert error.startswith("interrupted; what was answered is in ") and error.endswith("generations.jsonl")


# ---------------------------------------------------------------- streaming


def pieces(tokenizer: Any, prompt: list[int], ids: list[int]) -> list[str]:
    import torch

    found: list[str] = []
    stream = Stream(tokenizer, found.append)
    stream.put(torch.tensor([prompt]))
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert stream.text == "".join(found)
    return found


def test_characters_are_streamed_whole(family: Any) -> None:
    own = prompt_encoder("base", family.checkpoint("base"), Generate(), None)
    text = "ぬカ漢字🙂é \n\nです"
    ids = own.tokenizer(text)["input_ids"]
    assert len(ids) > len(text)  # most of them are several bytes, a token each
    found = pieces(own.tokenizer, own.tokenizer("漢>")["input_ids"], ids)
    assert found == list(text)
    # Cut in the middle of a character: what is whole is there, and nothing else.
    end = own.tokenizer("ぬ漢")["input_ids"][:-1]
    assert pieces(own.tokenizer, [5], end) == ["ぬ"]


def test_bytes_that_are_no_character_do_not_hold_up_what_follows(family: Any) -> None:
    own = prompt_encoder("base", family.checkpoint("base"), Generate(), None)
    lone = own.tokenizer("漢")["input_ids"][0]
    assert "".join(pieces(own.tokenizer, [5], [lone, *own.tokenizer("ab")["input_ids"]])) == f"{BROKEN}ab"


def test_the_space_before_the_first_word_is_kept() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"▁Hello": 0, "▁world": 1}, unk_token="▁Hello"))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer.decode([1]) == "world"
    assert pieces(tokenizer, [0], [1, 1]) == [" world", " world"]


def test_an_answer_arrives_in_pieces(family: Any) -> None:
    run = Run(generate=Generate(), hardware=Hardware())
    folder = family.checkpoint("japanese")
    loaded = generator.load_generator(prompt_encoder("japanese", folder, run.generate, 64), folder, None, run)
    found: list[str] = []
    answer = loaded.answer(loaded.encoder.encode([{"role": "user", "content": "ぬつ>"}]), found.append)
    assert found == list("nutsu") and answer.text == "nutsu"


def test_what_would_steer_the_terminal_is_shown_instead() -> None:
    assert shown("a\tb\n\x1b[31mred\x07\x9b\x7f") == "a\tb\n␛[31mred␇\ufffd\ufffd"


# ---------------------------------------------------------------- what is refused


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "ranges": (
        ["generate.max_new_tokens=0", "generate.temperature=-1", "generate.top_p=1.5", "generate.top_k=-2",
         "generate.repetition_penalty=0", "generate.models=[math,math]", prompts("507+3=", " ")],
        ["generate.prompts: prompt 2: it is empty",
         "generate.models: 'math' is named 2 times",
         "generate.max_new_tokens: 0 is out of range; at least 1",
         "generate.temperature: -1 is out of range; at least 0 (0: the most likely token)",
         "generate.top_p: 1.5 is out of range; above 0, at most 1",
         "generate.top_k: -2 is out of range; at least 0 (0: all tokens)",
         "generate.repetition_penalty: 0 is out of range; above 0 (1: none)"],
    ),
    "without effect": (
        ["generate.top_p=0.9", "generate.top_k=5", "generate.system=x", "generate.chat_template=false",
         "generate.path=/x", "generate.models=[base]", prompts("1")],
        ["generate.path: it has no effect unless generate.models names 'merged' Leave it out.",
         "generate.system: it has no effect with generate.chat_template=false, which sends prompts as they "
         "are Leave it out.",
         "generate.top_p, generate.top_k: it has no effect with generate.temperature=0, which always takes "
         "the most likely token Set generate.temperature above 0."],
    ),
    "merged without a path": (
        ["generate.models=[base,merged]", "generate.temperature=nan", prompts("1")],
        ["generate.path: is not set, but generate.models names 'merged'; set it to the model's folder",
         "generate.temperature: nan is out of range; at least 0 (0: the most likely token)"],
    ),
    "unknown models": (
        ["experts=single_math", "experts.law.weight=1", "generate.models=[bass,law,nobody]", prompts("1")],
        ["experts.law: model=tiny has no role 'law'. It has code, general, japanese, math, physics. Choose "
         "another expert set, leave it out with '~experts.law', or name a model: experts.law.path=...",
         "generate.models: 'bass' is none of base, math, law, merged. Did you mean 'base'?",
         "generate.models: 'nobody' is none of base, math, law, merged."],
    ),
    "not there": (
        ["generate.path=/nowhere", "experts.math.path=/nowhere", "experts.code.path=/nor/here",
         "generate.models=[merged,base,math]", prompts("1")],
        ["generate.path: /nowhere is not a folder", "experts.math: /nowhere does not exist"],
    ),
    "too long": (
        [prompts("1", *(str(n) * 64 for n in range(9))), "generate.models=[base,math]"],
        [*(f"prompt {n}: 64 tokens leave no room for an answer in a context of 64: base, math"
           for n in (2, 3, 4)),
         "and so on, 6 more refusals"],
    ),
    "not on this machine": (
        ["model=qwen7b", "experts=single_math", "generate.models=[base]", prompts("1")],
        ["model.base: not on this machine: Qwen/Qwen2.5-7B@d14972939875 Fetch first: "
         "python -m mergelab job=fetch model=qwen7b experts=single_math"],
    ),
    "no GPU": (
        ["hardware=gpu", "generate.models=[base]", prompts("1")],
        ["hardware.device: 'cuda', but torch sees no CUDA device here "
         "Use hardware=cpu, or a machine with a GPU and torch's CUDA build."],
    ),
}  # fmt: skip


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight may be read."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(generator, "load", load)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, mergelab: Command, tmp_path: Path) -> None:
    if case == "no GPU":
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU here")
    arguments, wanted = REFUSED[case]
    assert refuse(mergelab, ["job=generate", *arguments], tmp_path) == wanted


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("none.txt", None, "cannot read FILE: No such file or directory"),
        ("empty.txt", b"\n \n", "FILE has no prompt"),
        ("latin.txt", b"ok\nh\xe9llo\n", "FILE, line 2 is not UTF-8"),
        ("bad.jsonl", b'{"prompt": "a"}\n{"prompt"\n',
         "FILE, line 2 is not JSON: Expecting ':' delimiter (column 10)"),
        ("other.jsonl", b'{"promt": "a"}', "FILE, line 1 is not an object with the key 'prompt'"),
        ("list.jsonl", b'["a"]', "FILE, line 1 is not an object with the key 'prompt'"),
        ("deep.jsonl", b"[" * 100_000, "FILE, line 1 is JSON that is nested too deeply"),
        ("number.jsonl", b'{"prompt": 3}', "FILE, line 1, the key 'prompt': 3 is not a text"),
        ("blank.JSONL", b'{"prompt": " "}', "FILE, line 1, the key 'prompt': it is empty"),
    ],
)  # fmt: skip
def test_files_that_hold_no_prompts(name: str, content: bytes | None, wanted: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    said = [("generate.file", wanted.replace("FILE", str(file)))]
    assert [(f.place, f.message) for f in findings(Generate(file=str(file)))] == said


@pytest.mark.parametrize(
    ("template", "settings", "wanted"),
    [
        (None, Generate(system="x"),
         "generate.system: it has no effect on math, which has no chat template\n"
         "Leave it out, or ask other models."),
        (None, Generate(chat_template=True),
         "generate.chat_template: math has none\nLeave it out, or ask other models."),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages }}",
         Generate(system="x"), "math: its chat template rejects it: TemplateError: no system."),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
         Generate(system="xyz"), "math: its chat template leaves generate.system out"),
    ],
)  # fmt: skip
def test_templates_that_cannot_do_it(
    template: str | None, settings: Generate, wanted: str, changed: Any
) -> None:
    with pytest.raises(InputError) as told:
        prompt_encoder("math", changed("math", template), settings, 64)
    assert str(told.value) == wanted


@pytest.mark.usefixtures("unread")
def test_a_model_without_a_template_is_refused_where_one_is_wanted(
    mergelab: Command, changed: Any, tmp_path: Path
) -> None:
    asked = [f"generate.path={changed('math', None)}", "generate.models=[merged,base]", prompts("1")]
    wanted = ["generate.chat_template: merged has none Leave it out, or ask other models."]
    assert refuse(mergelab, ["job=generate", "generate.chat_template=true", *asked], tmp_path) == wanted


@pytest.mark.usefixtures("unread")
def test_damaged_models_are_refused(mergelab: Command, changed: Any, tmp_path: Path) -> None:
    folder = changed("math")
    (folder / "tokenizer.json").unlink()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    damaged, without = refuse(mergelab, ["job=generate", f"generate.path={folder}", prompts("1")], tmp_path)
    assert damaged.startswith(f"generate.path: {weights} is damaged or truncated")
    assert without == f"generate.path: {folder} has no tokenizer"


# ---------------------------------------------------------------- a pipe, and a terminal


class Pipe(io.TextIOWrapper):
    """Standard input with some bytes in it."""

    def __init__(self, content: bytes = b"", *, terminal: bool = False):
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize("stdin", [Pipe(b"\n\n"), None], ids=["blank", "closed"])
def test_nothing_asked_is_refused(
    stdin: Any, mergelab: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.stdin", stdin)
    (error,) = refuse(mergelab, ["job=generate"], tmp_path)
    assert error.startswith("generate.prompts: it is empty, and standard input has no prompt Name prompts,")


def environment() -> dict[str, str]:
    return os.environ | {"TERM": "dumb", "COLUMNS": "80", "PYTHONUTF8": "1"}


def test_a_pipe_brings_prompts(family: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mergelab", "job=generate", "generate.models=[japanese]"]
    done = subprocess.run(
        [*command, f"hydra.run.dir={tmp_path / 'run'}"], input="ぬつ>\n\n507+3=\n".encode(),
        capture_output=True, check=True, env=environment(),
    )  # fmt: skip
    assert "> ぬつ>\nnutsu\n\n> 507+3=\n115\n\n" in done.stdout.decode()
    assert done.stderr == b""


@pytest.fixture
def typing(mergelab: Command, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """The command with a terminal at which lines are typed; an exception is a key such as Ctrl-D."""

    def run(typed: list[str | type[BaseException]], *arguments: str) -> Outcome:
        coming = iter(typed)

        def line(prompt: str = "") -> str:
            print(prompt, end="", flush=True)
            key = next(coming)
            if isinstance(key, str):
                print(key)
                return key
            raise key

        monkeypatch.setattr("sys.stdin", Pipe(terminal=True))
        monkeypatch.setattr("builtins.input", line)
        return mergelab("job=generate", *arguments)

    return run


def test_a_conversation_goes_on_until_it_is_reset(typing: Any, changed: Any) -> None:
    path = f"generate.path={changed('math', TEMPLATE)}"
    out = typing(["1", "2", "/reset", "3", EOFError], path, "generate.max_new_tokens=1", "generate.system=S")
    first, second, third = lines(out)
    assert first["input"] == "<system>S</><user>1</><assistant>"
    assert second["input"] == f"<system>S</><user>1</><assistant>{first['text']}</><user>2</><assistant>"
    assert third["input"] == "<system>S</><user>3</><assistant>"
    assert "· A new conversation.\n" in out.out and "3 turns x 1 model" in out.out


def test_each_model_has_a_conversation_of_its_own(typing: Any) -> None:
    out = typing(["507+3=", "12", "/exit"], "generate.models=[base,math]")
    found = lines(out)
    assert [(a["model"], a["input"]) for a in found] == [
        ("base", "507+3="), ("math", "507+3="),
        ("base", "507+3=11512"), ("math", "507+3=01512"),
    ]  # fmt: skip
    assert "> 507+3=\nbase  115\nmath  015\n" in out.out
    assert "base, math: /reset starts over, /exit ends, Ctrl-C stops an answer.\n" in out.out
    page = (out.folder / "generations.md").read_text(encoding="utf-8")
    assert page.count("\n## ") == 2


def test_without_a_template_each_line_is_asked_by_itself(typing: Any) -> None:
    out = typing(["507+3=", "507+3=", "/exit"], "generate.models=[math]", "generate.chat_template=false")
    assert [a["input"] for a in lines(out)] == ["507+3="] * 2
    assert "· Without a chat template each line is asked by itself: math.\n" in out.out


def test_what_is_no_prompt_is_not_asked(typing: Any) -> None:
    typed = ["", "/rest", "1" * 64, "\udcff", KeyboardInterrupt, "507+3=", EOFError]
    out = typing(typed, "generate.models=[math]")
    assert [a["text"] for a in lines(out)] == ["015"]
    shown = " ".join(out.out.split())
    assert "There is no command /rest. Did you mean '/reset'?" in shown
    assert "math was not asked: 64 tokens leave no room for an answer in a context of 64." in shown
    assert "is not UTF-8" in shown
    assert shown.count("Ctrl-C stops an answer.") == 3  # at first, after /rest, after Ctrl-C


def test_a_conversation_may_be_empty(typing: Any) -> None:
    out = typing([EOFError], "generate.models=[math]")
    assert lines(out) == [] and "0 turns x 1 model" in out.out


class Terminal:
    """The command at a real pseudo-terminal."""

    def __init__(self, *arguments: str):
        command = [sys.executable, "-m", "mergelab", "job=generate", *arguments]
        self._screen, self._seen, self._status = b"", 0, -1
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # which whatever runs the tests may ignore
            os.execvpe(sys.executable, command, environment())

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def until(self, text: str) -> str:
        """What has come since the last time, up to a text that is waited for."""
        wanted = text.encode()
        while (at := self._screen.find(wanted, self._seen)) < 0:
            assert self._read(), f"ended before {text!r}:\n{self._screen.decode(errors='replace')}"
        come, self._seen = self._screen[self._seen : at], at + len(wanted)
        return come.decode()

    def interrupt_until(self, text: str) -> None:
        """Press Ctrl-C until a text comes; a prompt of Python does not see one just before it waits."""
        while text.encode() not in self._screen[self._seen :]:
            self.type("\x03")
            while select.select([self._fd], [], [], 2)[0] and text.encode() not in self._screen[self._seen :]:
                assert self._read(), f"ended before {text!r}"
        self.until(text)

    def ended(self) -> int:
        """The exit status, when it has one."""
        while self._read():
            pass
        self._pid, self._status = 0, os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._status

    def close(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._fd)

    def _read(self) -> bool:
        try:
            more = os.read(self._fd, 4096)
        except OSError:  # so Linux says that the other side is closed
            return False
        self._screen += more
        return bool(more)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        started.append(Terminal(*arguments, f"hydra.run.dir={tmp_path / 'run'}"))
        return started[-1]

    with within(150):
        yield start
    for t in started:
        t.close()


@pytest.mark.slow
def test_a_conversation_at_a_terminal(terminal: Any, changed: Any, tmp_path: Path) -> None:
    # It answers for as long as it may, and it may for long.
    wordy = changed("base", config={"max_position_embeddings": 100_000})
    t = terminal(
        f"generate.path={wordy}", "generate.models=[merged,japanese]", "generate.max_new_tokens=90000"
    )
    t.until("Ctrl-C stops an answer.")
    t.until("> ")
    t.type(f"{WORDY}\n")
    t.until("merged  1111")  # it is shown while it is written
    t.type("\x03")
    t.until("stopped by Ctrl-C")
    t.until("japanese  ")  # and the other one answers
    t.until("\n> ")
    t.interrupt_until("/exit ends")  # at the prompt it ends nothing either
    t.until("\n> ")
    t.type("/reset\n")
    t.until("A new conversation.")
    t.until("\n> ")
    t.type("ぬつ>\n")
    t.until("merged  nu-tsu")
    t.until("japanese  nutsu")
    t.until("\n> ")
    t.type("/exit\n")
    t.until("2 turns x 2 models")
    assert t.ended() == 0
    kept = [json.loads(line) for line in (tmp_path / "run" / "generations.jsonl").read_text().splitlines()]
    assert [(a["model"], a["prompt"]) for a in kept] == [
        ("merged", WORDY), ("japanese", WORDY), ("merged", "ぬつ>"), ("japanese", "ぬつ>"),
    ]  # fmt: skip
    assert kept[0]["ended"] == "stopped" and kept[0]["text"].startswith("1111")
    assert [a["text"] for a in kept[2:]] == ["nu-tsu", "nutsu"]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "done"
