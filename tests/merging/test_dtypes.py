"""Tensors that the base holds in float32 are written in it, whatever most of the model is in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import composed, merged
from conftest import Command
from transformers import AutoModelForCausalLM
from weights import change, weights

from mergelab import plan as planned
from mergelab.optimization.candidate_evaluator import CandidateEvaluator

NAMES = ("base", "math", "code")
WEIGHTS = {"math": 0.3, "code": 0.6}
MIXTURE = {"num_local_experts": 2, "num_experts_per_tok": 1}


def made(make_model: Callable[..., Path], folder: Path, kind: str, part: str, **settings: Any) -> Path:
    """A base in bfloat16 whose tensors with `part` in their names are in float32, and two experts."""

    def keep(tensors: dict[str, torch.Tensor]) -> None:
        for name, t in tensors.items():
            if part in name:
                tensors[name] = t.float() + 1e-4  # which bfloat16 cannot hold

    for seed, name in enumerate(NAMES):
        change(make_model(folder / name, kind, dtype="bfloat16", seed=seed, tied=False, **settings), keep)
    return folder


def overrides(folder: Path, *more: str) -> list[str]:
    return [
        f"model.base.path={folder / 'base'}", "experts=math_code", "method=task_arithmetic", "eval=none",
        *(f"experts.{n}.path={folder / n}" for n in WEIGHTS),
        *(f"experts.{n}.weight={w}" for n, w in WEIGHTS.items()), *more,
    ]  # fmt: skip


def check(got: dict[str, torch.Tensor], folder: Path) -> None:
    """Each tensor is the float32 result, rounded once to the base's dtype of that tensor."""
    base, *experts = (weights(folder / n) for n in NAMES)
    for name, t in got.items():
        deltas = [
            w * (e[name].float() - base[name].float()) for w, e in zip(WEIGHTS.values(), experts, strict=True)
        ]
        want = base[name].float() + sum(deltas)
        assert t.dtype == base[name].dtype, name
        assert torch.allclose(t.float(), want, rtol=0 if t.dtype is torch.float32 else 2**-8, atol=1e-6), name
    assert {t.dtype for t in got.values()} == {torch.float32, torch.bfloat16}


def test_each_tensor_keeps_the_dtype_of_the_base(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = made(make_model, tmp_path / "in", "llama", "norm")
    # The base decides, not the experts.
    change(folder / "math", lambda t: t.update({n: x.bfloat16() for n, x in t.items()}))
    change(folder / "code", lambda t: t.update({n: x.float() for n, x in t.items()}))
    run = composed(*overrides(folder))
    plan = planned(run, tmp_path)
    out = merged(run, tmp_path / "run")
    got = weights(out)
    check(got, folder)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert plan.estimate is not None
    assert plan.estimate.write == sum(t.numel() * t.element_size() for t in got.values())
    live = CandidateEvaluator(run).merge(run)[0].state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    assert all(live[n].dtype == t.dtype and torch.equal(live[n], t) for n, t in loaded.items())

    asked = weights(merged(composed(*overrides(folder, "hardware.dtype=float16")), tmp_path / "asked"))
    assert {t.dtype for t in asked.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("kind", "part", "settings"), [("llama", "norm", {}), ("mixtral", "gate.weight", MIXTURE)]
)
def test_on_the_path_of_mergekit_too(
    kind: str,
    part: str,
    settings: dict[str, int],
    make_model: Callable[..., Path],
    mergelab: Command,
    tmp_path: Path,
) -> None:
    folder = made(make_model, tmp_path / "in", kind, part, **settings)
    out = mergelab(*overrides(folder, "hardware.engine=mergekit", f"output={tmp_path / 'out'}"))
    assert out.status == 0, out.err
    got = weights(tmp_path / "out")
    folders = {n: folder / n for n in NAMES} | {"out": tmp_path / "out"}
    states = {
        n: AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).state_dict()
        for n, f in folders.items()
    }
    for name, base in states["base"].items():
        want = base + sum(w * (states[n][name] - base) for n, w in WEIGHTS.items())
        exact = part in name
        assert torch.allclose(states["out"][name], want, rtol=0 if exact else 2**-8, atol=1e-6), name
    kept = {n: t for n, t in got.items() if t.dtype is torch.float32}
    assert len(kept) == (7 if kind == "llama" else 3), kept.keys()
