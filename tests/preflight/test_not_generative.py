"""Models that do not continue text merge, and are not measured or asked as if they did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from conftest import Command
from safetensors.torch import load_file

from mergelab.core.model_class import generates

SMALL = {
    "vocab_size": 304, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_labels": 1,
}  # fmt: skip
KIND = "LlamaForSequenceClassification"


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three reward models without tokenizers, as arguments of a merge."""
    from transformers import AutoConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("rewards")
    for seed, name in enumerate(("base", "math", "physics")):
        torch.manual_seed(seed)
        config = AutoConfig.for_model("llama", **SMALL)
        LlamaForSequenceClassification(config).save_pretrained(folder / name)
    return [
        f"model.base.path={folder}/base", "experts=math_physics", f"experts.math.path={folder}/math",
        f"experts.physics.path={folder}/physics",
    ]  # fmt: skip


def test_reward_models_merge_and_are_checked(mergelab: Command, rewards: list[str]) -> None:
    out = mergelab(*rewards, "method=task_arithmetic", "eval=none")
    assert out.status == 0, out.err
    assert "loads, runs" in out.out
    assert (out.result["check"]["class"], out.result["check"]["ran"]) == (
        "LlamaForSequenceClassification",
        "runs",
    )
    folder = Path(rewards[0].partition("=")[2]).parent
    of = {n: load_file(folder / n / "model.safetensors") for n in ("base", "math", "physics")}
    merged = load_file(out.folder / "model" / "model.safetensors")
    weights = dict.fromkeys(("math", "physics"), 1.0)
    text = (out.folder / "recipe.yaml").read_text(encoding="utf-8")

    for m in yaml.safe_load(text)["models"]:
        name = next(n for n in weights if m["model"].endswith(n))
        weights[name] = m["parameters"]["weight"]
    for name, tensor in merged.items():
        base = of["base"][name]
        wanted = base + sum(w * (of[n][name] - base) for n, w in weights.items())
        assert torch.allclose(tensor, wanted, atol=1e-6), name
    checked = mergelab("job=check", f"check.path={out.folder / 'model'}")
    assert checked.status == 0, checked.err
    assert f"no perplexity: {KIND} does not continue text" in checked.out
    assert mergelab(*rewards, "job=check").status == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["eval=skills"], "eval.kind=skills measures language models"),
        (["job=generate", "generate.prompts=[x]"], "job=generate has models answer"),
    ],
)
def test_they_are_not_asked(more: list[str], said: str, mergelab: Command, rewards: list[str]) -> None:
    out = mergelab(*rewards, "method=task_arithmetic", *more)
    assert out.status == 2
    text = " ".join(out.err.split())
    assert f"it is a {KIND}, which does not continue text" in text
    assert said in text and "Traceback" not in text
    assert not (out.folder / "model").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Qwen3ForCausalLM", True), ("GPT2LMHeadModel", True), ("Qwen2_5_VLForConditionalGeneration", True),
        ("T5ForConditionalGeneration", True), ("NobodysModel", True), ("BertForMaskedLM", False),
        ("LlamaModel", False), ("WhisperForConditionalGeneration", False),
    ],
)  # fmt: skip
def test_classes_that_continue_text(name: str, text: bool) -> None:
    assert generates({"architectures": [name]}) is text
