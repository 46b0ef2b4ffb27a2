"""What people write into mergekit's files: every form of it is read, and what mergekit ignores is said."""

from __future__ import annotations

from typing import Any

import pytest
from broken_models import Models

import mergelab

LINEAR = """
merge_method: linear
dtype: float32
models:
  - model: {math}
    parameters: {{weight: 1}}
  - model: {physics}
    parameters: {{weight: 1}}
"""
MODELS = "\nmodels: [{{model: {math}}}, {{model: {physics}}}]\n"


def planned(m: Models, text: str, *more: str) -> Any:
    """The plan of a file, with the models' folders filled in."""
    names = {n: m[n] for n in ("base", "math", "physics")}
    return mergelab.plan(mergelab.compose(*m.yaml(text.format(**names)), *more), m.folder / "nothing")


def said(plan: Any, severity: str) -> list[tuple[str, str]]:
    """Code and place within the file of the findings of a severity."""
    return [
        (f.code, ", ".join(p.rpartition("my.yaml: ")[2] for p in f.place.split(", ")))
        for f in plan.findings
        if f.severity == severity
    ]


IGNORED: list[tuple[str, str, list[str], dict[str, Any]]] = [
    ("keys of other programs",
     LINEAR + "name: mine\nnormalize: false\nrandom_seed: 1\n", ["name, normalize, random_seed"], {}),
    ("anchors under keys of their own",
     "X: &x {{parameters: {{weight: 1}}}}\nconst_tag: &m {math}\nparams: &p {{weight: 1}}\n"
     "models: [{{model: *m, <<: *x}}, {{model: {physics}, parameters: *p}}]\nmerge_method: linear\n",
     ["X, const_tag, params"], {}),
    ("of a model", LINEAR.replace("weight: 1}}", "weight: 1, t: 0.5, normalize: true}}", 1).replace(
        "  - model: {physics}", "  - model: {physics}\n    layer_range: [0, 3]\n    revision: main"),
     ["models[1].layer_range, models[1].revision", "models[0].parameters.t",
      "models[0].parameters.normalize"], {}),
    ("parameters that a method lacks",
     "merge_method: arcee_fusion\nbase_model: {math}" + MODELS + "parameters: {{weight: 1, density: 0.5}}",
     ["parameters.weight", "parameters.density"], {"parameters": None}),
    ("of slerp", "merge_method: slerp\nbase_model: {math}" + MODELS
     + "parameters: {{t: 0.5, normalize: 1.0, embed_slerp: true, dtype: bfloat16, random_seed: 3}}",
     [f"parameters.{n}" for n in ("normalize", "embed_slerp", "dtype", "random_seed")],
     {"parameters": {"t": 0.5}}),
    ("of the base model", "merge_method: ties\nbase_model: {base}\nmodels:\n"
     "  - {{model: {base}, parameters: {{weight: 1, density: 1}}}}\n"
     "  - {{model: {math}, parameters: {{weight: 1, density: 0.5}}}}",
     ["models[0].parameters.weight", "models[0].parameters.density"], {}),
    ("declared and not used", "merge_method: task_arithmetic\nbase_model: {base}\n"
     "models: [{{model: {math}, parameters: {{weight: 1, density: 0.3}}}}]", ["models[0].parameters.density"],
     {}),
    ("keys twice", LINEAR + "dtype: float32\n", ["dtype"], {}),
    ("conditions", LINEAR + "parameters: {{weight: [], normalize: [{{filter: '*', value: 1, of: me}}, "
     "{{value: 0}}]}}",
     ["parameters.weight", "parameters.normalize[0].of", "parameters.normalize[1]"],
     {"parameters": {"normalize": [{"value": True}]}}),
    ("a filter for other models", LINEAR + "parameters: {{normalize: [{{filter: layers.99., value: 0}}, "
     "{{value: 1}}]}}", ["parameters.normalize"], {}),
    ("a slice in the middle", "merge_method: passthrough\nslices:\n"
     + "".join(f"  - sources: [{{{{model: {{math}}, layer_range: {r}}}}}]\n"
               for r in ("[0, 2]", "[1, 1]", "['2', 3.0]")) + "    residual_weight: 0.1\n",
     ["slices[2].residual_weight", "slices[1]"], {}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "places", "recipe"), [pytest.param(*c, id=n) for n, *c in IGNORED])
def test_what_mergekit_ignores_is_said_and_left_out(
    text: str, places: list[str], recipe: dict[str, Any], models: Models
) -> None:
    plan = planned(models, text)
    assert plan.errors == []
    assert said(plan, "warning") == [("no-effect", place) for place in places]
    for key, value in recipe.items():
        assert plan.recipe.get(key) == value
    assert not {"name", "X", "random_seed"} & {*plan.recipe}


