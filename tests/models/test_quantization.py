"""Whether weights are quantized is seen by the tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_models import Models
from weights import weights

from mergelab.evaluation import loading
from mergelab.merging import model_files
from mergelab.models import checkpoint, quantization
from mergelab.schema import Hardware

PLAIN = {"model.layers.0.mlp.up_proj.weight": "BF16", "model.norm.weight": "F32", "logit_scale": "F32"}
FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

QUANTIZED: list[tuple[str, Mapping[str, str]]] = [
    ("gptq", {"q.qweight": "I32", "q.qzeros": "I32", "q.scales": "F16", "q.g_idx": "I32"}),
    ("awq", {"q.qweight": "I32", "q.scales": "F16"}),
    ("bitsandbytes", {"q.weight": "U8", "q.weight.absmax": "F32",
                      "q.weight.quant_state.bitsandbytes__nf4": "U8"}),
    ("bitsandbytes", {"q.weight": "I8", "q.SCB": "F32"}),
    ("fp8", {"q.weight": "F8_E4M3", "q.weight_scale_inv": "F32"}),
    ("compressed-tensors", {"q.weight_packed": "I32", "q.weight_scale": "BF16", "q.weight_shape": "I64"}),
    ("mxfp4", {"experts.gate_up_proj_blocks": "U8", "experts.gate_up_proj_scales": "U8"}),
    ("fbgemm_fp8", {"q.weight": "F8_E4M3"}),
    ("bitnet", PLAIN),
]  # fmt: skip


@pytest.mark.parametrize(("method", "dtypes"), QUANTIZED)
def test_quantized_weights_are_refused(method: str, dtypes: Mapping[str, str]) -> None:
    config = {"quantization_config": {"quant_method": method}}
    (found,) = quantization.check(config, {**PLAIN, **dtypes}, "experts.a", Path("config.json"))
    assert (found.severity, found.code) == ("error", "quantized")
    assert f"({method})" in found.message


@pytest.mark.parametrize(
    "config",
    [{"quantization_config": FOUR_BITS}, {"quantization_config": {"quant_method": "fp8"}},
     {"quantization_config": {}}, {"text_config": {"quantization_config": FOUR_BITS}}],
)  # fmt: skip
def test_a_key_that_is_outdated_is_said_and_not_passed_on(config: dict[str, Any]) -> None:
    (found,) = quantization.check(config, PLAIN, "experts.a", Path("config.json"))
    assert (found.severity, found.code) == ("warning", "quantization-leftover")
    assert "quantization_config" not in json.dumps(quantization.without(config))


def test_null_is_no_quantization() -> None:
    assert list(quantization.check({"quantization_config": None}, PLAIN, "", Path())) == []


def test_a_model_with_an_outdated_key_is_loaded_as_it_is_and_lends_its_config(models: Models) -> None:
    models.config("base", quantization_config=FOUR_BITS)
    model, _ = loading.load(models["base"], Hardware())
    assert model.dtype == torch.float32
    own = weights(models["base"])
    assert all(torch.equal(t, own[n]) for n, t in model.state_dict().items() if n in own)
    out = models.folder / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes((models["base"] / "model.safetensors").read_bytes())
    model_files.write_config(models["base"], out, {}, {})
    assert "quantization_config" not in json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert checkpoint.read(out, "").findings == ()
