"""The engine beside mergekit, through files: methods, architectures, dtypes, gradients and filters."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from composing import METHODS, experts_for
from pairwise import pairwise
from weights import change, mergekit_yaml, same_bits

from mergelab.merging import streaming_engine
from mergelab.methods import registry
from mergelab.models import checkpoint
from mergelab.recipes import tensor_plan
from mergelab.schema import Hardware

VARIED: dict[str, list[Any]] = {
    "weight": [0.4, [0.2, 0.9], [{"filter": "mlp", "value": [0.1, 0.7]}, {"value": 0.3}]],
    "density": [0.5, [{"filter": "self_attn", "value": 0.3}, {"value": [0.9, 0.4]}], [0.3, 1.0]],
    "gamma": [0.05, [0.01, 0.1], [{"filter": "mlp", "value": 0.2}, {"value": 0.01}]],
    "scale": [[{"filter": "q_proj", "value": 0.5}, {"value": 1.25}]],
}
"""For each expert in turn: numbers, gradients, filters, and filters with gradients."""

SHARED: dict[str, Any] = {
    "t": [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 0.4}],
    "lambda": [0.5, 1.0],
    "select_topk": [{"filter": "down_proj", "value": 0.3}, {"value": [0.4, 1.0]}],
    "normalize": [{"filter": "mlp", "value": True}, {"value": False}],
    "normalize_weights": True,
}


@pytest.fixture(scope="module")
def families(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`families("qwen2", True, "bfloat16")`: a base and three experts near it, made once."""
    made: dict[Any, list[Path]] = {}

    def shake(tensors: dict[str, torch.Tensor], seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        for t in tensors.values():
            t += (torch.randn(t.shape, generator=random) * 0.003).to(t.dtype)

    def family(architecture: str, tied: bool, dtype: str) -> list[Path]:
        key = (architecture, tied, dtype)
        if key not in made:
            root = tmp_path_factory.mktemp("family")
            base = make_model(root / "base", architecture, tied=tied, dtype=dtype)
            made[key] = [base]
            for seed in range(1, 4):
                shutil.copytree(base, root / str(seed))
                change(root / str(seed), lambda tensors, seed=seed: shake(tensors, seed))
                made[key].append(root / str(seed))
        return made[key]

    return family


def recipe_of(name: str, folders: list[Path], dtype: str) -> dict[str, Any]:
    """A recipe that sets what the method takes, each in another way. What is random keeps all."""
    conf, declared = METHODS[name], registry.get(name)
    experts = folders[1 : 1 + experts_for(name)]
    varied = {p: v for p, v in VARIED.items() if p in declared.parameters}
    if declared.traits.random:
        varied["density"] = [1.0] * 3
    models = [
        {"model": str(e), "parameters": {p: v[i % len(v)] for p, v in varied.items()}}
        for i, e in enumerate(experts)
    ]
    shared = {p: v for p, v in conf["parameters"].items() if v is not None}
    shared |= {p: v for p, v in SHARED.items() if p in declared.parameters}
    if name == "nearswap":
        shared["t"] = [0.001, 0.01]
    base = folders[0] if conf["base"] == "model" else experts[0]
    recipe: dict[str, Any] = {"merge_method": name, "base_model": str(base), "models": models,
                              "parameters": shared, "dtype": "float32", "out_dtype": dtype}  # fmt: skip
    return recipe


def fast_merge(recipe: dict[str, Any], out: Path, **hardware: Any) -> Path:
    """Run our engine alone."""
    folders = {m["model"] for m in recipe["models"]} | {recipe["base_model"]}
    facts = {f: checkpoint.weights(Path(f)) for f in folders}
    outputs = tensor_plan.assemble(recipe, facts, registry.get(recipe["merge_method"]))
    h = Hardware(**hardware)
    merge = streaming_engine.plan(
        recipe["merge_method"], outputs, {f: Path(f).name for f in folders}, seed=0, rescale="l1",
        dtype=recipe["dtype"], hardware=h,
    )  # fmt: skip
    out.mkdir()
    streaming_engine.run(merge, out, hardware=h)
    return out


@pytest.mark.parametrize(
    ("name", "dtype", "architecture", "tied"),
    pairwise(list(METHODS), ["bfloat16", "float16", "float32"], ["qwen2", "llama"], ["tied", "untied"]),
)
def test_same_bits_as_mergekit(
    name: str, dtype: str, architecture: str, tied: str, families: Any, stable_mergekit: None, tmp_path: Path
) -> None:
    folders = families(architecture, tied == "tied", dtype)
    recipe = recipe_of(name, folders, dtype)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    theirs = mergekit_yaml(tmp_path / "recipe.yaml", tmp_path / "theirs")
    ours = fast_merge(recipe, tmp_path / "ours")
    assert not same_bits(ours, folders[0]), "nothing was merged"
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("name", METHODS)
def test_workers_change_no_byte(name: str, families: Any, tmp_path: Path) -> None:
    recipe = recipe_of(name, families("qwen2", False, "bfloat16"), "bfloat16")
    for m in recipe["models"] if registry.get(name).traits.random else []:
        m["parameters"]["density"] = 0.5
    one, four = (fast_merge(recipe, tmp_path / str(n), threads=n, shard_size="20KB") for n in (1, 4))
    files = sorted(f.name for f in one.glob("model*"))
    assert files == sorted(f.name for f in four.glob("model*"))
    assert len(files) > 2
    for f in files:
        assert (one / f).read_bytes() == (four / f).read_bytes(), f