SAME: list[tuple[str, str]] = [
    ("plain", LINEAR),
    ("mappings", LINEAR.replace("{math}", "{{model: {{path: {math}, revision: null}}}}").replace(
        "{physics}", "{{model: {physics}, lora: null, override_architecture: Qwen2ForCausalLM}}")),
    ("texts and booleans",
     LINEAR.replace("weight: 1", "weight: '1'", 1).replace("weight: 1}}", "weight: true}}")
     + "parameters: {{normalize: 1.0}}"),
    ("a byte order mark", "\ufeff" + LINEAR.replace("\n", "\r\n")),
]  # fmt: skip


@pytest.mark.parametrize("text", [pytest.param(t, id=n) for n, t in SAME])
def test_forms_of_one_merge(text: str, models: Models) -> None:
    plan = planned(models, text)
    assert (plan.errors, plan.warnings) == ([], [])
    weights = [(m["model"], float(m["parameters"]["weight"])) for m in plan.recipe["models"]]
    assert weights == [(str(models["math"]), 1.0), (str(models["physics"]), 1.0)]
    assert plan.recipe.get("parameters") in (None, {"normalize": True})


MISSPELT = [
    ("a key", LINEAR.replace("dtype", "dype"), "dype"),
    ("a key of a model", LINEAR.replace("parameters", "paramters", 1), "models[0].paramters"),
    ("a parameter", LINEAR + "parameters: {{normalise: true}}", "parameters.normalise"),
    ("a filter's key", LINEAR + "parameters: {{normalize: [{{fitler: mlp, value: 1}}]}}",
     "parameters.normalize[0].fitler"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "place"), [pytest.param(*c, id=n) for n, *c in MISSPELT])
def test_what_looks_like_a_misspelling_is_an_error_that_may_pass(
    text: str, place: str, models: Models
) -> None:
    wrong = planned(models, text)
    assert ("unknown-key", place) in said(wrong, "error")
    allowed = planned(models, text, "allow=[unknown-key]")
    assert ("unknown-key", place) in said(allowed, "warning")
    assert [f.code for f in allowed.errors] == (["uncovered"] if "models" in place else [])


def test_documents_of_several_merges_are_told_in_the_order_in_which_they_run(models: Models) -> None:
    last, second = LINEAR.replace("{math}", "second"), LINEAR.replace("{physics}", "first")
    stages = "---\n".join((last, "name: first" + LINEAR, "name: second" + second))
    (error,) = planned(models, stages).errors
    assert error.code == "documents"
    assert "3 documents" in error.message
    commands = [line.split("method.path=")[1] for line in error.remedy.splitlines() if "method.path=" in line]
    assert commands == ["first.yaml output=first", "second.yaml output=second", "final.yaml output=final"]
    assert "name" in planned(models, "name: first" + LINEAR).warnings[0].place  # as such a file has it


MIXTURE = """
base_model: {base}
gate_mode: hidden
experts:
  - {{source_model: {math}, positive_prompts: [""]}}
  - {{source_model: {{model: {{path: {physics}}}}}, positive_prompts: ["a"], negative_prompts: ["b"]}}
shared_experts: [{{source_model: {base}, positive_prompts: ["c"]}}]
"""


def mixture(m: Models, text: str, *more: str) -> Any:
    """The plan of a mergekit-moe file."""
    return planned(m, text, "method=mergekit_moe", *more)


def test_a_mixture_is_read_as_mergekit_moe_reads_it(models: Models) -> None:
    text = MIXTURE.replace("hidden", "cheap_embed") + "merge_method: moe\nname: x\nexperts_per_token: '1'\n"
    plan = mixture(models, text)
    assert said(plan, "warning") == [("no-effect", "merge_method, name")]
    assert plan.errors == []
    assert plan.recipe["experts"][1]["source_model"] == str(models["physics"])
    assert plan.recipe["experts_per_token"] == 1
    typo = mixture(models, text.replace("negative_prompts", "negative_promts"))
    assert said(typo, "error") == [("unknown-key", "experts[1].negative_promts")]


def test_an_empty_prompt_needs_a_token_before_it(models: Models) -> None:
    config = models["base"] / "tokenizer_config.json"
    text = config.read_text(encoding="utf-8")
    assert '"bos_token": null' in text
    assert said(mixture(models, MIXTURE), "error") == [("prompts", "experts[0].positive_prompts")]
    assert mixture(models, MIXTURE.replace("hidden", "cheap_embed")).errors == []
    models.text("base", "tokenizer_config.json", text.replace('"bos_token": null', '"bos_token": "a"'))
    assert mixture(models, MIXTURE).errors == []


