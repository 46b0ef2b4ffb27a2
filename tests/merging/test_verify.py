"""Reading a model back: what is wrong is named, and a sound model of any kind passes in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from weights import change

from mergelab.merging import smoke_test, verify
from mergelab.schema import Hardware

CPU = Hardware()
UP = "model.layers.1.mlp.up_proj.weight"


def look(folder: Path, **options: Any) -> verify.Report:
    return verify.verify(folder, hardware=CPU, **options)


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def make(folder: Path, make_model: Callable[..., Path], **settings: Any) -> Path:
    """A model that has a chat template too."""
    return make_model(folder, **({"tied": False} | settings))


@pytest.fixture
def model(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    return make(tmp_path / "model", make_model)


# ---------------------------------------------------------------- sound models


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_sound(tied: bool, dtype: str, make_model: Any, tmp_path: Path, capfd: Any) -> None:
    folder = make(tmp_path / "m", make_model, tied=tied, dtype=dtype)
    capfd.readouterr()
    counts: list[tuple[str, int, int]] = []
    report = look(folder, progress=lambda *step: counts.append(step))
    assert capfd.readouterr() == ("", "")
    assert report.problems == []
    assert (report.smoke.tied, report.dtype) == (tied, dtype)
    assert report.smoke.prompt == "1+1="
    assert report.nbytes == report.parameters * (4 if dtype == "float32" else 2)
    assert counts == [("verify", n + 1, report.tensors) for n in range(report.tensors)]


def test_sound_with_the_head_stored_beside_the_embeddings(make_model: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "m", make_model, tied=True)
    change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    report = look(folder)
    assert report.problems == []
    assert report.smoke.tied


def test_each_tensor_is_read_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = verify._tensors

    def counting(file: Path, names: list[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in real(file, names):
            seen.append(name)
            yield name, tensor

    monkeypatch.setattr(verify, "_tensors", counting)
    report = look(model)
    assert len(seen) == len(set(seen)) == report.tensors


@pytest.mark.parametrize("prompt", ["3+4=", "A longer one,\nwith ＦＵＬＬ width and  blanks"])
def test_prompt_of_ones_own(prompt: str, model: Path) -> None:
    report = look(model, prompt=prompt)
    assert report.problems == []
    assert "".join(report.smoke.prompt.split()) == "".join(prompt.split())


# ---------------------------------------------------------------- damaged models


def poison(t: dict[str, torch.Tensor], value: float = float("nan")) -> None:
    t[UP].view(-1)[5] = value


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "nan": (lambda m: change(m, poison), f"{UP} has 1 entry that is NaN or infinite"),
    "infinity": (lambda m: change(m, lambda t: poison(t, float("-inf"))), f"{UP} has 1 entry that is NaN"),
    "missing tensor": (lambda m: change(m, lambda t: t.pop(UP)), f"missing keys: {UP}"),
    "left over tensor": (
        lambda m: change(m, lambda t: t.update({"model.layers.7.x.weight": torch.ones(3)})),
        "unexpected keys: model.layers.7.x.weight",
    ),
    "shape": (
        lambda m: change(m, lambda t: t.update({UP: torch.ones(47, 32)})),
        f"{UP} has shape [47, 32], but by config.json it has [48, 32]",
    ),
    "tied, but not equal": (
        lambda m: edit(m / "config.json", tie_word_embeddings=True),
        "lm_head.weight differs from model.embed_tokens.weight, although config.json says that they are tied",
    ),
    "untied, but no head": (
        lambda m: change(m, lambda t: t.pop("lm_head.weight")), "missing keys: lm_head.weight",
    ),
    "tokenizer file": (
        lambda m: edit(m / "tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": []}),
        "its tokenizer turns '1+1=' into no tokens",
    ),
    "layer types": (
        lambda m: edit(m / "config.json", layer_types=["full_attention"] * 2), "2 layer_types for 3 layers",
    ),
    "cut short": (
        lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-9]) and None,
        "model.safetensors is damaged or truncated",
    ),
    "weights gone": (lambda m: (m / "model.safetensors").unlink(), "no model.safetensors"),
    "template that forgets": (
        lambda m: (m / "chat_template.jinja").write_text("Hello") and None,
        "its chat template drops the user's message; it renders 'Hello'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(what: str, model: Path, capfd: Any) -> None:
    damage, said = DAMAGE[what]
    damage(model)
    capfd.readouterr()
    report = look(model)
    assert report.problems, "nothing was noticed"
    assert any(said in p for p in report.problems), report.problems
    assert all("\n" not in p for p in report.problems)
    assert capfd.readouterr() == ("", "")


UNFINISHED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "config": (
        lambda m: edit(m / "config.json", num_attention_heads="many"),
        "transformers cannot load it: Validation error for field 'num_attention_heads': TypeError: Field", "",
    ),
    "model type": (
        lambda m: edit(m / "config.json", model_type="qwen99"),
        "transformers cannot load it: The checkpoint you are trying to load has model type `qwen99`", "",
    ),
    "template that is none": (
        lambda m: (m / "chat_template.jinja").write_text("{% for m in %}") and None,
        "its chat template cannot be rendered", "generates",
    ),
    "template that refuses": (
        lambda m: (m / "chat_template.jinja").write_text("{{ raise_exception('no user here') }}") and None,
        "its chat template cannot be rendered: no user here", "generates",
    ),
    "tokenizer of a library that is not here": (
        lambda m: edit(m / "tokenizer_config.json", tokenizer_class="NobodysTokenizer", auto_map=None)
        or ((m / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}}}') and None),
        "transformers cannot load its tokenizer", "generates",
    ),
}  # fmt: skip
"""What says nothing against a model: how far the check came is kept apart from what is wrong."""


@pytest.mark.parametrize("what", UNFINISHED)
def test_a_check_that_fails_itself_is_kept_apart(what: str, model: Path, capfd: Any) -> None:
    damage, said, ran = UNFINISHED[what]
    damage(model)
    capfd.readouterr()
    report = look(model)
    (reason,) = report.unchecked
    assert reason.startswith(said)
    assert (report.problems, report.smoke.ran, report.sound) == ([], ran, False)
    assert "\n" not in reason
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_that_could_not_be_loaded_before_the_merge_is_no_reason(
    model: Path, tmp_path: Path
) -> None:
    for file in (*model.glob("token*"), *model.glob("chat_template*")):
        file.unlink()
    (model / "tekken.json").write_text("{}", encoding="utf-8")
    same = shutil.copytree(model, tmp_path / "same")
    (reason,) = look(model).unchecked
    assert reason.startswith("transformers cannot load its tokenizer")
    report = look(model, inputs={"math": same})
    (note,) = report.notes
    assert note.startswith("its tokenizer was not tried: transformers cannot load it, as in the input (")
    assert report.sound
    assert report.smoke.ran == "generates"


@pytest.mark.parametrize("where", ["model", "another layer", "adapter", "none"])
def test_nan_is_traced_to_the_input(where: str, model: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    inputs = {name: tmp_path / name for name in ("base", "math")}
    for folder in inputs.values():
        shutil.copytree(model, folder)
    change(model, poison)
    name, file = UP, tmp_path / "math" / "model.safetensors"
    if where == "model":
        change(tmp_path / "math", poison)
    elif where == "another layer":
        name = UP.replace(".1.", ".2.")
        change(tmp_path / "math", lambda t: t[name].view(-1)[0].fill_(float("nan")))
    elif where == "adapter":
        name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
        inputs["math's adapter"] = tmp_path / "adapter"
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        file.parent.mkdir()
        save_file({name: torch.full((2, 2), float("inf"))}, file)
    (problem,) = look(model, inputs=inputs, computed="float32").problems
    if where == "none":
        assert problem.endswith("the inputs are finite: lower the weights")
    else:
        assert f"so has {name} of math" in problem
        assert str(file) in problem


# ---------------------------------------------------------------- tokenizers of other families


def llama3(folder: Path) -> Any:
    """Byte-level BPE whose post-processor puts a beginning-of-text first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
    )  # fmt: skip
    t.train_from_iterator(["one + one = two", "1 + 1 = 2"], trainer)
    t.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
        ),
    ])  # fmt: skip
    return t


