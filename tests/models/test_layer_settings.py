"""config.json follows the layers: a model made of another one's layers computes what these layers compute."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from refusals import refused
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from benchmarks.layer_settings import DEPTH, donor, logits, reordered, small
from mergelab.merging import mergekit_backend, moe_builder
from mergelab.models import layer_settings, moved_layers
from mergelab.models.layer_settings import Donor
from mergelab.schema import Hardware

FIRST_OFF, STACKED, EXCHANGED = [1, 2, 3, 4, 5], [0, 1, 2, 1, 2, 3, 4, 5], [0, 1, 3, 2, 4, 5]


def saved(kind: str, folder: Path, more: dict[str, Any] | None = None, seed: int = 0) -> Any:
    """A tiny random model as it lies on the hub."""
    torch.manual_seed(seed)
    model = donor(small(kind, more or {}))
    model.save_pretrained(folder)
    size = model.config.get_text_config().vocab_size
    words = {w: i for i, w in enumerate(["</s>", "<s>", *(f"w{i}" for i in range(size - 2))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", bos_token="<s>").save_pretrained(folder)
    return model


def recipe(order: list[tuple[Path, int]]) -> dict[str, Any]:
    """A passthrough of single layers, those that follow each other in one slice."""
    runs: list[list[Any]] = []
    for (folder, i), before in zip(order, [None, *order], strict=False):
        if before == (folder, i - 1):
            runs[-1][1][1] += 1
        else:
            runs.append([str(folder), [i, i + 1]])
    slices = [{"sources": [{"model": m, "layer_range": r}]} for m, r in runs]
    return {"merge_method": "passthrough", "dtype": "float32", "slices": slices}


def merged(content: dict[str, Any], out: Path) -> Any:
    """The model that mergekit's path writes, as transformers loads it."""
    out.mkdir()
    mergekit_backend.merge(content, out, hardware=Hardware(), seed=0)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()


FAMILIES: list[tuple[str, dict[str, Any], list[int], list[str]]] = [
    # model type, settings, order, keys that a file from the hub may lack
    (
        "smollm3",
        {"no_rope_layers": None, "no_rope_layer_interval": 3},
        STACKED,
        ["no_rope_layers", "layer_types"],
    ),
    ("llama4_text", {}, FIRST_OFF, ["moe_layers", "no_rope_layers", "layer_types"]),
    ("gpt_neo", {}, EXCHANGED, []),
    ("qwen2_moe", {}, FIRST_OFF, []),  # dense and sparse layers, of a file with an entry for each expert
    ("glm4_moe", {}, FIRST_OFF, []),
    ("jamba", {}, FIRST_OFF, []),
    ("minimax", {}, EXCHANGED, []),
]


@pytest.mark.parametrize(("kind", "more", "order", "without"), FAMILIES)
def test_passthrough_is_the_layers_in_that_order(
    kind: str, more: dict[str, Any], order: list[int], without: list[str], tmp_path: Path
) -> None:
    model = saved(kind, tmp_path / "base", more)
    file = tmp_path / "base" / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({k: v for k, v in content.items() if k not in without}), encoding="utf-8")
    result = merged(recipe([(tmp_path / "base", i) for i in order]), tmp_path / "out")
    want = logits(reordered(model, order))
    assert (want - logits(model)).abs().max() > 1e-2, "another order has to show"
    torch.testing.assert_close(logits(result), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_moe", "nemotron_h"])
def test_experts_that_not_every_layer_has(kind: str, tmp_path: Path) -> None:
    """mergekit takes a tensor of some layers for optional, and looks for it in the model's form only."""
    model = saved(kind, tmp_path / "base")
    content = {"merge_method": "linear", "dtype": "float32",
               "models": [{"model": str(tmp_path / "base"), "parameters": {"weight": 1}}]}  # fmt: skip
    result = merged(content, tmp_path / "out")
    torch.testing.assert_close(logits(result), logits(model), rtol=0, atol=1e-5)


def test_slices_of_several_donors_bring_their_own_settings(tmp_path: Path) -> None:
    """Equal weights and other layers without rotary positions: each slice has those of its donor."""
    one, other = tmp_path / "one", tmp_path / "other"
    model = saved("smollm3", one, {"no_rope_layers": [1, 1, 0, 1, 0, 1]})
    saved("smollm3", other, {"no_rope_layers": [0, 1, 1, 0, 1, 1]})
    order = [(one, 0), (one, 1), (other, 2), (other, 3), (one, 4), (one, 5)]
    result = merged(recipe(order), tmp_path / "out")
    assert result.config.no_rope_layers == [1, 1, 1, 0, 0, 1]
    for layer, rotates in zip(model.model.layers, [1, 1, 1, 0, 0, 1], strict=True):
        layer.self_attn.use_rope = rotates
    torch.testing.assert_close(logits(result), logits(model), rtol=0, atol=1e-5)


def planned(content: dict[str, Any], folder: Path, *more: str) -> list[str]:
    """What a plan of a recipe refuses."""
    file = folder / "m.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return refused(["method=mergekit", f"method.path={file}", "eval=none", *more], folder)


@pytest.mark.parametrize(
    ("kind", "more", "order", "words"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, FIRST_OFF,
         ["m.yaml: slices", "layer 0, which is layer 1 of", "attn.scaling=0.35", "instead of 0.17",
          "[layer-settings]"]),
        ("deepseek_v3", {"first_k_dense_replace": 1}, [*STACKED, 0],
         ["layer 8, which is layer 0 of", "mlp.down_proj.weight=absent instead of (32, 48)"]),
        ("gemma3n_text", {}, EXCHANGED, ["model.embed_tokens_per_layer.weight", "a part for each layer"]),
    ],
)  # fmt: skip
def test_what_cannot_follow_is_refused(
    kind: str, more: dict[str, Any], order: list[int], words: list[str], tmp_path: Path
) -> None:
    saved(kind, tmp_path / "base", more)
    said = planned(recipe([(tmp_path / "base", i) for i in order]), tmp_path)
    assert len(said) == 1
    for word in words:
        assert word in said[0]


