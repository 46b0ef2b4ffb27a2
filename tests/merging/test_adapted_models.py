"""Adapters that are put on before a merge: the result answers as peft's model does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Command, random_model
from safetensors.torch import load_file
from weights import weights

from mergelab.core.findings import Finding

IDS = torch.arange(2, 40)[None]
SHARD = 20_000
"""Bytes: a few tensors in each file."""


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS, use_cache=False).logits


def load(folder: Path) -> Any:
    """The model in float32; no weight is missing, and none is left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model


def make_adapter(base: Path, folder: Path, config: Any) -> torch.Tensor:
    """Train an adapter on noise; the logits of the base with it, as peft computes them without merging."""
    from peft import PeftModel, get_peft_model

    model = get_peft_model(load(base), config)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=draw) * 0.1)
    model.save_pretrained(folder)
    own = load(base)
    before = logits(own)
    after = logits(PeftModel.from_pretrained(own, folder))
    assert (after - before).abs().max() > 1e-3
    return after


def lora(**settings: Any) -> Any:
    from peft import LoraConfig

    wanted = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**(wanted | settings))


def model_of(folder: Path, kind: str, changes: dict[str, Any]) -> Path:
    """A random model of any kind; `random_model` knows some."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"vocab_size": 304, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
                "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings, pad_token_id=0, **changes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model.save_pretrained(folder)
    return folder


MOE = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
FALCON = {"alibi": False, "num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 64}

TIED = [
    # what the adapter changes, and whether head and embedding are still one
    ({"target_modules": ["q_proj", "lm_head"]}, False),
    ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    ({"target_modules": ["lm_head", "embed_tokens"]}, False),
    ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    ({"trainable_token_indices": [5, 6]}, True),
]

WHOLE = ("falcon", "qwen3_moe")

UNLISTED = [
    ("smollm3", {}, {}),
    ("falcon", FALCON, {"target_modules": ["query_key_value", "lm_head"]}),
    ("gpt2", GPT2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ("qwen3_moe", MOE, {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    ("qwen2", {"tie_word_embeddings": False}, {"bias": "all"}),
]


@pytest.mark.parametrize(("settings", "one"), TIED, ids=lambda s: "-".join(s) if isinstance(s, dict) else "")
def test_a_head_that_is_changed_alone_parts_from_the_embedding(
    settings: dict[str, Any], one: bool, tmp_path: Path
) -> None:
    from mergelab.merging.adapted_models import put_on

    base = random_model(tmp_path / "base", "qwen2")
    wanted = make_adapter(base, tmp_path / "lora", lora(**settings))
    heads = put_on(base, tmp_path / "lora", tmp_path / "out", wide=True, shard=SHARD)
    assert heads == ({} if one else {"lm_head.weight": "model.embed_tokens.weight"})
    assert (logits(load(tmp_path / "out")) - wanted).abs().max() < 1e-5
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is one


@pytest.mark.parametrize(
    ("kind", "changes", "settings", "whole"),
    [*((*case, False) for case in UNLISTED), *((*case, True) for case in UNLISTED if case[0] in WHOLE)],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_an_adapter_on_any_architecture(
    kind: str, changes: dict[str, Any], settings: dict[str, Any], whole: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from mergelab.merging import adapted_models

    base = model_of(tmp_path / "base", kind, changes)
    wanted = make_adapter(base, tmp_path / "lora", lora(**settings))
    if whole:  # as where the names of the files' tensors say nothing
        monkeypatch.setattr(adapted_models.AdaptedModel, "names", lambda model: None)
    adapted_models.put_on(base, tmp_path / "lora", tmp_path / "out", wide=True, shard=SHARD)
    assert (logits(load(tmp_path / "out")) - wanted).abs().max() < 1e-5
    written = {n for f in (tmp_path / "out").glob("*.safetensors") for n in load_file(f)}
    there = {*weights(base)}
    assert written >= there if whole else len(written) < len(there)


@pytest.mark.parametrize("kind", ["qwen2", "smollm3"])  # with a table of its shapes, and with none
def test_an_adapter_that_was_trained_on_a_resized_model(kind: str, tmp_path: Path) -> None:
    """peft then saves embedding and head twice, and needs a base of that size."""
    from peft import PeftModel, get_peft_model

    from mergelab.merging.adapted_models import put_on
    from mergelab.models import adapters, checkpoint
    from mergelab.models.resolver import Source

    base = model_of(tmp_path / "base", kind, {"tie_word_embeddings": False})
    model = load(base)
    model.resize_token_embeddings(307, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    wrapped = get_peft_model(model, lora(modules_to_save=["embed_tokens", "lm_head"]))
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    wrapped.save_pretrained(tmp_path / "lora")

    def errors(folder: Path) -> list[Finding]:
        path, lora = f"{folder}+{tmp_path / 'lora'}", tmp_path / "lora"
        source = Source("math", "experts.math", path, folder=folder, adapter=lora)
        found = adapters.check(source, checkpoint.read(folder, "experts.math"))
        return [f for f in found if f.severity == "error"]

    (finding,) = errors(base)
    assert "was trained on a model with 307 rows in lm_head.weight" in finding.message
    assert f"{base} has 304" in finding.message
    assert "`resize_token_embeddings(307)`" in finding.remedy
    assert errors(tmp_path / "resized") == []
    wanted = logits(PeftModel.from_pretrained(load(tmp_path / "resized"), tmp_path / "lora"))
    put_on(tmp_path / "resized", tmp_path / "lora", tmp_path / "out", wide=True, shard=SHARD)
    assert (logits(load(tmp_path / "out")) - wanted).abs().max() < 1e-5


def test_what_changes_is_kept_in_float32(tmp_path: Path) -> None:
    from mergelab.merging.adapted_models import put_on

    base = random_model(tmp_path / "base", dtype="bfloat16")
    make_adapter(base, tmp_path / "lora", lora())
    factors = factors_of(tmp_path / "lora", "layers.1.")
    name = "model.layers.1.self_attn.q_proj.weight"
    exact = weights(base)[name].double() + 2 * factors["B"] @ factors["A"]
    for wide, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        out = tmp_path / str(wide)
        put_on(base, tmp_path / "lora", out, wide=wide, shard=SHARD)
        tensors = {n: t for f in out.glob("*.safetensors") for n, t in load_file(f).items()}
        assert tensors[name].dtype == dtype
        if wide:
            assert (tensors[name].double() - exact).abs().max() < 1e-6
        else:  # rounded once
            assert torch.equal(tensors[name], exact.float().to(dtype))


def factors_of(adapter: Path, part: str) -> dict[str, torch.Tensor]:
    """The two factors of one module, A and B."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    return {n.rpartition("lora_")[2][:1]: t.double() for n, t in tensors.items() if part in n}


