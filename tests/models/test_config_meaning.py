"""What config.json means: the same in other words, and every setting that changes what a model computes."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mergelab.core.findings import Finding
from mergelab.models import compatibility, config_meaning
from mergelab.models.checkpoint import ModelMetadata, TensorInfo

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import config_meaning as sweep

JSON = dict[str, Any]


def compared(base: JSON, expert: JSON, kind: str = "LlamaForCausalLM", **options: Any) -> list[Finding]:
    """What is said of an expert's config.json beside the base's, without weights."""
    models = (
        ModelMetadata(Path(name), {**config, "architectures": [kind]})
        for name, config in (("base", base), ("expert", expert))
    )
    found = compatibility.compare(*models, "experts.a", possessive="the base's", fitted=False, **options)
    return list(found)


def config(family: str, **settings: Any) -> JSON:
    """A config.json of a family as the installed transformers writes it."""
    from transformers import AutoConfig

    made = AutoConfig.for_model(family, **settings)
    return {"architectures": ["A"], **json.loads(made.to_json_string(use_diff=False))}


# ---------------------------------------------------------------- the same in other words

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 500000.0}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [1.5] * 48}
LAYERED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
FAMILIES: list[tuple[str, JSON]] = [
    *((f, {}) for f in (
        "llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "stablelm", "glm4", "nemotron", "gemma2",
        "gemma3_text", "olmo2", "olmo3", "granite", "cohere2", "smollm3", "starcoder2", "gpt_neox",
        "qwen2_moe", "mixtral",
    )),
    ("llama", {"rope_parameters": LLAMA3}),
    ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 32}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("gemma3_text", {"rope_parameters": LAYERED}),
]  # fmt: skip


def older(family: str, new: JSON) -> JSON:
    """A config.json in the words of transformers 4, as the hub has them."""
    old = copy.deepcopy(new)
    rope = old.pop("rope_parameters")
    old["torch_dtype"] = old.pop("dtype", None) or "float32"
    for key in ("layer_types", "no_rope_layers", "head_dim"):
        if key != "head_dim" or old.get(key) == old["hidden_size"] // old["num_attention_heads"]:
            old.pop(key, None)
    if "full_attention" in rope:
        full, local = rope["full_attention"], rope["sliding_attention"]
        scaled = {k: v for k, v in full.items() if k not in ("rope_theta",)}
        old |= {"rope_theta": full["rope_theta"], "rope_local_base_freq": local["rope_theta"]}
        return {**old, "rope_scaling": scaled if scaled["rope_type"] != "default" else None}
    theta = "rotary_emb_base" if family == "gpt_neox" else "rope_theta"
    part = "rotary_pct" if family == "gpt_neox" else "partial_rotary_factor"
    old[theta] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        old[part] = rope.pop("partial_rotary_factor")
    return {**old, "rope_scaling": rope if rope["rope_type"] != "default" else None}


@pytest.mark.parametrize(("family", "settings"), FAMILIES, ids=lambda v: v if isinstance(v, str) else "")
def test_a_base_in_the_words_of_transformers_4_is_the_same_model(family: str, settings: JSON) -> None:
    from transformers import AutoConfig

    new = config(family, **settings)
    old = older(family, new)
    read = [AutoConfig.for_model(**copy.deepcopy(c)).to_dict() for c in (old, new)]
    assert read[0]["rope_parameters"] == read[1]["rope_parameters"], "the test's own words are right"
    assert compared(old, new) == compared(new, old) == []


def test_other_words_for_no_difference() -> None:
    base = config("qwen2", hidden_size=64, num_attention_heads=4, num_key_value_heads=4)
    assert compared(base, {**base, "head_dim": 16, "use_mrope": False, "pad_token_id": 7}) == []
    assert compared(base, {**base, "sliding_window": 17, "max_window_layers": 5}) == [], "it is switched off"
    assert compared(base, {**base, "max_position_embeddings": 17, "dtype": "float16"}) == []
    assert compared(base, {**base, "hidden_act": "swish"}) == []
    phi = config("phi3")
    assert compared(phi, {**phi, "original_max_position_embeddings": 17}) == [], "its rope is not scaled"
    least = {k: base[k] for k in ("model_type", "hidden_size", "num_attention_heads", "num_key_value_heads")}
    assert compared(base, least) == []


def test_equal_files_are_compared_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    base = config("llama")
    monkeypatch.setattr(config_meaning, "of", None)
    assert (
        compared(base, {**base, "eos_token_id": [5, 6], "use_cache": False, "max_position_embeddings": 1})
        == []
    )


def test_a_vision_models_text_settings_may_stand_at_the_top() -> None:
    """As transformers 4 wrote Qwen2-VL."""
    new = config("qwen2_vl")
    text = new["text_config"]
    old = {**new, **{k: v for k, v in text.items() if k != "rope_parameters"}, "model_type": "qwen2_vl"}
    old |= {"rope_theta": text["rope_parameters"]["rope_theta"]}
    del old["text_config"]
    assert compared(old, new) == compared(new, old) == []
    [found] = compared(old, {**new, "text_config": {**text, "rms_norm_eps": 0.5}})
    assert found.code == "norm"


@pytest.mark.parametrize("family", config_meaning.COMMON)
def test_what_common_families_leave_out_is_the_default(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    new = config(family, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "attention_bias", "mlp_bias")}
    old = {
        k: v for k, v in old.items() if k not in ("use_sliding_window", "layer_types", "max_window_layers")
    }
    old |= {"rope_theta": 1e6, "rope_scaling": None, "use_mrope": False}
    if family != "llama":
        old["sliding_window"] = 7
    if family != "qwen3":
        old["head_dim"] = new["hidden_size"] // new["num_attention_heads"]
        new.pop("head_dim", None)
    assert config_meaning.of(old).values == config_meaning.of(new).values
    other = {**old, "rope_theta": 1e5}
    assert config_meaning.stated(other) != config_meaning.stated(new)
    monkeypatch.setattr(config_meaning, "of", None)
    assert compared(old, new) == compared(new, old) == []


# ---------------------------------------------------------------- what changes the function


@pytest.mark.parametrize("family", ["gpt2", "qwen2_moe", "smollm3"])
def test_whatever_changes_the_logits_is_told(family: str) -> None:
    """A sample of `python -m benchmarks.config_meaning`: each setting, with equal weights."""
    import torch

    sums, threads = sweep.Sums(), torch.get_num_threads()
    torch.set_num_threads(1)
    sweep.look(family, "", {}, sums)
    torch.set_num_threads(threads)
    assert (sums.families, sums.silent) == (1, [])
    assert sums.told == sums.changed >= 3


@pytest.mark.parametrize(
    ("family", "change", "code", "text"),
    [
        ("gpt2", {"n_head": 6}, "heads", "n_head is 6, the base's is 12"),
        ("gpt2", {"layer_norm_epsilon": 0.5}, "norm", "layer_norm_epsilon is 0.5, the base's is 1e-05"),
        ("gpt2", {"activation_function": "relu"}, "activation", "_function is relu, the base's is gelu_new"),
        ("mistral", {"sliding_window": None}, "config", "sliding_window is unset, the base's is 4096"),
        ("mixtral", {"num_experts_per_tok": 1}, "config", "num_experts_per_tok is 1, the base's is 2"),
        ("gemma2", {"final_logit_softcapping": 7.0}, "softcap", "final_logit_softcapping is 7.0"),
        ("smollm3", {"no_rope_layers": [0] + [1] * 35}, "rope", "no_rope_layers[0] is 0, the base's is 1"),
        ("llama", {"rope_parameters": LLAMA3}, "rope", "rope is rope_theta=500000, rope_type=llama3"),
        ("gemma3", {"text_config": {"query_pre_attn_scalar": 9}}, "softcap", "query_pre_attn_scalar is 9"),
        ("gemma3", {"vision_config": {"hidden_act": "relu"}}, "activation", "n_config.hidden_act is relu"),
        ("llama", {"tie_word_embeddings": True}, "tied", "tie_word_embeddings is True, the base's is False"),
    ],
    ids=lambda v: v if isinstance(v, str) and " " not in v else "",
)  # fmt: skip
def test_a_difference_is_named_in_the_familys_own_words(
    family: str, change: JSON, code: str, text: str
) -> None:
    base = config(family)
    expert = copy.deepcopy(base)
    for key, value in change.items():
        expert[key] = {**base[key], **value} if key.endswith("_config") else value
    [found] = [f for f in compared(base, expert) if "head_dim" not in f.message or code == "heads"]
    assert (found.severity, found.code) == ("error", code)
    assert text in found.message and "expert/config.json" in found.message


def test_ropes_that_are_scaled_by_length_depend_on_it() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    base = config("llama", rope_parameters=rope)
    [found] = compared(base, {**base, "max_position_embeddings": 17})
    assert "max_position_embeddings is 17" in found.message


def test_positions_that_are_counted_from_the_padding() -> None:
    base = config("roberta")
    [found] = compared(base, {**base, "pad_token_id": 0})
    assert "pad_token_id is 0, the base's is 1" in found.message


def test_lists_of_another_length_follow_from_another_depth() -> None:
    assert {f.code for f in compared(config("gemma2"), config("gemma2", num_hidden_layers=5))} == {"layers"}


def test_of_other_architectures_with_the_same_tensors_what_both_know_is_compared() -> None:
    """Whoever merges them nevertheless should know of the rest."""
    llama, mistral = config("llama"), config("mistral", rope_parameters={"rope_theta": 7.0})
    models = (
        ModelMetadata(Path(name), {**c, "architectures": [kind]})
        for name, c, kind in (("l", llama, "LlamaForCausalLM"), ("m", mistral, "MistralForCausalLM"))
    )
    found = {
        f.code: f.message
        for f in compatibility.compare(*models, "experts.a", possessive="the base's", fitted=False)
    }
    assert "rope_theta=7" in found["rope"]
    assert "architecture" in found and "sliding_window" not in str(found)


def test_a_size_that_no_tensor_has_may_be_let_pass() -> None:
    """Qwen's mixtures have `intermediate_size`, and with it nothing where all layers have experts."""
    base = config("qwen3_moe")
    tensors = {"model.norm.weight": TensorInfo("F32", (2048,), "")}
    models = (
        ModelMetadata(Path("a"), {**c, "architectures": ["A"]}, tensors)
        for c in (base, {**base, "intermediate_size": 17})
    )
    [found] = compatibility.compare(*models, "experts.a", possessive="the base's", fitted=True)
    assert (found.code, found.message[:23]) == ("config", "intermediate_size is 17")


