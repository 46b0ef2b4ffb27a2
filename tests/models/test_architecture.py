"""The tensors that a config.json promises, against the models that transformers builds from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ARCHITECTURES

from mergelab.core.conf_dir import CONF
from mergelab.models import architecture

FAMILIES = {
    p.stem: yaml.safe_load(p.read_text(encoding="utf-8")) for p in (Path(CONF) / "model").glob("[!_]*.yaml")
}
DESCRIBED = sorted(name for name, content in FAMILIES.items() if "architecture" in content)

BILLIONS = {
    "qwen0_5b": 0.494, "qwen1_5b": 1.544, "qwen7b": 7.616, "qwen32b": 32.764, "qwen3_8b": 8.191,
    "llama3_8b": 8.030, "mistral_7b": 7.242, "gemma2_9b": 9.242,
}  # fmt: skip
"""Parameters, in billions, as the hub's pages of the base models have them."""


def transformers_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that transformers saves for a config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {k: v for k, v in config.items() if k not in ("model_type", "torch_dtype")}
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))
    shapes = {n: tuple(p.shape) for n, p in made.state_dict().items()}
    if made.config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    return shapes


@pytest.mark.parametrize("family", DESCRIBED)
def test_a_shipped_family_is_described_as_it_is(family: str) -> None:
    config = FAMILIES[family]["architecture"]
    shapes = architecture.shapes(config)
    assert shapes == transformers_shapes(config)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    assert parameters / 1e9 == pytest.approx(BILLIONS[family], abs=0.001)


SMALL = {
    "vocab_size": 304, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4,
}  # fmt: skip
CLASSES = {
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM", "gemma2": "Gemma2ForCausalLM",
}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_small_models(kind: str, tied: bool) -> None:
    config = SMALL | {
        "model_type": kind, "architectures": [CLASSES[kind]], "num_key_value_heads": 2, "head_dim": 16,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    shapes = architecture.shapes(config)
    assert shapes is not None
    assert shapes == transformers_shapes(config)
    assert ("lm_head.weight" in shapes) is not tied


def test_keys_that_follow_from_others_may_be_left_out() -> None:
    config = SMALL | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    shapes = architecture.shapes(config)
    assert shapes is not None
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (32, 32)
    assert "lm_head.weight" in shapes
    gemma = SMALL | {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
    assert "lm_head.weight" not in (architecture.shapes(gemma) or {})


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architectures": ["NoSuchForCausalLM"]},
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
        SMALL | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"},
        SMALL | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": "wide"},
    ],
    ids=["nothing", "unknown", "no sizes", "experts", "no number"],
)
def test_what_cannot_be_told_is_not_guessed(config: dict[str, Any]) -> None:
    assert architecture.shapes(config) is None


def test_layers_and_modules() -> None:
    config = SMALL | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    assert architecture.layer_count(config) == 3
    assert architecture.modules(config) == ["default"]
    assert architecture.modules({"architectures": ["NoSuchForCausalLM"]}) is None
    five = architecture.weights(config, layers=5)
    assert five is not None
    assert max(w.layer or 0 for w in five) == 4