def test_slices_of_a_model_with_two_towers_say_whose_layers_they_are(tmp_path: Path) -> None:
    text = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4, "vision_use_head": False}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    order = recipe([(tmp_path / "base", 1), (tmp_path / "base", 2)])
    (said,) = planned(order, tmp_path)
    assert "the architecture has the modules text_decoder, multi_modal_projector, vision_tower" in said
    slices = order.pop("slices")
    whole = {"models": [{"model": str(tmp_path / "base")}]}
    order["modules"] = {"text_decoder": whole, "multi_modal_projector": whole,
                        "vision_tower": {"slices": slices}}  # fmt: skip
    (said,) = planned(order, tmp_path)
    assert "layer 1 of" in said and "which has 1 layers there" in said


def test_sources_of_a_slice_that_disagree_are_refused(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    saved("smollm3", one, {"no_rope_layers": [1, 1, 0, 1, 0, 1]})
    saved("smollm3", other, {"no_rope_layers": [1, 1, 0, 1, 0, 1]})
    sources = [{"model": str(m), "layer_range": r} for m, r in ((one, [0, 4]), (other, [1, 5]))]
    content = {
        "merge_method": "linear", "dtype": "float32", "parameters": {"weight": 0.5},
        "slices": [{"sources": sources}],
    }  # fmt: skip
    said = planned(content, tmp_path)
    assert len(said) == 1
    assert f"layer 1 is merged of layer 1 of {one} and layer 2 of {other}" in said[0]
    assert "no_rope_layers=1 and 0" in said[0]
    assert planned(content, tmp_path, "allow=[layer-settings]") == []


def test_a_plan_of_a_common_family_asks_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("qwen2", tmp_path / "base", {"use_sliding_window": False})
    monkeypatch.setattr(moved_layers, "_asked", lambda *a: pytest.fail("asked"))
    assert planned(recipe([(tmp_path / "base", i) for i in STACKED]), tmp_path) == []


WINDOWS: list[tuple[str, dict[str, Any], bool]] = [
    # model type of the base, settings, whether a mixture has a shared expert
    ("mistral", {"sliding_window": 8}, False),
    ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}, True),
    ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, False),
]


@pytest.mark.parametrize(("kind", "more", "shared"), WINDOWS)
def test_a_mixture_keeps_the_windows_of_its_base(
    kind: str, more: dict[str, Any], shared: bool, tmp_path: Path
) -> None:
    """All experts are the base, and a shared one is scaled to nothing: it computes what the base does."""
    model = saved(kind, tmp_path / "base", more)
    content = mixture(tmp_path / "base", shared)
    (tmp_path / "out").mkdir()
    moe_builder.build(content, tmp_path / "out", hardware=Hardware(), seed=0)
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(result), logits(model), rtol=0, atol=1e-5)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "base", sliding_window=64).eval()
    assert (logits(wide) - logits(model)).abs().max() > 1e-3, "the window has to show"