def merged(mergelab: Command, tmp_path: Path, recipe: dict[str, Any]) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    outcome = mergelab("method=mergekit", f"method.path={file}", "eval=none")
    assert outcome.status == 0, outcome.err
    return outcome.folder / "model"


@pytest.mark.parametrize("kind", ["qwen2", "smollm3"], ids=["listed", "unlisted"])
def test_a_tied_model_beside_one_that_is_not_lends_its_embedding(
    kind: str, make_model: Callable[..., Path], mergelab: Command, tmp_path: Path
) -> None:
    base = make_model(tmp_path / "base", kind)
    other = make_model(tmp_path / "other", kind, seed=1)
    make_adapter(base, tmp_path / "a+b", lora(target_modules=["q_proj", "lm_head"]))
    adapter = (tmp_path / "a+b").rename(tmp_path / "lora")
    models = [{"model": f"{base}+{adapter}", "parameters": {"weight": 0.5}},
              {"model": str(other), "parameters": {"weight": 0.5}}]  # fmt: skip
    model = merged(mergelab, tmp_path, {"merge_method": "linear", "dtype": "float32", "models": models})
    b, o, m = weights(base), weights(other), weights(model)
    factors = factors_of(adapter, "lm_head")
    embedding = "model.embed_tokens.weight"
    head = b[embedding].double() + 2 * factors["B"] @ factors["A"]
    assert (m[embedding].double() - (b[embedding] + o[embedding]).double() / 2).abs().max() < 1e-6
    assert (m["lm_head.weight"].double() - (head + o[embedding].double()) / 2).abs().max() < 1e-6
    assert json.loads((model / "config.json").read_text())["tie_word_embeddings"] is False
    assert [p.name for p in model.iterdir() if p.is_dir() or p.is_symlink()] == []


def test_a_model_that_computes_otherwise_without_the_tie_is_refused(tmp_path: Path) -> None:
    import transformers
    from peft import get_peft_model

    from mergelab.core.errors import StepError
    from mergelab.merging.adapted_models import put_on

    small = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**small, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    adapter = get_peft_model(
        model, lora(target_modules=["q"], modules_to_save=["lm_head"], task_type="SEQ_2_SEQ_LM")
    )
    with torch.no_grad():
        next(p for n, p in adapter.named_parameters() if "lm_head.modules_to_save" in n).add_(1)
    adapter.save_pretrained(tmp_path / "lora")
    with pytest.raises(StepError, match="describes a T5For"):
        put_on(tmp_path / "base", tmp_path / "lora", tmp_path / "out", wide=True, shard=SHARD)
