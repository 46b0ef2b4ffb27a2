"""What preflight finds in sound inputs, what it lets pass, and what it says of the cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from broken_models import Models
from composing import composed
from conftest import Command, Outcome

from mergelab.core.conf_dir import CONF
from mergelab.core.findings import MAY_PASS, apply_allow, error, note, warning
from mergelab.models import checkpoint


def names(group: str) -> list[str]:
    return sorted(p.stem for p in (CONF / group).glob("[!_]*.yaml"))


SETS = {e: set(composed(f"experts={e}").experts) for e in names("experts")}
ROLES = {m: set(composed(f"model={m}").model.roles) for m in names("model")}


def plan(run: Command, *arguments: str) -> tuple[Outcome, dict[str, Any]]:
    """A plan that must succeed, and its plan.json."""
    out = run("job=plan", *arguments)
    assert out.status == 0, out.err
    assert out.err == ""
    assert not (out.folder / "model").exists()
    return out, json.loads((out.folder / "plan.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- what is shipped


@pytest.mark.parametrize("experts", names("experts"))
def test_every_shipped_set_on_the_tiny_family(mergelab: Command, family: Any, experts: str) -> None:
    out, content = plan(mergelab, f"experts={experts}", "method=karcher")
    assert content["findings"] == []
    assert [m["name"] for m in content["models"]] == ["base", *composed(f"experts={experts}").experts]
    assert yaml.safe_load((out.folder / "recipe.yaml").read_text(encoding="utf-8")) == content["recipe"]


@pytest.mark.parametrize("model", [m for m in names("model") if m != "tiny"])
def test_every_shipped_family_can_be_planned_offline(mergelab: Command, model: str) -> None:
    supported = [e for e in SETS if SETS[e] <= ROLES[model]]
    widest = max(supported, key=lambda e: len(SETS[e]))
    out, content = plan(mergelab, f"model={model}", f"experts={widest}")
    assert {(f["severity"], f["code"]) for f in content["findings"]} <= {
        ("warning", "unreachable"), ("note", "unchecked"), ("warning", "memory"), ("warning", "disk"),
    }  # fmt: skip
    assert all(m["folder"] is None for m in content["models"])
    assert not content["estimate"]["exact"]
    assert "hf download" in out.out and "could not be checked" in out.out


@pytest.mark.parametrize("model", names("model"))
def test_a_set_that_a_family_does_not_support_names_the_roles(mergelab: Command, model: str) -> None:
    missing = sorted(SETS["multi"] - ROLES[model])
    out = mergelab("job=plan", f"model={model}", "experts=multi")
    assert out.status == (2 if missing else 0)
    for role in missing:
        assert f"experts.{role}: model={model} has no role '{role}'" in out.err


# ---------------------------------------------------------------- the estimate


def weights(folder: Path) -> int:
    """Bytes of tensors in a model folder, read from the files themselves."""
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as f:
            total += sum(f.get_tensor(n).nbytes for n in f.keys())  # noqa: SIM118
    return total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_of_the_tiny_family_are_exact(mergelab: Command, family: Any, dtype: str) -> None:
    out = mergelab("eval=none", f"hardware.dtype={dtype}")
    assert out.status == 0, out.err
    estimate = json.loads((out.folder / "plan.json").read_text(encoding="utf-8"))["estimate"]
    inputs = [family.checkpoint(r) for r in ("base", "math", "physics", "code", "japanese")]
    assert estimate["exact"]
    assert estimate["read"] == sum(weights(f) for f in inputs)
    assert estimate["write"] == weights(out.folder / "model")
    written = sum(f.stat().st_size for f in (out.folder / "model").iterdir())
    assert estimate["disk"] == pytest.approx(written, rel=0.03)


def test_only_what_is_merged_is_read(mergelab: Command, family: Any) -> None:
    _, content = plan(mergelab, "method=slerp", "experts=stem")
    assert content["estimate"]["read"] == sum(weights(family.checkpoint(r)) for r in ("math", "physics"))
    assert content["config_source"] == "math"


def test_bytes_of_a_model_that_is_not_here(mergelab: Command) -> None:
    arguments = ["model=qwen32b", "method=dare_ties", "eval=none"]
    _, content = plan(mergelab, *arguments, "hardware.engine=mergekit")
    estimate = content["estimate"]
    assert estimate["read"] == pytest.approx(5 * 65.5e9, rel=0.01)
    assert estimate["write"] == pytest.approx(65.5e9, rel=0.01)
    largest = 152064 * 5120 * 4  # the embedding in float32, of which every model holds some copies
    assert 5 * largest < estimate["ram"] < 30 * largest
    _, streamed = plan(mergelab, *arguments, "hardware.memory=2GB")
    assert 2e9 < streamed["estimate"]["ram"] < 4e9
    assert (content["engine"]["name"], streamed["engine"]["name"]) == ("mergekit", "fast")
    _, float32 = plan(mergelab, "model=qwen32b", "hardware.dtype=float32", "eval=none")
    assert float32["estimate"]["write"] == 2 * estimate["write"]
    assert float32["estimate"]["read"] == estimate["read"]


def test_layers_that_are_repeated_are_counted(mergelab: Command, models: Models) -> None:
    _, content = plan(mergelab, *models.slices(([0, 3], [0, 3]), ([1, 3], [1, 3])))
    shapes = {n: t.nbytes for n, t in checkpoint.read(models["base"], "").tensors.items()}
    layer = sum(size for n, size in shapes.items() if ".layers.0." in n)
    assert content["estimate"]["write"] == sum(shapes.values()) + 2 * layer


# ---------------------------------------------------------------- findings


def test_findings_are_settled() -> None:
    twice = [
        error("rope", "a", "m", "r"),
        note("x", "a", "m"),
        error("rope", "b", "m", "r"),
        note("x", "a", "m"),
    ]
    assert apply_allow(twice, []) == [error("rope", "a, b", "m", "r"), note("x", "a", "m")]
    assert apply_allow(twice, ["rope"])[0] == warning("rope", "a, b", "m", "r")
    assert apply_allow([error("missing", "a", "m")], ["missing"]) == [error("missing", "a", "m")]
    assert error("rope", "a", "m").text() == "a: m [rope]"
    assert error("missing", "a", "m", "r").text() == "a: m\nr"


def softcaps(m: Models) -> None:
    for seed, name in enumerate(("base", "math", "physics")):
        m.again(name, "gemma2", seed=seed)
    m.config("math", attn_logit_softcapping=30.0)


def strangers(m: Models) -> None:
    """Mistral's tensors have Llama's names and shapes."""
    for seed, (name, kind) in enumerate((("base", "llama"), ("math", "mistral"), ("physics", "llama"))):
        m.again(name, kind, seed=seed)


PASSABLE: dict[str, Callable[[Models], Any] | str] = {
    "activation": lambda m: m.config("math", hidden_act="gelu"),
    "config": lambda m: m.config(
        "math", use_sliding_window=True, sliding_window=2, layer_types=["sliding_attention"] * 3
    ),
    "architecture": strangers,
    "extra-tensor": lambda m: m.add_tensor("math", "model.extra", like="model.norm.weight"),
    "filter": "experts.math.weight={nowhere:1,*:0.5}",
    "heads": lambda m: m.config("math", num_attention_heads=2, num_key_value_heads=1, head_dim=16),
    "no-effect": "experts.math.revision=main",
    "norm": lambda m: m.config("math", rms_norm_eps=1e-5),
    "range": "experts.math.density=1.5",
    "rope": lambda m: m.config("math", rope_parameters={"rope_theta": 777.0}),
    "softcap": softcaps,
    "tokenizer": lambda m: m.swap_two_ids("math"),
    "vocabulary": lambda m: m.again("math", vocab_size=320),
}


def test_every_code_that_may_pass_is_tried() -> None:
    # here, in test_layer_settings, in test_trust, in test_mixtures, in test_file_forms
    elsewhere = {"disk", "layer-settings", "pickled", "same-experts", "unknown-key"}
    assert {*PASSABLE} | elsewhere == {*MAY_PASS}


@pytest.mark.parametrize("code", sorted(PASSABLE))
def test_an_error_may_be_let_pass_by_its_code_and_the_merge_is_sound(
    mergelab: Command, models: Models, code: str
) -> None:
    change = PASSABLE[code]
    more = [change] if isinstance(change, str) else []
    if not isinstance(change, str):
        change(models)
    refused = mergelab(*models.arguments(*more))
    assert refused.status == 2
    assert f"[{code}]" in refused.err
    out = mergelab(*models.arguments(*more, f"allow=[{code}]"))
    assert out.status == 0, out.err
    assert out.out.count("! ") == 1
    found = json.loads((out.folder / "plan.json").read_text(encoding="utf-8"))["findings"]
    assert [(f["severity"], f["code"]) for f in found if f["severity"] != "note"] == [("warning", code)]
    assert out.result["check"]["problems"] == []


def test_a_family_may_let_pass_what_is_known_of_it(mergelab: Command, models: Models) -> None:
    models.config("math", rms_norm_eps=1e-5)
    out = mergelab(*models.arguments("model.allow=[norm]", "job=plan"))
    assert out.status == 0, out.err
    assert "! experts.math: rms_norm_eps is 1e-05" in out.out


def test_what_this_machine_lacks_does_not_keep_it_from_planning(mergelab: Command) -> None:
    huge = "model.architecture.vocab_size=10000000000"
    _, content = plan(mergelab, "model=qwen32b", huge, "hardware.device=cuda:99", "hardware.memory=100TB")
    found = {f["code"]: f["severity"] for f in content["findings"]}
    assert {found[code] for code in ("disk", "device", "memory", "unreachable")} == {"warning"}
    refused = mergelab("model=qwen32b", "hardware.device=cuda:99")
    assert refused.status == 2
    assert "hardware.device: 'cuda:99', but" in refused.err


def test_experts_that_are_here_are_compared_with_what_is_known_of_the_family(
    mergelab: Command, models: Models
) -> None:
    local = [a for a in models.arguments() if not a.startswith("model.base")]
    out = mergelab("model=qwen0_5b", *local, "job=plan")
    assert out.status == 2
    assert "experts.math: hidden_size is 32, the family's is 896" in out.err
    assert "tie_word_embeddings" not in out.err


# ---------------------------------------------------------------- what differs, and does not matter


def findings(run: Command, m: Models, *more: str) -> list[tuple[str, str, str]]:
    """Severity, place and code of what a plan finds."""
    _, content = plan(run, *m.arguments(*more))
    return [(f["severity"], f["place"], f["code"]) for f in content["findings"]]


def edit(m: Models, name: str, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((m[name] / file).read_text(encoding="utf-8"))
    change(content)
    m.text(name, file, json.dumps(content))


OLD_WORDS = {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None}
NOTHING_SAID = {"rope_parameters": None, "num_key_value_heads": None, "head_dim": None}


def test_config_json_may_say_the_same_in_other_words(
    mergelab: Command, models: Models, make_model: Callable[..., Path]
) -> None:
    for seed, name in enumerate(("base", "math", "physics")):
        models.again(name, "llama", seed=seed, num_key_value_heads=4)
    models.config("math", **OLD_WORDS)
    models.config("physics", **NOTHING_SAID)
    assert findings(mergelab, models) == []


def test_merges_of_a_tokenizer_may_be_written_as_older_software_does(
    mergelab: Command, models: Models
) -> None:
    def join(content: dict[str, Any]) -> None:
        content["model"] |= {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}

    for name in ("base", "math", "physics"):
        edit(models, name, "tokenizer.json", join)
    edit(models, "math", "tokenizer.json", lambda c: c["model"].update(merges=["a b"]))
    assert findings(mergelab, models) == []
    edit(models, "math", "tokenizer.json", lambda c: c["model"].update(merges=["b a"]))
    assert findings(mergelab, models) == [("warning", "experts.math", "tokenizer-rules")]


def test_a_token_more_is_a_warning(mergelab: Command, models: Models) -> None:
    edit(
        models, "math", "tokenizer.json", lambda c: c["added_tokens"].append({"content": "<new>", "id": 304})
    )
    assert findings(mergelab, models) == [
        ("warning", "experts.math", "added-tokens"), ("warning", "experts.math", "token-rows"),
    ]  # fmt: skip


def test_tokenizers_of_other_kinds(mergelab: Command, models: Models) -> None:
    models.remove("math", "tokenizer.json")
    models.text("math", "tokenizer.model", "x")
    content = json.loads((models["base"] / "tokenizer.json").read_text(encoding="utf-8"))
    models.remove("physics", "tokenizer.json")
    models.text("physics", "vocab.json", json.dumps(content["model"]["vocab"]))
    found = findings(mergelab, models)
    assert ("warning", "experts.math", "no-tokenizer") in found
    assert not [f for f in found if f[0] == "error"]


def test_an_expert_without_a_tokenizer_that_is_not_measured(mergelab: Command, models: Models) -> None:
    models.remove("math", "*token*")
    assert findings(mergelab, models) == [("warning", "experts.math", "no-tokenizer")]
    assert findings(mergelab, models, "model.tokenizer=union") == [
        ("warning", "experts.math", "no-tokenizer")
    ]


def test_without_any_tokenizer_models_can_be_merged_if_nothing_needs_one(
    mergelab: Command, models: Models
) -> None:
    for name in ("base", "math", "physics"):
        models.remove(name, "*token*")
    places = "model.base, experts.math, experts.physics"
    found = findings(mergelab, models)
    assert {(severity, code) for severity, _, code in found} == {("warning", "no-tokenizer")}
    assert ", ".join(place for _, place, _ in found) == places


def test_vocabularies_may_differ_where_mergekit_fits_them(mergelab: Command, models: Models) -> None:
    models.again("math", vocab_size=320)
    assert findings(mergelab, models, "model.tokenizer=union") == []


def test_other_dtypes_are_a_note_once_for_all(mergelab: Command, models: Models) -> None:
    for seed, name in enumerate(("math", "physics"), start=1):
        models.again(name, seed=seed, dtype="bfloat16")
    assert findings(mergelab, models) == [("note", "experts.math, experts.physics", "mixed-dtype")]


def test_a_file_that_no_reader_takes_is_no_second_set_of_weights(mergelab: Command, models: Models) -> None:
    models.text("math", "pytorch_model.bin", "x")
    models.text("math", "consolidated.safetensors", "x")
    assert findings(mergelab, models) == []


def test_float16_is_warned_of_where_it_overflows(mergelab: Command, models: Models) -> None:
    float16 = "hardware.compute_dtype=float16"
    assert findings(mergelab, models, "method=dare_ties", float16) == [
        ("warning", "hardware.compute_dtype", "float16")
    ]
    assert findings(mergelab, models, "method=linear", float16) == []


def test_other_depths_meet_in_slices(mergelab: Command, models: Models) -> None:
    models.again("math", num_hidden_layers=2)
    _, content = plan(mergelab, *models.slices(([0, 2], [0, 2])))
    assert [f for f in content["findings"] if f["severity"] != "note"] == []


def test_a_file_without_a_base_says_who_lends_config_and_tokenizer(mergelab: Command, models: Models) -> None:
    pair = {"merge_method": "linear", "models": [models.model("math"), models.model("physics")]}
    out, content = plan(mergelab, *models.recipe(pair, without="base_model"))
    assert content["config_source"] == "math"
    assert "base_model: not set; config and tokenizer come from the first model" in out.out


def test_no_weight_is_read(mergelab: Command, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors
    import safetensors.torch

    class HeadersOnly:
        def __init__(self, opened: Any):
            self.opened = opened

        def __enter__(self) -> HeadersOnly:
            self.file = self.opened.__enter__()
            return self

        def __exit__(self, *error: Any) -> Any:
            return self.opened.__exit__(*error)

        def keys(self) -> Any:
            return self.file.keys()

        def get_slice(self, name: str) -> Any:
            found = self.file.get_slice(name)
            return type("Header", (), {"get_dtype": found.get_dtype, "get_shape": found.get_shape})

    original = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda *a, **k: HeadersOnly(original(*a, **k)))
    assert findings(mergelab, models) == []
