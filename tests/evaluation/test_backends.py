"""eval.backend=vllm, through lm_eval's own adapter and a stand-in for the engine below it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from refusals import refuse
from tiny_tasks import make_model, with_tokenizer, write_task

from mergelab.core.errors import StepError
from mergelab.evaluation import Evaluator, Measure
from mergelab.schema import Evaluation, Hardware

STUB = Path(__file__).parents[1] / "vllm_stub"


_imported: dict[str, Any] = {}
"""The stand-in's modules between two tests: lm_eval registers the adapter above them but once."""


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in, found as the installed package would be, for one test."""
    monkeypatch.syspath_prepend(str(STUB))
    sys.modules.update(_imported)
    stub = import_module("vllm")
    stub.made.clear()
    stub.events.clear()
    yield stub
    for name in [n for n in sys.modules if n.partition(".")[0] == "vllm"]:
        _imported[name] = sys.modules.pop(name)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let preflight pass what the stand-in can do without a GPU."""
    monkeypatch.setattr("mergelab.preflight.evaluation_checks._check_vllm", lambda run: ())


def test_vllm_gives_the_scores_of_transformers_one_engine_at_a_time(
    mergelab: Command, vllm: Any, on_cpu: None
) -> None:
    arguments = ("experts=math_code", "method=linear", "eval.limit=4", "seed=3")
    usual = mergelab(*arguments)
    assert usual.status == 0, usual.err
    assert not vllm.made
    out = mergelab(*arguments, "eval.backend=vllm", "eval.max_length=48")
    assert out.status == 0, out.err
    values = [
        {(m, s, n): score["value"] for m, splits in r["metrics"].items() for s, scores in splits.items()
         for n, score in scores.items()}
        for r in (usual.result, out.result)
    ]  # fmt: skip
    assert values[0] == values[1]
    assert 0 < values[0]["math", "validation", "math"] <= 1
    assert usual.result["fitness"] == out.result["fitness"]

    assert [Path(m["model"]).name for m in vllm.made] == ["model", "base", "math", "code"]
    first = vllm.made[0]
    assert {k: first[k] for k in ("dtype", "tensor_parallel_size", "max_model_len", "seed")} == {
        "dtype": "auto", "tensor_parallel_size": 1, "max_model_len": 48, "seed": 3,
    }  # fmt: skip
    assert first["trust_remote_code"] is False
    assert first["quantization"] is None
    assert vllm.events == ["cleanup", "made", "shutdown", "cleanup"] * 4

    assert "validation by vllm" in out.out
    assert "math, physics, code, japanese by vllm" in out.out
    assert "in int8" not in usual.out + out.out
    assert "by vllm" not in usual.out
    assert out.result["measured"] == {"quantize": "none", "backend": "vllm"}
    assert out.result["versions"]["vllm"] == "0.11.0"
    assert "vllm" not in usual.result["versions"]
    assert usual.result["key"] != out.result["key"]
    assert "by vllm: math" in (out.folder / "model" / "README.md").read_text(encoding="utf-8")

    mergelab(*arguments, "eval.backend=vllm", "eval.max_length=48")
    assert len(vllm.made) == 4, "every score was known"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def evaluator(folder: Path, backend: str, **hardware: Any) -> Evaluator:
    settings = Evaluation(kind="tasks", backend=backend, batch_size=3)
    return Evaluator(settings, hardware=Hardware(threads=1, **hardware), tasks_path=folder, seed=1)