def llama2(folder: Path) -> Any:
    """SentencePiece's way: blanks as a mark, one in front, unknown signs as bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "1", "+", "=", "▁1", "▁+"]
    vocab = {token: i for i, token in enumerate(tokens)}
    t = Tokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "1"), ("▁", "+")], unk_token="<unk>", byte_fallback=True)
    )
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    t.add_special_tokens(["<unk>", "<s>", "</s>"])
    return t


def metaspace(folder: Path) -> Any:
    """The newer form of the same, with Metaspace; it has no signs for a sum."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    t = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    t.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    t.add_special_tokens(["<unk>", "<s>", "</s>"])
    return t


def speechless(folder: Path) -> Any:
    """Without an unknown token and without any sign of the usual prompt."""
    from tokenizers import Tokenizer, models

    return Tokenizer(models.BPE(vocab={x: i for i, x in enumerate("あいうえお")}, merges=[]))


def uncased(folder: Path) -> Any:
    """A normalizer that changes signs, and a decoder that puts blanks between words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    t = Tokenizer(models.WordLevel({"[UNK]": 0, "1": 1, "+": 2, "=": 3}, unk_token="[UNK]"))
    t.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return t


@pytest.fixture
def with_tokenizer(make_model: Any, tmp_path: Path) -> Callable[..., Path]:
    def build(tokenizer: Any, architecture: str = "llama") -> Path:
        folder = make(tmp_path / "m", make_model, architecture=architecture)
        for file in (*folder.glob("*token*"), folder / "chat_template.jinja"):
            file.unlink(missing_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        names = set(tokenizer.get_vocab())
        for key, choices in {
            "bos_token": ("<|begin_of_text|>", "<s>"), "eos_token": ("<|end_of_text|>", "</s>"),
            "unk_token": ("<unk>", "[UNK]"),
        }.items():  # fmt: skip
            settings[key] = next((c for c in choices if c in names), None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return folder

    return build


@pytest.mark.parametrize("kind", [llama3, llama2, metaspace, speechless, uncased])
def test_no_false_alarm(kind: Any, with_tokenizer: Any) -> None:
    report = look(with_tokenizer(kind(Path())))
    assert report.problems == []
    assert report.smoke.prompt if kind is speechless else True
    assert {llama3: "1+1=", llama2: "1+1="}.get(kind, report.smoke.prompt) == report.smoke.prompt.strip()


@pytest.mark.parametrize(("kind", "mark"), [(llama3, "Ġ"), (llama2, "▁")])
def test_tokenizer_that_lost_its_decoder(kind: Any, mark: str, with_tokenizer: Any) -> None:
    folder = with_tokenizer(kind(Path()))
    edit(folder / "tokenizer.json", decoder=None)
    (problem,) = look(folder).problems
    assert problem.startswith("its tokenizer turns '1 + 1 =' into ")
    assert mark in problem


# ---------------------------------------------------------------- devices, and the command


@pytest.mark.parametrize(("free", "device"), [(1200, "cuda:1"), (1050, "cpu")])
def test_device_only_where_the_model_fits(free: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (free, 80_000) if d == "cuda:1" else None)
    assert smoke_test._device(Hardware(device="cuda:1"), nbytes=1000) == device


@pytest.mark.parametrize("sound", [True, False])
def test_check_of_a_finished_model(sound: bool, model: Path, mergelab: Command) -> None:
    if not sound:
        change(model, poison)
    outcome = mergelab("job=check", f"check.path={model}", "check.prompt='2+2='")
    assert outcome.status == (0 if sound else 1), outcome.err
    assert (UP in " ".join(outcome.err.split())) is not sound
    assert bool(outcome.result["check"]["problems"]) is not sound
    assert outcome.result["check"]["prompt"] == ("2+2=" if sound else "")
