"""Checkpoints as they lie on the hub merge, whatever mergekit's list says, as in plain torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mergelab.methods import registry
from mergelab.models import checkpoint
from mergelab.recipes import recipe_groups, tensor_list, tensor_plan

SMALL = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip

KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    "mixtral": {"num_local_experts": 2},
    "glm4_moe": {"n_routed_experts": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "gpt_neox": {},
    "falcon": {},
    "smollm3": {"pad_token_id": 0},
}
"""Those of which mergekit's list is of another layout, asks for buffers, or is not there."""


def folders(tmp_path: Path, kind: str, **more: Any) -> list[Path]:
    out = []
    for i in range(3):
        torch.manual_seed(i)
        config = AutoConfig.for_model(kind, **{**SMALL, **KINDS[kind], **more})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / str(i))
        out.append(tmp_path / str(i))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_merged_in_the_layout_it_lies_in(tmp_path: Path, kind: str) -> None:
    base, *experts = folders(tmp_path, kind)
    facts = {str(f): checkpoint.read(f, f.name) for f in (base, *experts)}
    recipe = {
        "merge_method": "task_arithmetic", "base_model": str(base),
        "models": [
            {"model": str(experts[0]), "parameters": {"weight": 0.5}},
            {"model": str(experts[1]), "parameters": {"weight": 0.25}},
        ],
    }  # fmt: skip
    outputs = tensor_plan.assemble(recipe, facts, registry.get("task_arithmetic"))
    assert {o.name for o in outputs} == set(load_file(base / "model.safetensors"))
    for o in outputs:
        assert o.parameters["weight"] == [0.5, 0.25] and {s.tensor for s in o.inputs} == {o.name}


def test_a_gradient_runs_over_the_layers_of_an_own_list(tmp_path: Path) -> None:
    base, *_ = folders(tmp_path, "smollm3", num_hidden_layers=3)
    recipe = {"merge_method": "linear", "models": [{"model": str(base), "parameters": {"weight": 1}}]}
    (names,) = recipe_groups.output_tensors(checkpoint.read(base, "b"), recipe_groups.groups(recipe, str))
    places = {n.split(".")[2]: t for n, t in names if ".layers." in n}
    assert places == {"0": 0.0, "1": 0.5, "2": 1.0}
    assert {t for n, t in names if ".layers." not in n} == {0.0}


def test_masks_are_left_out(tmp_path: Path) -> None:
    base, *_ = folders(tmp_path, "gpt_neox")
    file = base / "model.safetensors"
    mask = {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 32, 32, dtype=torch.bool)}
    own = load_file(file)
    save_file(own | mask, file, metadata={"format": "pt"})
    names = {w.name for w in tensor_list.listed(checkpoint.read(base, "b")) or ()}
    assert names == set(own)


@pytest.mark.parametrize("kind", ["qwen3_moe", "falcon"])
def test_the_command_merges_and_loads_them(
    tmp_path: Path, mergelab: Callable[..., Any], kind: str, family: Any
) -> None:
    base, *experts = folders(tmp_path, kind, vocab_size=304)
    for f in (base, *experts):
        for file in family.checkpoint("base").glob("*token*"):
            shutil.copy(file, f)
    done = mergelab(
        f"model.base.path={base}", "experts=math_physics", f"experts.math.path={experts[0]}",
        f"experts.physics.path={experts[1]}", "method=linear", "eval=none",
        "experts.math.weight=1", "experts.physics.weight=1", "hardware.dtype=float32",
        "method.base=none", f"output={tmp_path / 'out'}",
    )  # fmt: skip
    assert done.status == 0, done.err
    a, b = (load_file(f / "model.safetensors") for f in experts)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == a.keys()
    for n, t in merged.items():
        torch.testing.assert_close(t, (a[n] + b[n]) / 2)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