def test_likelihoods_are_the_same_and_progress_is_told(tmp_path: Path, vllm: Any) -> None:
    plain, folder = make_model(tmp_path / "plain", more=["<s>"]), tmp_path / "tasks"
    model = with_tokenizer(
        plain, tmp_path / "model", ["<s>"], "<s> $A", bos_token="<s>", eos_token="<eos>"
    )  # adds BOS by itself
    rows = [{"prompt": f"{n} and", "answer": " two", "other": " seven"} for n in range(4)]
    write_task(
        folder, "choice", rows, output_type="multiple_choice", doc_to_choice="{{[answer, other]}}",
        doc_to_target=0, generation_kwargs=None, metric_list=[{"metric": "acc", "higher_is_better": True}],
    )  # fmt: skip
    write_task(
        folder, "text", rows, output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{prompt}}", generation_kwargs=None,
        metric_list=[{"metric": "byte_perplexity", "higher_is_better": False}],
    )  # fmt: skip
    measures = [Measure("choice", "choice"), Measure("text", "text")]
    seen: dict[str, tuple[int, int]] = {}
    scores = {
        backend: evaluator(folder, backend).evaluate(
            model, measures, progress=lambda what, done, total: seen.update({what: (done, total)})
        )
        for backend in ("hf", "vllm")
    }
    assert seen == {"choice": (8, 8), "text": (4, 4)}
    for name in ("choice", "text"):
        assert scores["vllm"][name].value == pytest.approx(scores["hf"][name].value, rel=1e-5)
    assert scores["hf"]["text"].value > 1


def test_what_vllm_cannot_load_is_told_and_leaves_the_gpu_free(
    tmp_path: Path, model: Path, vllm: Any
) -> None:
    folder = tmp_path / "tasks"
    measures = [Measure("echo", write_task(folder, "echo", [{"prompt": "a", "answer": "b"}]))]
    bench = evaluator(folder, "vllm")
    bench.conditions.settings.max_length = 500
    with pytest.raises(StepError, match=r"cannot be loaded by vLLM: .*max_model_len.*lower eval\.max_length"):
        bench.evaluate(model, measures)
    assert vllm.events[-1] == "cleanup"
    bench.conditions.settings.max_length = None
    bench.conditions.settings.chat_template = True
    with pytest.raises(StepError, match="no chat template"):
        bench.evaluate(model, measures)
    assert vllm.events[-3:] == ["made", "shutdown", "cleanup"]
    bench.conditions.settings.chat_template = False
    assert bench.evaluate(model, measures)["echo"].samples == 1


def test_int4_is_asked_of_bitsandbytes_and_all_gpus_are_used(
    tmp_path: Path, model: Path, vllm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    folder = tmp_path / "tasks"
    measures = [Measure("echo", write_task(folder, "echo", [{"prompt": "a", "answer": "b"}]))]
    evaluator(folder, "vllm", device="cuda", devices=0, quantize="int4").evaluate(model, measures)
    assert (vllm.made[0]["quantization"], vllm.made[0]["tensor_parallel_size"]) == ("bitsandbytes", 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval.backend=vllm"], ["eval.backend: vllm needs a CUDA device", "pip install 'mergelab[vllm]'"]),
        (["eval.backend=vlm"], ["'vlm' is none of hf, vllm. Did you mean 'vllm'?"]),
        (["eval.backend=vllm", "hardware.device=cuda:1", "hardware.quantize=int8"],
         ["CUDA_VISIBLE_DEVICES=1.", "hardware.quantize: vllm quantizes weights to int4"]),
        (["-m", "search=cma", "eval.backend=vllm"], ["eval.backend: vllm cannot be combined with a search"]),
    ],
    ids=["cpu", "misspelt", "second GPU", "search"],
)  # fmt: skip
def test_what_vllm_needs_is_said_before_anything_starts(
    mergelab: Command, tmp_path: Path, family: Any, arguments: list[str], words: list[str]
) -> None:
    errors = refuse(mergelab, arguments, tmp_path)
    for word in words:
        assert any(word in e for e in errors), (word, errors)


def test_a_plan_may_be_made_where_vllm_is_not(mergelab: Command) -> None:
    plan = mergelab("job=plan", "eval.backend=vllm", "hardware.device=cuda")
    assert plan.status == 0, plan.err
    said = " ".join((plan.out + plan.err).split())
    assert "japanese (tiny_japanese) by vllm" in said
    assert "! eval.backend: vllm is not installed" in said