def mixture(base: Path, shared: bool) -> dict[str, Any]:
    expert = {"source_model": str(base), "positive_prompts": ["w1 w2"]}
    content: dict[str, Any] = {
        "base_model": str(base), "gate_mode": "random", "dtype": "float32", "experts": [expert, expert],
    }  # fmt: skip
    if shared:
        content["shared_experts"] = [expert | {"residual_scale": 0.0}]
    return content


def test_windows_that_a_mixture_cannot_have_are_refused(tmp_path: Path) -> None:
    saved("qwen3", tmp_path / "base", WINDOWS[2][1] | {"max_window_layers": 3})
    file = tmp_path / "m.yaml"
    file.write_text(yaml.safe_dump(mixture(tmp_path / "base", shared=False)), encoding="utf-8")
    arguments = ["method=mergekit_moe", f"method.path={file}", "eval=none"]
    said = refused(arguments, tmp_path)
    assert len(said) == 1 and "has a sliding window of None, layer 3 one of 8" in said[0]
    assert refused([*arguments, "allow=[layer-settings]"], tmp_path) == []


# ---------------------------------------------------------------- the rewriting alone


def rewritten(file: dict[str, Any], order: list[int]) -> dict[str, Any]:
    depth = file.pop("depth", DEPTH)
    return layer_settings.rewritten(0, [Donor(file, file, depth)], [(0, i) for i in order])


@pytest.mark.parametrize(
    ("file", "order", "changes"),
    [
        ({"intermediate_size": [1, 2, 3, 4, 5, 6]}, [5, 0], {"intermediate_size": [6, 1]}),
        ({"hybrid_override_pattern": "M-M*-M"}, [1, 3, 3], {"hybrid_override_pattern": "-**"}),
        ({"per_layer_config": {"0": {"a": 1}, "4": {"a": 2}}}, [4, 1, 4],
         {"per_layer_config": {"0": {"a": 2}, "2": {"a": 2}}}),
        ({"full_attn_idxs": [2, 5]}, [5, 4, 2], {"full_attn_idxs": [0, 2]}),
        ({"moe_layers": [0, 1, 2, 3, 4, 5]}, [5, 4, 2], {"moe_layers": [0, 1, 2]}),
        ({"no_rope_layers": [0, 1], "depth": 2}, [1, 0], {"no_rope_layers": [1, 0]}),
        ({"linear_attn_config": {"head_dim": 8, "kda_layers": [1, 2, 6]}}, [5, 2, 0],
         {"linear_attn_config": {"head_dim": 8, "kda_layers": [1, 3]}}),
        ({"layer_types": list("abcdefX"), "num_nextn_predict_layers": 1}, [1, 0],
         {"layer_types": ["b", "a", "X"]}),
        ({"first_k_dense_replace": 2}, [1, 2, 3], {"first_k_dense_replace": 1}),
        ({"num_kv_shared_layers": 3}, [0, 1, 4, 5], {"num_kv_shared_layers": 2}),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, [1, 2, 3, 4],
         {"mlp_only_layers": [0, 1, 3], "decoder_sparse_step": 1}),
        ({"attn_layer_period": 3, "attn_layer_offset": 1}, [1, 2, 3, 4],
         {"attn_layer_period": 3, "attn_layer_offset": 0}),
        ({"moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_layer_end_index": -1}, [0, 1, 1, 2],
         {"moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 3}),
        ({"block_types": ["r", "r", "a"]}, [2, 3, 4], {"block_types": ["a", "r", "r"]}),
        # What is no list by layer, although it is as long, and what follows from nothing
        ({"eos_token_id": [1, 2, 3, 4, 5, 6], "ssm_multipliers": [1.0] * 6}, [0], {}),
        ({"rope_parameters": {"short_factor": [1.0] * 6}, "id2label": {"0": "a"}}, [0], {}),
    ],
)  # fmt: skip
def test_keys_by_layer(file: dict[str, Any], order: list[int], changes: dict[str, Any]) -> None:
    assert rewritten(file, order) == changes


def test_every_order_of_a_period_is_met_or_left(tmp_path: Path) -> None:
    """Whatever period and offset come out, they say what was asked, as far as they can say it."""
    file = {"attn_layer_period": 2, "attn_layer_offset": 1}
    for order in ([1, 0, 2, 4], [0, 2, 4], [1, 3, 5], [1, 1, 0], [0, 1, 0, 0, 1]):
        new = file | rewritten(dict(file), order)
        says = [i % new["attn_layer_period"] == new["attn_layer_offset"] for i in range(len(order))]
        wanted = [i % 2 == 1 for i in order]
        gaps = {b - a for a, b in pairwise(n for n, w in enumerate(wanted) if w)}
        assert says == wanted or len(gaps) > 1 or sum(wanted) > 1
