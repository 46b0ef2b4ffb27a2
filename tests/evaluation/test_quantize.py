"""hardware.quantize: models measured in fewer bits, and never taken for those measured in all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from refusals import refuse
from tiny_tasks import write_task

from mergelab.evaluation import Evaluator, Measure, load
from mergelab.evaluation.int8 import Int8Linear
from mergelab.schema import Evaluation, Hardware

INT8 = Hardware(quantize="int8", threads=1)
FULL = Hardware(threads=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_weight_is_off_by_half_a_step_of_its_row(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 40).to(dtype)
    with torch.no_grad():
        layer.weight[3] *= 100  # its steps are its own affair
        layer.weight[5] = 0
    made = Int8Linear(layer)
    assert made.steps.dtype == torch.int8
    assert made.steps.abs().amax(1).tolist() == [127] * 5 + [0] + [127] * 34
    back = made.steps * made.step[:, None]
    assert ((back - layer.weight.float()).abs() <= made.step[:, None] * 0.5001).all()

    x = torch.randn(2, 7, 64, dtype=dtype)
    x[..., 9] *= 40  # as large language models have them, and what rounding of inputs founders on
    y = made(x)
    assert (y.dtype, y.shape) == (dtype, (2, 7, 40))
    want = torch.nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float())
    assert (y.float() - want).norm() / want.norm() < 0.01
    alone = made(x[:1, :3])
    assert torch.allclose(alone, y[:1, :3], rtol=1e-5, atol=1e-5), "an answer depends on no other"


def logits(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.inference_mode():
        return model(torch.randint(4, 300, (2, 12))).logits.float()


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "mistral", "gemma2"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_model_in_int8_says_nearly_the_same(
    make_model: Callable[..., Path], tmp_path: Path, architecture: str, tied: bool
) -> None:
    folder = make_model(tmp_path / "m", architecture, dtype="bfloat16", tied=tied, hidden_size=64)
    full, _ = load(folder, FULL)
    small, tokenizer = load(folder, INT8)
    linear = [n for n, m in full.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"]
    assert [n for n, m in small.named_modules() if isinstance(m, Int8Linear)] == linear
    assert len(linear) == 3 * 7
    assert torch.equal(small.get_output_embeddings().weight, full.get_output_embeddings().weight)
    assert (small.get_output_embeddings().weight is small.get_input_embeddings().weight) is tied
    one, other = logits(full), logits(small)
    assert 0 < (one - other).norm() / one.norm() < 0.05
    sizes = [sum(p.numel() * p.element_size() for p in m.model.layers.parameters()) for m in (full, small)]
    assert sizes[1] < 0.56 * sizes[0]
    ids = tokenizer("1+1=", return_tensors="pt")
    assert small.generate(**ids, max_new_tokens=3, min_new_tokens=3).shape[1] == ids.input_ids.shape[1] + 3


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}),
    ],
)
def test_the_packed_experts_of_a_mixture_keep_their_bits(
    make_model: Callable[..., Path], tmp_path: Path, architecture: str, settings: dict[str, int]
) -> None:
    folder = make_model(tmp_path / "m", architecture, **settings)
    full, _ = load(folder, FULL)
    small, _ = load(folder, INT8)
    packed = {n: p for n, p in full.named_parameters() if p.ndim == 3}
    assert packed, "transformers packs experts no more: then they can be quantised"
    for name, parameter in small.named_parameters():
        assert name not in packed or torch.equal(parameter, packed[name])
    made = [n for n, m in small.named_modules() if isinstance(m, Int8Linear)]
    assert sum("self_attn" in n for n in made) == 3 * 4
    one, other = logits(full), logits(small)
    assert 0 < (one - other).norm() / one.norm() < 0.05


def test_a_lora_on_a_model_in_int8_keeps_its_bits(make_model: Callable[..., Path], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder = make_model(tmp_path / "m", hidden_size=64)
    bare, _ = load(folder, FULL)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(load(folder, FULL)[0], config).save_pretrained(tmp_path / "lora")
    full, _ = load(folder, FULL, adapter=tmp_path / "lora")
    small, _ = load(folder, INT8, adapter=tmp_path / "lora")
    assert sum(isinstance(m, Int8Linear) for m in small.modules()) == 3 * 7
    factors = {n: p for n, p in full.named_parameters() if ".lora_" in n}
    assert len(factors) == 3 * 2 * 2
    assert all(torch.equal(dict(small.named_parameters())[n], p) for n, p in factors.items())
    one, other, without = logits(full), logits(small), logits(bare)
    assert 0 < (one - other).norm() < 0.1 * (one - without).norm()


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_run_in_int8_says_so_and_shares_nothing_but_the_merge(
    mergelab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("experts=math_code", "method=linear", "eval.limit=40", "seed=11")
    full, small = mergelab(*arguments), mergelab(*arguments, "hardware.quantize=int8")
    assert (full.status, small.status) == (0, 0), full.err + small.err
    assert digest(full.folder / "model/model.safetensors") == digest(small.folder / "model/model.safetensors")
    assert full.result["key"] != small.result["key"]
    assert "measured" not in full.result
    assert small.result["measured"] == {"quantize": "int8", "backend": "hf"}
    assert "in int8" not in full.out
    assert "code, japanese in int8" in small.out
    assert "validation in int8" in small.out
    assert " in int8: math" in (small.folder / "model/README.md").read_text(encoding="utf-8")
    scores = [
        [score["value"] for splits in r["metrics"].values() for s in splits.values() for score in s.values()]
        for r in (full.result, small.result)
    ]
    assert scores[0] != scores[1], "these seeds show that the scores are not those from the cache"
    assert max(abs(a - b) for a, b in zip(*scores, strict=True)) <= 0.1


def test_scores_are_kept_apart(family: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(4)]
    measures = [Measure("echo", write_task(tmp_path / "tasks", "echo", rows))]
    kept = []
    for quantize in ("none", "int8", "none", "int8"):
        bench = Evaluator(
            Evaluation(kind="tasks"), hardware=Hardware(quantize=quantize, threads=1),
            tasks_path=tmp_path / "tasks", home=tmp_path / "home",
        )  # fmt: skip
        bench.evaluate(family.checkpoint("math"), measures, fingerprint="one")
        kept.append(len(list((tmp_path / "home" / "scores").iterdir())))
    assert kept == [1, 2, 2, 2]


def test_neither_merge_nor_check_is_quantised(mergelab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: Any) -> None:
        raise AssertionError("quantised")

    monkeypatch.setattr("mergelab.evaluation.int8.quantize", fail)
    merged = mergelab("experts=math_code", "eval=none", "hardware.quantize=int8")
    assert merged.status == 0, merged.err
    looked = mergelab("job=check", f"check.path={merged.folder}/model", "hardware.quantize=int8")
    assert looked.status == 0, looked.err
    measured = mergelab("experts=math_code", "eval.limit=1", "eval.cache=false", "hardware.quantize=int8")
    assert measured.status != 0


@pytest.mark.parametrize(
    ("quantize", "asked"),
    [
        ("int8", {"load_in_8bit": True, "load_in_4bit": False}),
        ("int4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                  "bnb_4bit_compute_dtype": torch.bfloat16}),
    ],
)  # fmt: skip
def test_on_cuda_bitsandbytes_is_asked_for(
    sound: Path, monkeypatch: pytest.MonkeyPatch, quantize: str, asked: dict[str, Any]
) -> None:
    """The library and its GPU are not here: what transformers would be given is looked at."""
    from transformers import Qwen2ForCausalLM

    given: dict[str, Any] = {}

    class Model:
        def eval(self) -> Model:
            return self

    def from_pretrained(folder: Path, **options: Any) -> tuple[Any, Any]:
        given.update(options)
        return Model(), {"missing_keys": []}

    monkeypatch.setattr(Qwen2ForCausalLM, "from_pretrained", from_pretrained)
    load(sound / "base", Hardware(device="cuda:1", quantize=quantize))  # and it is not moved afterwards
    assert given["device_map"] == "cuda:1"
    assert {k: getattr(given["quantization_config"], k) for k in asked} == asked


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["hardware.quantize=int4"], "hardware.quantize: int4 needs a CUDA device, and hardware.device=cpu "
                                     "Set hardware.quantize=int8, or hardware=gpu."),
        (["hardware.quantize=nit8"], "'nit8' is none of none, int8, int4. Did you mean 'int8'?"),
        (["hardware.quantize=int8", "hardware.device=cuda"],
         "int8 on cuda needs bitsandbytes, which is not installed pip install 'mergelab[quant]'"),
        (["-m", "search=cma", "hardware.quantize=int8"],
         "hardware.quantize: int8 cannot be combined with a search"),
    ],
    ids=["int4 on a CPU", "misspelt", "not installed", "search"],
)  # fmt: skip
def test_what_cannot_be_quantised_is_refused(
    mergelab: Command, tmp_path: Path, family: Any, arguments: list[str], word: str
) -> None:
    errors = refuse(mergelab, arguments, tmp_path)
    assert any(word in e for e in errors), errors


def test_a_plan_says_what_it_means(
    mergelab: Command, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    settings = {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
    for seed, name in enumerate(("base", "math", "code")):
        make_model(tmp_path / name, "qwen3_moe", seed=seed, **settings)
    arguments = [
        f"model.base.path={tmp_path}/base", "experts=math_code", f"experts.math.path={tmp_path}/math",
        f"experts.code.path={tmp_path}/code", "method=linear", "job=plan",
    ]  # fmt: skip
    said = " ".join(mergelab(*arguments, "hardware.quantize=int8").out.split())
    assert "japanese (tiny_japanese) in int8" in said
    assert "only its attention is measured in int8: transformers packs the weights of all experts" in said
    assert "int8" not in mergelab(*arguments).out
