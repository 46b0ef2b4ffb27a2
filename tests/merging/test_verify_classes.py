"""Models that are not plain text generators are read back through their own class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from weights import change

from mergelab.core.model_class import empty, generates, model_class
from mergelab.merging import verify
from mergelab.schema import Hardware

PLAIN = {
    "vocab_size": 304, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 40,
}  # fmt: skip
DECODER = PLAIN | {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1}
BOTH = {
    "vocab_size": 304, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 40,
}  # fmt: skip
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
         "image_size": 28, "patch_size": 14}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}

CLASSES: dict[str, tuple[str, dict[str, Any], str]] = {
    "LlamaForSequenceClassification": ("llama", DECODER | {"num_labels": 1}, "runs"),
    "Qwen2ForTokenClassification": ("qwen2", DECODER, "runs"),
    "LlamaModel": ("llama", DECODER, "runs"),
    "BertModel": ("bert", PLAIN, "runs"),
    "BertForMaskedLM": ("bert", PLAIN, "runs"),
    "RobertaForMultipleChoice": ("roberta", PLAIN, "runs"),
    "DistilBertForSequenceClassification": (
        "distilbert", {"vocab_size": 304, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2}, "runs",
    ),
    "T5ForConditionalGeneration": (
        "t5", {"vocab_size": 304, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
        "generates",
    ),
    "T5EncoderModel": (
        "t5", {"vocab_size": 304, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
        "runs",
    ),
    "BartForSequenceClassification": ("bart", BOTH, "runs"),
    "GPT2LMHeadModel": ("gpt2", {"vocab_size": 304, "n_embd": 16, "n_layer": 1, "n_head": 2}, "generates"),
    "Qwen2_5_VLForConditionalGeneration": (
        "qwen2_5_vl",
        {"text_config": DECODER | {"rope_parameters": ROPE},
         "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
                           "out_hidden_size": 16, "patch_size": 14, "fullatt_block_indexes": [0]},
         "image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302,
         "vision_end_token_id": 303},
        "generates",
    ),
    "Mistral3ForConditionalGeneration": (
        "mistral3",
        {"text_config": DECODER | {"model_type": "mistral"}, "image_token_index": 300,
         "vision_config": TOWER | {"model_type": "pixtral", "head_dim": 8}},
        "generates",
    ),
    "CLIPModel": (
        "clip",
        {"text_config": PLAIN | {"eos_token_id": 2}, "vision_config": TOWER, "projection_dim": 8}, "runs",
    ),
}  # fmt: skip


@pytest.fixture
def of_class(tmp_path: Path, family: Any) -> Callable[[str], Path]:
    """A small random model of a class, with the tiny family's tokenizer."""
    import shutil

    import transformers

    def make(name: str, tokenizer: bool = True) -> Path:
        kind, settings, _ = CLASSES[name]
        torch.manual_seed(0)
        model = getattr(transformers, name)(transformers.AutoConfig.for_model(kind, **settings))
        model.save_pretrained(tmp_path / name)
        for file in family.checkpoint("base").glob("*token*") if tokenizer else ():
            shutil.copyfile(file, tmp_path / name / file.name)
        return tmp_path / name

    return make


def look(folder: Path, **options: Any) -> verify.Report:
    return verify.verify(folder, hardware=Hardware(), **options)


@pytest.mark.parametrize("name", CLASSES)
def test_each_class_is_checked_as_what_it_is(name: str, of_class: Any) -> None:
    folder, ran = of_class(name), CLASSES[name][2]
    report = look(folder)
    assert (report.problems, report.unchecked, report.notes) == ([], [], [])
    assert (report.smoke.kind, report.smoke.ran) == (name, ran)
    assert report.summary().endswith(f"loads, {ran}")
    assert bool(report.smoke.text) == (ran == "generates") or name.startswith("T5")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert generates(config) == (ran == "generates")


@pytest.mark.parametrize(
    "name", ["LlamaForSequenceClassification", "T5ForConditionalGeneration", "GPT2LMHeadModel"]
)
def test_without_a_tokenizer_it_runs_on_ids(name: str, of_class: Any) -> None:
    report = look(of_class(name, tokenizer=False))
    assert (report.problems, report.unchecked) == ([], [])
    assert report.smoke.ran == CLASSES[name][2]
    assert report.smoke.prompt.startswith("ids [")


def test_numbers_that_overflow_in_a_forward_pass(of_class: Any) -> None:
    folder = of_class("LlamaForSequenceClassification")
    change(folder, lambda t: t["score.weight"].fill_(3e38))
    (problem,) = look(folder).problems
    assert problem == "its outputs are not finite"


def test_what_the_inputs_lack_as_well_is_noted(of_class: Any, tmp_path: Path) -> None:
    import shutil

    folder = of_class("BertForMaskedLM")
    change(folder, lambda t: t.pop("cls.predictions.transform.dense.bias"))
    parent = shutil.copytree(folder, tmp_path / "parent")
    assert look(folder, inputs={"base": parent}).sound
    (note,) = look(folder, inputs={"base": parent}).notes
    assert note == "BertForMaskedLM lacks cls.predictions.transform.dense.bias"
    (problem,) = look(folder).problems
    assert problem == "loaded with missing keys: cls.predictions.transform.dense.bias"


def test_an_encoder_may_have_no_pooling_layer(of_class: Any) -> None:
    folder = of_class("BertModel")
    change(folder, lambda t: [t.pop(n) for n in [*t] if "pooler" in n])
    report = look(folder)
    assert report.sound
    assert report.notes == ["BertModel lacks pooler.dense.bias, pooler.dense.weight"]


def test_a_head_of_another_task_is_noted(of_class: Any) -> None:
    folder = of_class("BertForMaskedLM")
    change(folder, lambda t: t.update({"cls.seq_relationship.weight": torch.zeros(2, 16)}))
    report = look(folder)
    assert report.sound
    assert report.notes == ["BertForMaskedLM has, and has no use for, cls.seq_relationship.weight"]


def test_ids_beyond_the_embedding(of_class: Any) -> None:
    folder = of_class("GPT2LMHeadModel")
    change(folder, lambda t: t.update({"transformer.wte.weight": t["transformer.wte.weight"][:8].clone()}))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 8}), encoding="utf-8")
    (problem,) = look(folder).problems
    assert "its tokenizer turns '1+1=' into id" in problem
    assert problem.endswith("and the embedding has 8 rows")


def test_the_class_is_that_of_config_json_or_an_auto_class() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("llama", **DECODER)
    config.architectures = ["LlamaForSequenceClassification"]
    assert model_class(config).__name__ == type(empty(config)).__name__ == "LlamaForSequenceClassification"
    for other in ("MistralForCausalLM", "NobodysModel"):  # what the auto class takes for the model type
        config.architectures = [other]
        assert model_class(config).__name__ == "LlamaForCausalLM"
    config.auto_map = {"AutoModelForCausalLM": "modeling_own.NobodysModel"}
    assert model_class(config).__name__ == "AutoModelForCausalLM"