@pytest.mark.parametrize(
    ("text", "method", "other"),
    [
        (MIXTURE, "mergekit", "method=mergekit_moe."),
        (LINEAR, "mergekit_moe", "method=mergekit."),
        (MIXTURE + "merge_method: moe\n", "mergekit", "method=mergekit_moe."),
    ],
)
def test_a_file_of_the_other_program_names_the_method_that_runs_it(
    text: str, method: str, other: str, models: Models
) -> None:
    (error,) = planned(models, text, f"method={method}").errors
    assert other in error.remedy


def test_only_models_whose_rows_for_tokens_are_used_need_the_same_vocabulary(models: Models) -> None:
    models.again("math", vocab_size=320)
    slices = "merge_method: passthrough\nslices:\n" + "".join(
        f"  - sources: [{{{{model: {{{n}}}, layer_range: [0, 2]}}}}]\n" for n in ("base", "math", "physics")
    )
    assert planned(models, slices).errors == []
    assert mixture(models, MIXTURE.replace("hidden", "cheap_embed")).errors == []
    swapped = slices.replace("math", "x").replace("physics", "math").replace("{x}", "{physics}")
    (error,) = planned(models, swapped).errors
    assert error.code == "vocabulary"
    assert "tokenizer_source: union (or base)" in error.remedy
    assert planned(models, swapped + "tokenizer_source: base").errors == []


def test_an_empty_tokenizer_is_the_union(models: Models) -> None:
    models.swap_two_ids("math")
    plan = planned(models, LINEAR + "tokenizer: {{}}")
    assert plan.errors == []
    assert plan.recipe["tokenizer"] == {"source": "union"}
    assert plan.engine.name == "mergekit"


def test_weights_that_sum_to_0_are_halves_for_nuslerp(models: Models) -> None:
    text = LINEAR.replace("linear", "nuslerp").replace("weight: 1", "weight: -1", 1)
    plan = planned(models, text)
    assert (said(plan, "warning")[0][0], plan.errors) == ("zero-sum", [])


def test_each_of_model_and_adapter_has_its_own_revision(models: Models) -> None:
    text = LINEAR.replace("{math}", "some-owner/some-model@one+some-owner/some-adapter@two")
    plan = planned(models, text, "job=plan")
    source = next(s for s in plan.sources if "some-owner" in s.path)
    assert [(p.path, p.revision) for p in source.parts] == [
        ("some-owner/some-model", "one"), ("some-owner/some-adapter", "two"),
    ]  # fmt: skip
    assert source.reference == "some-owner/some-model@one+some-owner/some-adapter@two"


def test_an_architecture_that_is_overridden_is_the_other_models_or_an_error(models: Models) -> None:
    models.again("math", "llama", seed=1)
    models.again("physics", "mistral", seed=2)
    text = LINEAR.replace("{physics}", "{{model: {physics}, override_architecture: LlamaForCausalLM}}")
    plan = planned(models, text)
    assert plan.errors == []
    assert [code for code, _ in said(plan, "warning")] == ["architecture"]
    (error,) = planned(models, text.replace("Llama", "Gemma"), "allow=[architecture]").errors
    assert error.code == "architecture-override"
    assert "MistralForCausalLM" in error.message


@pytest.mark.parametrize("source", ["{base}", "./base"])
def test_a_tokenizer_of_a_model_outside_the_merge(
    source: str, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models.folder)
    plan = planned(models, LINEAR + f"tokenizer_source: {source}")
    assert plan.errors == []
    assert plan.recipe["tokenizer_source"] == str(models["base"])


def test_weights_of_task_vectors_that_sum_to_0_are_not_divided_by_it(models: Models) -> None:
    ties = "merge_method: ties\nbase_model: {base}\nmodels:\n"
    ties += "  - {{model: {math}, parameters: {{weight: [0, 1]}}}}\n"
    plan = planned(models, ties)
    assert (plan.errors, plan.warnings) == ([], [])
    plan = planned(
        models, ties.replace("[0, 1]", "1") + "  - {{model: {physics}, parameters: {{weight: -1}}}}\n"
    )
    assert (said(plan, "warning")[0][0], plan.errors) == ("zero-sum", [])
    (error,) = planned(models, LINEAR.replace("weight: 1", "weight: -1", 1)).errors
    assert error.code == "zero-sum"


def test_a_token_is_taken_from_a_model_that_has_it(models: Models) -> None:
    tokens = "base_model: {math}\ntokenizer: {{tokens: {{<y>: {{source: {math}}}}}}}\n"
    (error,) = planned(models, LINEAR + tokens).errors
    assert (error.code, "<y>" in error.message) == ("no-token", True)
    assert planned(models, LINEAR + tokens.replace("{math}}}", "{{kind: zero}}}}")).errors == []