def test_labels_of_classifiers_are_part_of_their_meaning() -> None:
    kind = "LlamaForSequenceClassification"
    base = config("llama", id2label={"0": "bad", "1": "good"})
    other = {**base, "id2label": {"0": "good", "1": "bad"}}
    [found] = compared(base, other, kind)
    assert (found.code, found.message[:40]) == ("config", "id2label.0 is good, the base's is bad (e")
    assert compared(base, {**base, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, kind) == [], "not named"
    assert compared(base, other, "LlamaForCausalLM") == []


def test_a_family_with_code_of_its_own_is_compared_as_it_stands() -> None:
    base = {"model_type": "mine", "scale": 2, "attn_config": {"alibi": True}, "use_cache": True, "no": None}
    assert compared(base, {**base, "use_cache": False, "dtype": "float16", "none": None}) == []
    [found] = compared(base, {**base, "scale": 3, "attn_config": {"alibi": False}})
    assert found.code == "config"
    assert "scale is 3, the base's is 2; attn_config.alibi is False, the base's is True" in found.message


def test_a_description_says_nothing_of_what_it_leaves_out() -> None:
    least: JSON = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "rope_theta": 1e4}
    expert = config("llama", hidden_size=64, num_attention_heads=4, rms_norm_eps=0.25)
    assert compared(least, expert, described=True) == []
    [found] = compared({**least, "rope_theta": 5.0}, expert, described=True)
    assert (found.code, "rope_theta=10000, the base's is rope_theta=5" in found.message) == ("rope", True)
    assert [f.code for f in compared(least, expert) if f.code == "norm"] == ["norm"]


