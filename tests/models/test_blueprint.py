"""What transformers' model of a config.json makes of a checkpoint's tensors, beside its own loader."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BertModel

from mergelab.models import blueprint, checkpoint, tensor_checks
from mergelab.models.blueprint import Blueprint

SMALL = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40}


def saved(folder: Path, kind: str, **settings: Any) -> checkpoint.ModelMetadata:
    """A small model as transformers saves it, which is the layout of the hub."""
    given = GPT2 if kind == "gpt2" else SMALL
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**given, **settings})).save_pretrained(
        folder
    )
    return checkpoint.read(folder, "m")


def with_tensors(folder: Path, add: dict[str, torch.Tensor], drop: tuple[str, ...] = ()) -> Any:
    file = folder / "model.safetensors"
    tensors = {n: t for n, t in load_file(file).items() if n not in drop} | add
    save_file(tensors, file, metadata={"format": "pt"})
    return checkpoint.read(folder, "m")


def seen(metadata: checkpoint.ModelMetadata) -> Blueprint:
    found = blueprint.of(metadata)
    assert found is not None and not found.problem
    return found


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts apart": ("mixtral", {"num_local_experts": 2}),
    "experts apart, shared": (
        "qwen2_moe", {"num_experts": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}),
    "renamed head": ("gpt_neox", {}),
    "tied by the class": ("falcon", {}),
    "transposed": ("gpt2", {}),
    "bias of the head": ("phi", {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_transformers_saves_is_whole(tmp_path: Path, kind: str) -> None:
    metadata = saved(tmp_path, KINDS[kind][0], **KINDS[kind][1])
    found = seen(metadata)
    assert (found.missing, found.unexpected, found.mismatched, found.left_out) == ((), (), (), frozenset())
    assert list(tensor_checks.check_complete(metadata, "m")) == []
    # A weight that is taken away is missed, under the name that transformers misses it by.
    name = next(n for n in metadata.tensors if n not in found.ties and n.endswith("weight"))
    less = with_tensors(tmp_path, {}, drop=(name,))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(seen(less).missing) | {n for n, _, _ in seen(less).mismatched} >= {
        n for n in info["missing_keys"] if n not in found.ties
    }
    codes = {f.code for f in tensor_checks.check_complete(less, "m")}
    assert codes and codes <= {"missing-tensor", "shape"}


def test_masks_and_indices_are_not_weights(tmp_path: Path) -> None:
    saved(tmp_path, "gpt_neox")
    layer = "gpt_neox.layers.0.attention."
    masks = {
        layer + "bias": torch.ones(1, 1, 32, 32, dtype=torch.uint8),
        layer + "masked_bias": torch.tensor(-1e9),
        layer + "rotary_emb.inv_freq": torch.ones(4),
    }
    found = seen(with_tensors(tmp_path, masks))
    assert found.left_out == set(masks) and found.unexpected == ()


def test_of_tied_weights_one_is_enough_and_two_are_one(tmp_path: Path) -> None:
    metadata = saved(tmp_path, "qwen2", tie_word_embeddings=True)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    both = with_tensors(tmp_path, {head: load_file(tmp_path / "model.safetensors")[embedding].clone()})
    only_head = with_tensors(tmp_path, {}, drop=(embedding,))
    for one in (metadata, both, only_head):
        found = seen(one)
        assert found.missing == () and found.unexpected == ()
        assert found.canonical(head) == embedding == found.canonical(embedding)


def test_a_pooling_layer_may_be_missing_from_all_models_but_not_from_one(tmp_path: Path) -> None:
    given = {**SMALL, "pad_token_id": 0, "architectures": ["BertModel"]}
    BertModel(AutoConfig.for_model("bert", **given)).save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    whole = checkpoint.read(tmp_path / "a", "a")
    without = with_tensors(tmp_path / "b", {}, ("pooler.dense.weight", "pooler.dense.bias"))
    assert seen(whole).unpooled == seen(without).missing == ()
    assert seen(without).unpooled == ("pooler.dense.bias", "pooler.dense.weight")
    (told,) = tensor_checks.check_complete(without, "b")
    assert (told.severity, told.code) == ("warning", "missing-tensor")
    assert not [*tensor_checks.compare_shapes(without, without, "b", "the base's", "")]
    for base, expert in ((whole, without), (without, whole)):
        (told,) = tensor_checks.compare_shapes(base, expert, "m", "the base's", "")
        assert (told.severity, told.code) == ("error", "missing-tensor")
        assert "b lacks pooler.dense.bias, pooler.dense.weight, which " in told.message


def test_the_axis_of_the_vocabulary_is_found_under_any_name(tmp_path: Path) -> None:
    assert seen(saved(tmp_path / "a", "gpt2")).vocabulary == {
        "transformer.wte.weight": 0,
        "lm_head.weight": 0,
    }
    phi = saved(tmp_path / "b", "phi")
    assert seen(phi).vocabulary_axis("lm_head.bias") == 0
    assert seen(phi).vocabulary_axis("model.layers.0.fc1.bias") is None
    assert tensor_checks.rows(phi) == ("lm_head.bias", 40)


def test_the_table_says_what_transformers_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (kind, tied) in enumerate((k, t) for k in blueprint.TABLED for t in (True, False)):
        metadata = saved(tmp_path / str(number), kind, tie_word_embeddings=tied)
        quick = blueprint._from_table(metadata)
        if quick is None:  # mergekit's list of Gemma has no head
            assert kind.startswith("gemma") and not tied
            continue
        monkeypatch.setattr(blueprint, "TABLED", ())
        assert replace(seen(metadata), names={}) == quick
        monkeypatch.undo()


def test_what_transformers_cannot_make_is_told_with_its_reason(tmp_path: Path) -> None:
    metadata = saved(tmp_path, "llama", attention_bias=True)
    odd = replace(metadata, config={**metadata.config, "hidden_act": "gelou"})
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace("silu", "gelou"))
    (finding,) = tensor_checks.check_complete(odd, "m")
    assert finding.code == "unloadable" and "gelou" in finding.message


def test_a_family_may_have_the_class_of_another(tmp_path: Path) -> None:
    metadata = saved(tmp_path, "iquestcoder", mlp_bias=True)
    assert metadata.config["architectures"] == ["LlamaForCausalLM"]
    assert seen(metadata).parameters.keys() == metadata.tensors.keys()


def test_of_an_unknown_class_nothing_is_claimed(tmp_path: Path) -> None:
    metadata = saved(tmp_path, "llama")
    odd = replace(
        metadata, config={**metadata.config, "architectures": ["OddForCausalLM"], "model_type": "odd"}
    )
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"llama"', '"odd"').replace("LlamaFor", "OddFor"))
    assert [f.code for f in tensor_checks.check_complete(odd, "m")] == ["unlisted"]
