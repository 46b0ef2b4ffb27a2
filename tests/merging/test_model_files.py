"""The files beside the weights of a merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from broken_models import Models
from conftest import Command

from mergelab.merging import model_files

PROCESSOR: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": 28, "width": 28},
    },
    "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
    "video_preprocessor_config.json": {"video_processor_type": "Qwen2VLVideoProcessor"},
    "chat_template.json": {"chat_template": "{{ messages }}"},
    "modules.json": {"path": "1_Pooling"},
    "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
}


def with_processor(folder: Path) -> None:
    """The files of Gemma 3's processor, and others."""
    (folder / "1_Pooling").mkdir()
    for name, content in PROCESSOR.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    own = {f"{n}_token": f"<{n}>" for n in ("boi", "eoi", "image")}
    file.write_text(json.dumps({**content, "extra_special_tokens": own}), encoding="utf-8")


def test_a_processor_loads_from_the_merged_model(models: Models, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    with_processor(models["base"])
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "gemma3"}', encoding="utf-8")
    model_files.copy_companions(models["base"], out, None)
    loaded = AutoProcessor.from_pretrained(out)
    assert type(loaded).__name__ == "Gemma3Processor"
    assert loaded.tokenizer.get_vocab().keys() >= {"<boi>", "<eoi>", "<image>"}
    for name in PROCESSOR:
        assert (out / name).read_bytes() == (models["base"] / name).read_bytes()


def test_files_go_along_whatever_merges_and_a_built_tokenizer_finds_no_others(
    mergelab: Command, models: Models
) -> None:
    for name in ("base", "math", "physics"):
        with_processor(models[name])
        (models[name] / "chat_template.json").unlink()
        models.text(name, "vocab.json", "{}")
    engines = (["hardware.engine=fast"], ["hardware.engine=mergekit"], ["model.tokenizer=base"])
    for arguments in engines:
        out = mergelab(*models.arguments(*arguments, method="linear"))
        assert out.status == 0, out.err
        made = {p.relative_to(out.folder / "model").as_posix() for p in (out.folder / "model").rglob("*")}
        assert made >= PROCESSOR.keys() - {"chat_template.json"}
        assert ("vocab.json" in made) == ("model.tokenizer=base" not in arguments)


def test_a_template_replaces_every_one_that_would_be_found(models: Models, tmp_path: Path) -> None:
    with_processor(models["base"])
    (models["base"] / "additional_chat_templates").mkdir()
    models.text("base", "additional_chat_templates/rag.jinja", "x")
    for built in (False, True):
        out = tmp_path / str(built)
        out.mkdir()
        model_files.copy_companions(models["base"], out, "NEW", built=built)
        assert json.loads((out / "chat_template.json").read_text(encoding="utf-8")) == {
            "chat_template": "NEW"
        }
        assert not (out / "additional_chat_templates").exists()
        assert (out / "tokenizer.json").exists() != built


def test_ids_of_tokens_are_translated_wherever_they_stand() -> None:
    config = {
        "image_token_index": 5,
        "text_config": {"eos_token_id": [7, 8], "vocab_size": 7},
        "hidden_size": 5,
    }
    assert model_files.translated(config, {5: 1, 7: 2, 8: None}) == {
        "image_token_index": 1, "text_config": {"eos_token_id": [2], "vocab_size": 7},
    }  # fmt: skip


def test_a_mask_is_no_weight_and_need_not_be_there(mergelab: Command, models: Models, tmp_path: Path) -> None:
    """GPT-NeoX as it lies on the hub, with buffers, and as transformers writes it, without."""
    import torch
    from weights import weights

    for seed, name in enumerate(("base", "math", "physics")):
        models.again(name, "gpt_neox", seed=seed)

    def mask(tensors: dict[str, Any], dtype: torch.dtype) -> None:
        for i in range(3):
            at = f"gpt_neox.layers.{i}.attention."
            tensors[f"{at}bias"] = torch.ones(1, 1, 8, 8).tril().to(dtype)
            tensors[f"{at}masked_bias"] = torch.tensor(-1e9)
            tensors[f"{at}rotary_emb.inv_freq"] = torch.ones(2)

    models.tensors("base", lambda t: mask(t, torch.uint8))
    models.tensors("math", lambda t: mask(t, torch.bool))
    out = mergelab(*models.arguments(method="linear"))
    assert out.status == 0, out.err
    made, math, physics = (weights(f) for f in (out.folder / "model", models["math"], models["physics"]))
    name = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
    assert torch.allclose(made[name], (math[name] + physics[name]) / 2, atol=1e-6)
