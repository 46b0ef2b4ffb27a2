"""A Run as mergekit's YAML, and what a setting means: the same as mergekit says."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from composing import composed

from mergelab.core.conf_dir import CONF
from mergelab.core.errors import InputError, InputErrors
from mergelab.methods import registry
from mergelab.recipes import recipe, recipe_groups
from mergelab.recipes.parameters import Settings

KNOWN = registry.methods()


def built(*overrides: str) -> dict[str, Any]:
    run = composed(*overrides)
    references = {name: f"/models/{name}" for name in ("base", *run.experts)}
    return recipe.build(run, references, KNOWN[run.method.name].used, "bfloat16")


@pytest.mark.parametrize(
    ("ours", "mergekits"),
    [
        (0.5, 0.5),
        (True, True),
        ("1e-5", 1e-5),
        ([0.2, 0.8], [0.2, 0.8]),
        (["1e-5", 1], [1e-5, 1]),
        ({"mlp": 0.3}, [{"value": 0.3, "filter": "mlp"}]),
        (
            {"self_attn": 0.3, "mlp": [0.2, 0.8], "*": 0.5},
            [{"value": 0.3, "filter": "self_attn"}, {"value": [0.2, 0.8], "filter": "mlp"}, {"value": 0.5}],
        ),
        ([{"filter": "mlp", "value": 1}, {"value": 0}], [{"value": 1, "filter": "mlp"}, {"value": 0}]),
        ([{"filter": "*", "value": 1}], [{"value": 1}]),
        ({"value": 0.5, "filter": "mlp"}, [{"value": 0.5, "filter": "mlp"}]),
    ],
)
def test_settings(ours: Any, mergekits: Any) -> None:
    assert recipe.setting(ours, "key") == mergekits
    assert recipe.setting(mergekits, "key") == mergekits


@pytest.mark.parametrize(
    "wrong",
    [
        None, [], {}, [[1.0], [2.0]], {"mlp": {}}, {"*": 1, "mlp": 2}, [{"fitler": "mlp", "value": 1}],
        [{"value": 1}, 2], [{"value": 1}, {"filter": "mlp", "value": 2}],
    ],
)  # fmt: skip
def test_what_is_no_setting(wrong: Any) -> None:
    with pytest.raises(InputError, match=r"^experts\.math\.weight[:.]"):
        recipe.setting(wrong, "experts.math.weight")


# ---------------------------------------------------------------- against mergekit

PARTS = ("self_attn", "mlp", "layers.1.", "norm", "embed", "weight")
TENSORS = (
    "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.bias",
    "model.layers.11.mlp.down_proj.weight", "model.norm.weight",
)  # fmt: skip


def random_setting(rng: random.Random, *, nested: bool = True) -> Any:
    kind = rng.choice(["number", "text", "gradient", "mapping"] if nested else ["number", "text", "gradient"])
    if kind == "number":
        return rng.choice([rng.uniform(-1, 2), rng.randint(0, 3)])
    if kind == "text":
        return f"{rng.uniform(0, 1):.3e}"
    if kind == "gradient":
        return [rng.choice([rng.uniform(0, 1), f"{rng.uniform(0, 1):.2e}"]) for _ in range(rng.randint(1, 5))]
    chosen = rng.sample(PARTS, rng.randint(1, 3)) + ["*"] * rng.randint(0, 1)
    return {part: random_setting(rng, nested=False) for part in chosen}


def test_a_setting_comes_to_what_mergekit_makes_of_it() -> None:
    from mergekit.config import ParameterSetting, evaluate_setting
    from pydantic import TypeAdapter

    parse, number = TypeAdapter(ParameterSetting).validate_python, TypeAdapter(float).validate_python
    rng = random.Random(0)
    for _ in range(2000):
        written = random_setting(rng)
        ours = recipe.setting(written, "key")
        if isinstance(written, dict):  # our own way to write mergekit's list
            written = [{"filter": f, "value": v} for f, v in written.items()]
        tensor, t = rng.choice(TENSORS), rng.choice([0.0, 1.0, rng.random()])
        for setting in (written, ours):
            theirs = evaluate_setting(tensor, parse(setting), t, validate=number)
            assert recipe.value_at(ours, tensor, t) == theirs, (setting, tensor, t)


def random_recipe(rng: random.Random) -> dict[str, Any]:
    """A DELLA merge whose weights, densities and epsilons are set here, there, or nowhere."""

    def parameters(names: list[str]) -> dict[str, Any]:
        return {n: recipe.setting(random_setting(rng), n) for n in names if rng.random() < 0.6}

    per_model = ["weight", "density", "epsilon"]
    sources = [
        {"model": f"/m/{n}", "layer_range": [0, 12], "parameters": parameters(per_model)} for n in "abc"
    ]
    return {
        "merge_method": "della",
        "base_model": "/m/a",
        "slices": [{"sources": sources, "parameters": parameters([*per_model, "lambda"])}],
        # A rest for what nothing else sets: without one mergekit stops.
        "parameters": parameters(["density", "lambda"]) | {"weight": rng.random(), "normalize": True},
    }


def test_parameters_come_to_what_mergekit_resolves() -> None:
    from mergekit import merge_methods
    from mergekit.config import ConfigReader, MergeConfiguration
    from mergekit.parameter_resolver import resolve_parameters

    spec = merge_methods.get("della").spec
    rng = random.Random(1)
    for _ in range(150):
        content = random_recipe(rng)
        config = MergeConfiguration.model_validate(content)
        (group,) = recipe_groups.groups(content, lambda path: "")
        settings = Settings(KNOWN["della"], group, lambda path: "")
        tensor, t = rng.choice(TENSORS), rng.random()
        shared, own = resolve_parameters(
            spec,
            tensor_name=tensor,
            inputs=dict.fromkeys(config.referenced_models(), tensor),
            sources=ConfigReader(config=config, t=t, slice_out=config.slices[0]).parameter_sources,
            base_model=config.base_model,
            t=t,
        )
        for name, value in shared.items():
            assert settings.at(None, name, (tensor, t))[0] == value, (name, content)
        for model, values in own.items():
            assert {n: str(model) in settings.models(n) for n in values} == dict.fromkeys(values, True)
            for name, value in values.items():
                assert settings.at(str(model), name, (tensor, t))[0] == value, (name, content)


# ---------------------------------------------------------------- whole recipes


def test_the_default_experiment() -> None:
    experts = [
        {"model": f"/models/{n}", "parameters": {"weight": 0.5, "density": 0.5}}
        for n in ("math", "physics", "code", "japanese")
    ]
    assert built() == {
        "merge_method": "dare_ties",
        "base_model": "/models/base",
        "models": experts,
        "parameters": {"lambda": 1.0, "normalize": False, "rescale": True, "int8_mask": False},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


def test_what_a_method_does_not_take_and_what_is_null_is_left_out() -> None:
    slerp = built("method=slerp", "experts=stem")
    assert slerp["models"] == [{"model": "/models/math"}, {"model": "/models/physics"}]
    assert slerp["base_model"] == "/models/math"
    passed = built("method=passthrough", "experts=single_math", "hardware.compute_dtype=null")
    assert set(passed) == {"merge_method", "base_model", "models", "out_dtype"}
    assert "density" not in built("experts.math.density=null")["models"][0]["parameters"]
    assert "base_model" not in built("method=linear", "method.base=none")


def test_overrides_reach_the_recipe() -> None:
    made = built(
        "method=della", "experts.math.weight={mlp: [0.1, 0.9], *: 0.5}", "hardware.dtype=float16",
        "experts.code.parameters.epsilon=0.05", "method.parameters.lambda=[1,2]",
        "model.tokenizer=union", "model.chat_template=chatml",
    )  # fmt: skip
    math, _, code, _ = made["models"]
    assert math["parameters"]["weight"] == [{"value": [0.1, 0.9], "filter": "mlp"}, {"value": 0.5}]
    assert code["parameters"]["epsilon"] == 0.05
    assert made["parameters"]["lambda"] == [1, 2]
    assert (made["out_dtype"], made["tokenizer_source"], made["chat_template"]) == (
        "float16",
        "union",
        "chatml",
    )


def test_every_wrong_setting_is_told_at_once() -> None:
    with pytest.raises(InputErrors) as e:
        built(
            "experts.math.weight=[]",
            "experts.code.density={}",
            "method.base=top",
            "method.parameters.lambda=[]",
        )
    assert [m.partition(":")[0] for m in e.value.messages] == [
        "method.base", "experts.math.weight", "experts.code.density", "method.parameters.lambda",
    ]  # fmt: skip


def names(group: str) -> list[str]:
    return sorted(p.stem for p in (Path(CONF) / group).glob("[!_]*.yaml"))


def a_set_for(method: str) -> str:
    d = KNOWN[method]
    most = d.inputs.max_inputs or d.inputs.max_non_base
    return {None: "multi", 1: "single_math", 2: "math_physics"}[most]


@pytest.mark.parametrize("method", [m for m in names("method") if m in KNOWN])
def test_the_recipe_of_every_method_is_mergekits_own_yaml(method: str) -> None:
    from mergekit.config import MergeConfiguration

    made = built(f"method={method}", f"experts={a_set_for(method)}")
    text = recipe.dump(made)
    assert yaml.safe_load(text) == made
    assert MergeConfiguration.model_validate(yaml.safe_load(text)).merge_method == method
    assert text == recipe.dump(built(f"method={method}", f"experts={a_set_for(method)}"))


@pytest.mark.parametrize("experts", names("experts"))
def test_every_set_of_experts_gives_each_its_weight_and_density(experts: str) -> None:
    run = composed(f"experts={experts}")
    made = built(f"experts={experts}")
    assert [m["model"] for m in made["models"]] == [f"/models/{name}" for name in run.experts]
    for item, expert in zip(made["models"], run.experts.values(), strict=True):
        assert item["parameters"] == {"weight": expert.weight, "density": expert.density}


def test_the_models_of_a_recipe_in_order_the_base_first() -> None:
    assert recipe.models(built()) == [f"/models/{n}" for n in ("base", "math", "physics", "code", "japanese")]
    sliced = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": m, "layer_range": [0, 2]}]} for m in ("b", "a", "b")],
        "tokenizer": {"source": "a"},
    }
    assert recipe.models(sliced) == ["b", "a"]
    nested = {"modules": {"default": {"slices": sliced["slices"]}}, "base_model": "c"}
    assert recipe.models(nested) == ["c", "b", "a"]
