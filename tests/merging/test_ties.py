"""One tensor under two names is one tensor: merged once, however its copies are stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import composed, merged
from transformers import AutoConfig, AutoModelForCausalLM
from weights import change, same_bits, weights

from mergelab import plan as planned
from mergelab.merging import mergekit_backend
from mergelab.models import checkpoint, ties
from mergelab.optimization.candidate_evaluator import CandidateEvaluator
from mergelab.schema import Hardware

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NAMES = ("base", "math", "code")


@pytest.fixture(scope="module")
def plain(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two experts with tied embeddings, each stored once."""
    folder = tmp_path_factory.mktemp("plain")
    for seed, name in enumerate(NAMES):
        make_model(folder / name, seed=seed, tied=True)
    return folder


def twice(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def only_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


def another_head(tensors: dict[str, torch.Tensor]) -> None:
    noise = torch.Generator().manual_seed(7)
    tensors[HEAD] = tensors[EMBEDDING] + torch.randn(tensors[EMBEDDING].shape, generator=noise) * 0.1


def with_copies(plain: Path, folder: Path, who: Sequence[str], edit: Any = twice) -> Path:
    shutil.copytree(plain, folder)
    for name in who:
        change(folder / name, edit)
    return folder


def overrides(folder: Path, method: str, *more: str) -> list[str]:
    return [
        f"model.base.path={folder / 'base'}", "experts=math_code",
        *(f"experts.{n}.path={folder / n}" for n in ("math", "code")),
        f"method={method}", "eval=none", *more,
    ]  # fmt: skip


WHO: dict[str, tuple[Sequence[str], Any, str]] = {
    "all": (NAMES, twice, "dare_ties"),
    "one expert": (("code",), twice, "della"),
    "the base": (("base",), twice, "linear"),
    "a head alone": (("math",), only_head, "dare_ties"),
}
"""Which models hold the tensor under both names, or under the second one alone; and the method to try."""


@pytest.mark.parametrize("who", WHO)
def test_however_it_is_stored_the_embedding_is_merged_once(plain: Path, tmp_path: Path, who: str) -> None:
    *how, method = WHO[who]
    folder = with_copies(plain, tmp_path / "in", *how)
    more = ["experts.math.weight={embed_tokens: 0.1, *: 0.6}"]
    run = composed(*overrides(folder, method, *more))
    one = merged(run, tmp_path / "one")
    two = merged(composed(*overrides(plain, method, *more)), tmp_path / "two")
    assert HEAD not in weights(one)
    # Masks are keyed by names, so that equal bits mean equal keys.
    assert same_bits(one, two)
    model, _ = CandidateEvaluator(run).merge(run)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, weights(one)[EMBEDDING])


@pytest.mark.parametrize("who", WHO)
def test_on_the_path_of_mergekit_too(plain: Path, tmp_path: Path, who: str) -> None:
    folder = with_copies(plain, tmp_path / "in", *WHO[who][:2])

    def by_mergekit(root: Path, out: Path) -> dict[str, torch.Tensor]:
        parameters = {"weight": 0.5, "density": 0.5}
        recipe = {
            "merge_method": "dare_ties", "base_model": str(root / "base"), "dtype": "float32",
            "models": [{"model": str(root / n), "parameters": parameters} for n in ("math", "code")],
        }  # fmt: skip
        out.mkdir()
        mergekit_backend.merge(recipe, out, hardware=Hardware(threads=1), seed=0)
        return weights(out)

    one, two = by_mergekit(folder, tmp_path / "one"), by_mergekit(plain, tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    assert HEAD not in one


@pytest.mark.parametrize("engine", ["fast", "mergekit"])
def test_copies_that_differ_are_two_tensors_as_transformers_loads_them(
    plain: Path, tmp_path: Path, engine: str
) -> None:
    folder = with_copies(plain, tmp_path / "in", ["code"], another_head)
    loaded = {n: AutoModelForCausalLM.from_pretrained(folder / n) for n in NAMES}
    assert not torch.equal(loaded["code"].lm_head.weight, loaded["code"].model.embed_tokens.weight)
    run = composed(
        *overrides(folder, "task_arithmetic", "experts.math.weight=0.3", "experts.code.weight=0.6")
    )
    plan = planned(run, tmp_path)
    (told,) = [f for f in plan.warnings if f.code == "tied-differ"]
    assert told.place == "experts.code" and HEAD in told.message
    out = tmp_path / "out"
    if engine == "fast":
        out = merged(run, tmp_path / "run")
    else:
        assert plan.recipe is not None
        out.mkdir()
        mergekit_backend.merge(plan.recipe, out, hardware=Hardware(threads=1), seed=0)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    got = AutoModelForCausalLM.from_pretrained(out).state_dict()
    states = {n: m.state_dict() for n, m in loaded.items()}
    for name, base in states["base"].items():
        want = base + 0.3 * (states["math"][name] - base) + 0.6 * (states["code"][name] - base)
        assert torch.allclose(got[name], want, atol=1e-6), name
    if engine == "fast":
        model, _ = CandidateEvaluator(run).merge(run)
        live = model.state_dict()
        assert all(torch.equal(live[n], t) for n, t in got.items())
        assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_a_filter_that_names_only_the_second_name_is_told_to_have_no_effect(
    plain: Path, tmp_path: Path
) -> None:
    for number, folder in enumerate((plain, with_copies(plain, tmp_path / "in", NAMES))):
        run = composed(*overrides(folder, "task_arithmetic", "experts.math.weight={lm_head: 0.1, *: 0.6}"))
        plan = planned(run, tmp_path / str(number))
        assert [(f.code, f.severity, f.place) for f in plan.findings if f.code == "tied-filter"] == [
            ("tied-filter", "warning", "experts.math.weight")
        ]
        out = merged(run, tmp_path / f"run{number}")
        other = composed(*overrides(folder, "task_arithmetic", "experts.math.weight=0.6"))
        assert same_bits(out, merged(other, tmp_path / f"other{number}"))
    named = composed(*overrides(plain, "linear", "experts.math.weight={embed_tokens: 0.1, *: 0.6}"))
    assert not [f for f in planned(named, tmp_path).findings if f.code == "tied-filter"]


def test_a_class_that_ties_by_default_needs_no_head(tmp_path: Path, family: Any) -> None:
    settings = {"vocab_size": 304, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_kv_heads": 2, "new_decoder_architecture": True, "bos_token_id": 1}  # fmt: skip
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **settings))
        model.save_pretrained(tmp_path / name)
        for file in family.checkpoint("base").glob("*token*"):
            shutil.copyfile(file, tmp_path / name / file.name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config.pop("tie_word_embeddings", None)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    for name in NAMES[1:]:
        assert HEAD not in weights(tmp_path / name)
    out = merged(composed(*overrides(tmp_path, "dare_ties")), tmp_path / "run")
    assert weights(out).keys() == weights(tmp_path / "base").keys()


def test_copies_are_compared_by_their_bytes_once(plain: Path, tmp_path: Path) -> None:
    folder = with_copies(plain, tmp_path / "in", ["math"]) / "math"
    assert ties.of([checkpoint.read(folder, "")]) == {HEAD: EMBEDDING}

    def last(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD].view(-1)[-1] += 1

    change(folder, last)
    assert ties.of([checkpoint.read(folder, "")]) == {}
    assert ties.of([]) == {}