def test_what_transformers_cannot_read_is_said() -> None:
    base = config("llama")
    [found] = compared(base, {**base, "hidden_size": "wide"})
    assert found.code == "unloadable"
    assert found.message.startswith("expert/config.json: transformers cannot read it: ")
    assert "hidden_size" in found.message


def test_infinite_numbers_as_both_versions_write_them() -> None:
    base = config("mamba2")
    assert base["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert compared(base, {**base, "time_step_limit": [0.0, float("inf")], "use_cache": False}) == []


def test_the_table_of_a_check_has_the_general_settings_of_every_family() -> None:
    from mergelab.steps.check import ROWS

    def row(family: str) -> JSON:
        own = {**config(family), "architectures": ["A"]}
        return {
            label: read(ModelMetadata(Path(), own), config_meaning.of(own)) for label, read in ROWS.items()
        }

    gpt2, gemma = row("gpt2"), row("gemma3")
    assert (gpt2["layers"], gpt2["hidden size"], gpt2["heads"], gpt2["kv heads"]) == (12, 768, 12, 12)
    assert (gpt2["rope"], gpt2["norm eps"], gpt2["tied"]) == (None, 1e-05, True)
    assert "sliding_attention=(rope_theta=10000, rope_type=default)" in gemma["rope"]
    assert (gemma["hidden size"], gemma["norm eps"]) == (2304, 1e-06)
