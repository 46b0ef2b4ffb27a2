"""Mixtures of experts: built, loaded, asked; beside mergekit's own command, and beside the dense model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Command
from weights import same_bits, weights

from mergelab.recipes import mixtures

BUILT = {
    "qwen2": "Qwen2MoeForCausalLM", "qwen3": "Qwen3MoeForCausalLM", "llama": "MixtralForCausalLM",
    "mistral": "MixtralForCausalLM",
}  # fmt: skip
PROMPTS = {"math": ["1+1=", "12*3="], "code": ["def f(x):"], "japanese": ["日本の首都は", "はい、"]}


@pytest.fixture(scope="session")
def dense(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`dense("llama")`: a folder with a base and three experts of that architecture, made once."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            for seed, name in enumerate(("base", *PROMPTS)):
                make_model(made[kind] / name, kind, seed=seed, tied=kind != "llama")
        return made[kind]

    return make


def arguments(folder: Path, *more: str, experts: dict[str, str] | None = None) -> list[str]:
    """What composes a mixture of three local models."""
    out = [f"model.base.path={folder / 'base'}", "method=moe", "eval=none", "experts=single_math"]
    for name, prompts in PROMPTS.items():
        path = folder / (experts or {}).get(name, name)
        quoted = ", ".join(f'"{p}"' for p in prompts)
        out.append(f"experts.{name}={{path: {path}, prompts: [{quoted}]}}")
    return [*out, *more]


READ = ("hidden", "cheap_embed")
"""Gates of each kind that reads the base, and so depends on its family; the others meet one family each."""

MIXED = [(kind, gate) for gate in READ for kind in BUILT]
MIXED += zip(itertools.cycle(BUILT), [g for g in mixtures.GATES if g not in READ])


@pytest.mark.parametrize(("kind", "gate"), MIXED)
def test_every_gate_and_every_family_builds_loads_and_generates(
    kind: str, gate: str, dense: Callable[[str], Path], mergelab: Command
) -> None:
    out = mergelab(*arguments(dense(kind), f"method.parameters.gate_mode={gate}"))
    assert out.status == 0, out.err
    config = json.loads((out.folder / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == [BUILT[kind]]
    assert config.get("num_experts", config.get("num_local_experts")) == 3
    assert config["num_experts_per_tok"] == 2
    assert out.result["merge_method"] == "moe"
    check = out.result["check"]  # which has loaded it and let it answer
    assert check["problems"] == [] and check["prompt"] == "1+1=" and check["tensors"] > 0


@pytest.mark.parametrize("kind", BUILT)
def test_equal_experts_are_the_dense_model(
    kind: str, dense: Callable[[str], Path], mergelab: Command
) -> None:
    from transformers import AutoModelForCausalLM

    same = dict.fromkeys(PROMPTS, "base")
    out = mergelab(*arguments(dense(kind), "allow=[same-experts]", experts=same))
    assert out.status == 0, out.err
    ids = torch.randint(2, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = [
            AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits
            for f in (dense(kind) / "base", out.folder / "model")
        ]
    assert (logits[0] - logits[1]).abs().max() < 1e-5


def mergekit_moe(recipe: Path, out: Path, *options: str, seed: int = 0) -> Path:
    """`mergekit-moe RECIPE OUT --random-seed SEED`, in this process."""
    from mergekit.scripts.moe import main

    main(args=[str(recipe), str(out), "--random-seed", str(seed), *options], standalone_mode=False)
    return out


FROM_THE_DOCUMENTATION = {
    # https://github.com/arcee-ai/mergekit/blob/main/docs/moe.md, with other models and prompts
    "hidden": """
        base_model: {a}
        gate_mode: hidden
        dtype: bfloat16
        experts:
          - source_model: {a}
            positive_prompts:
              - "<|im_start|>user\\nHello, who are you?<|im_end|>"
              - "<|im_start|>user\\nI need help with"
          - source_model: {b}
            positive_prompts:
              - "日本語で答えてください。"
            negative_prompts:
              - "As a doctor of medicine,"
        """,
    "upcycling": """
        base_model: {a}
        gate_mode: random
        dtype: bfloat16
        experts:
          - source_model: {a}
          - source_model: {a}
          - source_model: {a}
          - source_model: {a}
        """,
    "noise": """
        base_model: {a}
        gate_mode: uniform_random
        experts_per_token: 1
        experts:
          - {{source_model: {a}, positive_prompts: [x], noise_scale: 0.1}}
          - {{source_model: {b}, positive_prompts: [y], residual_scale: 0.5}}
        """,
    "shared": """
        base_model: {a}
        architecture: qwen
        gate_mode: cheap_embed
        dtype: float32
        experts:
          - {{source_model: {a}, positive_prompts: [blah]}}
          - {{source_model: {b}, positive_prompts: [blub]}}
        shared_experts:
          - source_model: {a}
            positive_prompts:
              - "blah blah"
            residual_scale: 0.1
        """,
}


@pytest.mark.parametrize("name", FROM_THE_DOCUMENTATION)
def test_a_plain_file_gives_the_weights_of_mergekit_moe(
    name: str, dense: Callable[[str], Path], mergelab: Command, tmp_path: Path
) -> None:
    folder = dense("mistral")
    file = tmp_path / "config_moe.yaml"
    text = FROM_THE_DOCUMENTATION[name].format(a=folder / "base", b=folder / "math")
    file.write_text(text, encoding="utf-8")
    out = mergelab("method=mergekit_moe", f"method.path={file}", "eval=none", "seed=7")
    assert out.status == 0, out.err
    own = mergekit_moe(file, tmp_path / "own", seed=7)
    assert same_bits(out.folder / "model", own)
    again = mergekit_moe(out.folder / "recipe.yaml", tmp_path / "again", seed=7)
    assert same_bits(again, own)


def test_the_seed_decides_random_gates(dense: Callable[[str], Path], mergelab: Command) -> None:
    made = [
        mergelab(*arguments(dense("qwen3"), "method.parameters.gate_mode=random", f"seed={seed}")).folder
        / "model"
        for seed in (1, 1, 2)
    ]
    assert same_bits(made[0], made[1])
    differ = {n for n, t in weights(made[2]).items() if not torch.equal(t, weights(made[0])[n])}
    assert differ and all(".mlp.gate." in n for n in differ)


def test_hidden_gates_do_better_than_random_ones(mergelab: Command) -> None:
    out = mergelab("-m", "method=moe", "method.parameters.gate_mode=hidden,random", "eval.limit=64",
                   "eval.baselines=false")  # fmt: skip
    assert out.status == 0, out.err
    hidden, random = (
        json.loads((out.folder / n / "result.json").read_text(encoding="utf-8")) for n in ("0", "1")
    )
    assert hidden["fitness"]["value"] > random["fitness"]["value"] + 0.1
    assert hidden["fitness"]["value"] > 0.7
    recipe = yaml.safe_load((out.folder / "0" / "recipe.yaml").read_text(encoding="utf-8"))
    assert "architecture" not in recipe  # Qwen2 calls for it by itself
    assert any("は" in p or "の" in p for e in recipe["experts"] for p in e["positive_prompts"])
    assert recipe["shared_experts"][0]["residual_scale"] == 0.0
    for skill in ("math", "physics", "code", "japanese"):
        assert skill in out.out


def test_the_card_tells_of_a_mixture(mergelab: Command) -> None:
    out = mergelab("method=moe", "eval=none")
    card = (out.folder / "model" / "README.md").read_text(encoding="utf-8")
    assert "`moe`" in card and "gate_mode: hidden" in card


WRONG: list[tuple[list[str], list[str]]] = [
    (["method.parameters.gate_mode=hiden"], ["method.parameters.gate_mode", "Did you mean 'hidden'?"]),
    (["method.parameters.experts_per_token=4"], ["experts_per_token: 4 of 3 experts"]),
    (["method.parameters.experts_per_token=0"], ["experts_per_token: 0 of 3 experts"]),
    (["method.parameters.gates=random"], ["method.parameters.gates", "gate_mode"]),
    (["method.parameters.shared_expert=mat"], ["shared_expert: 'mat' is none of", "Did you mean 'math'?"]),
    (["method.parameters.shared_expert=none"], ["a Qwen2Moe has exactly one shared expert"]),
    (["method.parameters.architecture=mixtral"], ["no mixture can be built of qwen2 models"]),
    (["experts.math.prompts=[]", "model.prompts.math=[]"], ["math.prompts: gate_mode=hidden needs prompts"]),
    (["experts.math.weight=0.3"], ["experts.math.weight=0.3: it has no effect with method=moe"]),
    (["experts.math.parameters={noise: 1}"], ["experts.math.parameters.noise", "noise_scale"]),
    (["experts.math.parameters={noise_scale: loud}"], ["experts.math.parameters.noise_scale: 'loud'"]),
    (["model.tokenizer=union"], ["model.tokenizer: it has no effect"]),
    (["method.rescale=density"], ["method.rescale: it has no effect"]),
    (["hardware.dtype=float64"], ["hardware.dtype: 'float64' is none of"]),
    (
        ["experts.math.prompts=[x]", "experts.code.prompts=[x]", "experts.japanese.prompts=[x]"],
        ["all experts have the same prompts"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("more", "told"), WRONG, ids=lambda v: v[0][:40])
def test_what_cannot_be_is_told_before_it_starts(
    more: list[str], told: list[str], dense: Callable[[str], Path], mergelab: Command
) -> None:
    out = mergelab(*arguments(dense("qwen2"), *more))
    assert out.status == 2
    for part in told:
        assert part in out.err
    assert "Traceback" not in out.err and not (out.folder / "model").exists()


def test_what_cannot_be_mixed(
    dense: Callable[[str], Path], make_model: Callable[..., Path], mergelab: Command, tmp_path: Path
) -> None:
    gemma = make_model(tmp_path / "gemma", "gemma2")
    out = mergelab(*arguments(dense("qwen2"), f"experts.math.path={gemma}"))
    assert out.status == 2 and "its architecture is Gemma2ForCausalLM" in out.err
    out = mergelab(*arguments(dense("qwen2"), experts=dict.fromkeys(PROMPTS, "math")))
    assert out.status == 2 and "all experts are the same model" in out.err and "[same-experts]" in out.err
    out = mergelab(*arguments(dense("qwen3"), "method.parameters.shared_expert=base"))
    assert out.status == 2 and "a Qwen3Moe has no shared expert" in out.err
    wide = make_model(tmp_path / "wide", "qwen2", intermediate_size=64)
    out = mergelab(*arguments(dense("qwen2"), f"experts.math.path={wide}"))
    assert out.status == 2 and "intermediate_size is 64" in out.err


FILES: list[tuple[dict[str, Any], list[str]]] = [
    ({"experts": []}, ["experts: it has to be a list"]),
    ({"gate": "hidden"}, ["gate: mergekit-moe does not know", "Did you mean 'gate_mode'?"]),
    ({"base_model": None}, ["base_model: it has to name a model"]),
    ({"experts_per_token": "two"}, ["experts_per_token: 'two' is not a whole number"]),
    (
        {"shared_experts": [{"source_model": "zoo:general", "positive_prompts": ["x"]}]},
        ["base or one of the"],
    ),
    (
        {"experts": [{"source_model": "zoo:math"}, {"source_model": "zoo:code"}]},
        ["experts[0].positive_prompts"],
    ),
    ({"experts": [{"source": "zoo:math"}]}, ["experts[0].source:", "experts[0].source_model: it has to"]),
    ({"architecture": "gpt"}, ["architecture: 'gpt' is none of"]),
]


SOUND: dict[str, Any] = {
    "base_model": "zoo:base", "gate_mode": "hidden",
    "experts": [{"source_model": "zoo:math", "positive_prompts": ["1+1="]},
                {"source_model": "zoo:code", "positive_prompts": ["rev(a)"]}],
    "shared_experts": [{"source_model": "zoo:base", "positive_prompts": ["x"]}],
}  # fmt: skip
"""A file that nothing is wrong with."""


@pytest.mark.parametrize(("change", "told"), FILES, ids=lambda v: str(v)[:30])
def test_what_is_wrong_with_a_file(
    change: dict[str, Any], told: list[str], mergelab: Command, tmp_path: Path
) -> None:
    file = tmp_path / "moe.yaml"
    file.write_text(yaml.safe_dump(SOUND | change), encoding="utf-8")
    out = mergelab("method=mergekit_moe", f"method.path={file}", "eval=none")
    assert out.status == 2
    for part in told:
        assert part in out.err


def test_a_file_decides_what_the_command_line_may_not(mergelab: Command, tmp_path: Path) -> None:
    file = tmp_path / "moe.yaml"
    file.write_text(yaml.safe_dump(SOUND), encoding="utf-8")
    arguments = ["method=mergekit_moe", f"method.path={file}", "eval=none", "job=plan"]
    assert mergelab(*arguments).status == 0
    out = mergelab(*arguments, "experts.math.weight=1")
    assert out.status == 2 and "decides it" in out.err


def test_a_search_says_why_it_cannot_evolve_a_mixture(mergelab: Command) -> None:
    out = mergelab("-m", "method=moe", "search=cma")
    assert out.status == 2 and "no weights to search" in out.err


def test_plans_for_large_families(mergelab: Command) -> None:
    for model, experts in (("qwen7b", "stem"), ("mistral_7b", "math_code"), ("qwen3_8b", "math_japanese")):
        out = mergelab("method=moe", f"model={model}", f"experts={experts}", "job=plan")
        assert out.status == 0, out.err
        assert "mergekit-moe: it builds a mixture" in out.out and "gate_mode: hidden" in out.out
