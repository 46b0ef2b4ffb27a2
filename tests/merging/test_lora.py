"""Adapters: extracted from a model's difference to its base, and given as experts."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, Outcome
from hub_cache import commit
from safetensors.torch import load_file, save_file
from weights import change, weights

IDS = torch.arange(2, 40)[None]
FULL = 64
"""No module of the models here has a smaller side that is larger."""


def extracted(outcome: Outcome) -> Path:
    """The adapter's folder, of a run that went well."""
    assert outcome.status == 0, outcome.err
    assert outcome.err == ""
    folder = Path(outcome.result["adapter"])
    assert {f.name for f in folder.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    assert [p for p in folder.parent.iterdir() if "partial" in p.name] == []
    return folder


def config_of(adapter: Path) -> dict[str, Any]:
    return dict(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")))


def modules_in(adapter: Path) -> set[str]:
    """The modules of which the adapter has factors."""
    names = load_file(adapter / "adapter_model.safetensors")
    return {n.removeprefix("base_model.model.").partition(".lora_")[0] for n in names if ".lora_" in n}


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def adapted(base: Path, adapter: Path) -> Any:
    """The base with the adapter, as anybody would load it; peft has nothing to complain of."""
    import warnings

    from peft import PeftModel

    model = load(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(model, adapter)


@torch.no_grad()
def assert_same_answers(one: Any, other: Any, tolerance: float = 1e-4) -> None:
    ours, theirs = one(IDS).logits, other(IDS).logits
    assert (ours - theirs).abs().max() <= tolerance


def left_of(base: Path, expert: Path, other: Path) -> float:
    """‖expert - other‖ / ‖expert - base‖ over all tensors."""
    b, e, o = weights(base), weights(expert), weights(other)
    squares = [float(((x[n].double() - e[n].double()) ** 2).sum()) for x in (o, b) for n in e]
    return math.sqrt(sum(squares[: len(e)]) / sum(squares[len(e) :]))


@pytest.fixture(scope="module")
def pairs(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A random base and an expert that differs from it everywhere."""
    folder, made = tmp_path_factory.mktemp("pairs"), {}

    def pair(architecture: str = "qwen2", tied: bool = True, dtype: str = "float32") -> tuple[Path, Path]:
        key = f"{architecture}-{tied}-{dtype}"
        if key not in made:
            made[key] = tuple(
                make_model(folder / key / name, architecture, seed=seed, tied=tied, dtype=dtype)
                for seed, name in enumerate(("base", "expert"))
            )
        return made[key]

    return pair


def of(base: Path, expert: Path, *more: str) -> list[str]:
    """Arguments that extract the difference of two folders."""
    return ["job=extract", f"model.base.path={base}", f"extract.path={expert}", *more]


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize(
    ("architecture", "tied"),
    [("qwen2", True), ("qwen2", False), ("llama", True), ("llama", False), ("gemma2", True)],
)
def test_at_full_rank_the_base_becomes_the_expert(
    architecture: str, tied: bool, pairs: Callable[..., Any], mergelab: Command
) -> None:
    base, expert = pairs(architecture, tied)
    outcome = mergelab(*of(base, expert, f"extract.rank={FULL}"))
    adapter = extracted(outcome)
    found = outcome.result["extraction"]
    assert found["error"] < 1e-5 and found["left_out"] == 0
    e = weights(expert)
    assert found["tensors"].keys() == {*e}  # biases, norms and embeddings are among them
    model = adapted(base, adapter)
    assert_same_answers(model, load(expert))
    united = model.merge_and_unload()
    assert_same_answers(united, load(expert))
    assert (united.get_input_embeddings().weight is united.get_output_embeddings().weight) == tied
    state = united.state_dict()
    assert max(float((state[n] - e[n]).abs().max()) for n in e) < 1e-5


def test_factors_of_the_embeddings(pairs: Callable[..., Any], mergelab: Command) -> None:
    base, expert = pairs("llama", False)
    adapter = extracted(mergelab(*of(base, expert, f"extract.rank={FULL}", "extract.embeddings=true")))
    assert {"model.embed_tokens", "lm_head"} <= modules_in(adapter)
    model = adapted(base, adapter)
    assert_same_answers(model, load(expert))
    assert_same_answers(model.merge_and_unload(), load(expert))


def test_the_recorded_error_is_that_of_the_largest_singular_values(family: Any, mergelab: Command) -> None:
    outcome = mergelab("job=extract", "extract.model=math", "extract.rank=4")
    adapter, found = extracted(outcome), outcome.result["extraction"]
    b, e = weights(family.checkpoint("base")), weights(family.checkpoint("math"))
    changed = {n for n in e if not torch.equal(b[n], e[n])}
    lost = total = 0.0
    for name in changed:
        squares = torch.linalg.svdvals(e[name].double() - b[name].double()) ** 2
        lost, total = lost + float(squares[4:].sum()), total + float(squares.sum())
        own = math.sqrt(squares[4:].sum() / squares.sum())
        assert found["tensors"][name]["error"] == pytest.approx(own, rel=1e-4)
        assert found["tensors"][name]["rank"] == 4
    assert found["error"] == pytest.approx(math.sqrt(lost / total), rel=1e-4)
    assert found["kept"] == pytest.approx(1 - lost / total, rel=1e-4)
    last = next(line for line in outcome.out.splitlines() if line.startswith("whole model"))
    assert last.split()[2:] == [str(len(changed)), "4", f"{1 - lost / total:.1%}", f"{found['error']:.3f}"]
    text = (adapter / "README.md").read_text(encoding="utf-8")
    for part in ("zoo:base", "zoo:math", "rank 4", f"{found['error']:.3f}", outcome.result["command"]):
        assert part in text
    # What has not changed is in no list: the experts of the tiny family differ in their MLPs only.
    assert modules_in(adapter) == {n.removesuffix(".weight") for n in changed}
    config = config_of(adapter)
    assert config["target_modules"] == sorted({n.split(".")[-2] for n in changed})
    assert config["modules_to_save"] is None and config["bias"] == "none"
    assert config["base_model_name_or_path"] == str(family.checkpoint("base"))
    assert [oct(f.stat().st_mode & 0o777) for f in adapter.iterdir()] == [oct(0o644)] * 3


def test_two_runs_write_the_same_bytes(pairs: Callable[..., Any], mergelab: Command) -> None:
    arguments = of(*pairs("qwen2", False), "extract.rank=5", "extract.epsilon=0.4")
    one, other = extracted(mergelab(*arguments)), extracted(mergelab(*arguments))
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_the_factors_are_mergekits(pairs: Callable[..., Any], mergelab: Command, tmp_path: Path) -> None:
    from mergekit.io.tasks import LoaderCache
    from mergekit.scripts.extract_lora import main

    base, expert = pairs("llama", False)
    adapter = extracted(mergelab(*of(base, expert, "extract.rank=6")))
    LoaderCache().loaders.clear()
    out = tmp_path / "theirs"
    options = ["--model", expert, "--base-model", base, "--out-path", out, "--max-rank", 6, "--quiet"]
    main(args=[str(o) for o in options], standalone_mode=False)
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (adapter, out))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_only_the_modules_that_differ_are_adapted(
    pairs: Callable[..., Any], mergelab: Command, tmp_path: Path
) -> None:
    base, _ = pairs()
    expert = tmp_path / "expert"
    shutil.copytree(base, expert)
    part = [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
    ]
    part += ["model.layers.2.self_attn.q_proj.bias"]  # of a module whose weight has not changed

    def shift(tensors: dict[str, Any]) -> None:
        for name in part:
            tensors[name] += torch.randn(tensors[name].shape, generator=torch.manual_seed(3))

    change(expert, shift)
    outcome = mergelab(*of(base, expert, f"extract.rank={FULL}"))
    adapter = extracted(outcome)
    config = config_of(adapter)
    assert config["target_modules"] == [part[0].removesuffix(".weight")]
    assert modules_in(adapter) == {part[0].removesuffix(".weight")}
    assert config["modules_to_save"] == sorted(n.removesuffix(".weight") for n in part[1:3])
    assert {*outcome.result["extraction"]["tensors"]} == {*part}
    model = adapted(base, adapter)
    names = {n for n, _ in model.named_modules() if n.endswith("lora_A.default")}
    assert names == {"base_model.model.model.layers.1.mlp.down_proj.lora_A.default"}
    assert_same_answers(model, load(expert))
    assert_same_answers(model.merge_and_unload(), load(expert))


def test_epsilon_gives_each_module_a_rank_of_its_own(family: Any, mergelab: Command) -> None:
    b, e = weights(family.checkpoint("base")), weights(family.checkpoint("math"))
    values = {n: torch.linalg.svdvals(e[n] - b[n]) for n in e if not torch.equal(b[n], e[n])}
    epsilon = sorted(float(v[0]) for v in values.values())[1] * 1.001  # above all of two modules' values
    ranks = {n: int((v > epsilon).sum()) for n, v in values.items()}
    assert list(ranks.values()).count(0) == 2 and len({*ranks.values()}) > 2
    outcome = mergelab(
        "job=extract", "extract.model=math", f"extract.epsilon={epsilon}", f"extract.rank={FULL}"
    )
    adapter, found = extracted(outcome), outcome.result["extraction"]
    assert {n: t["rank"] or 0 for n, t in found["tensors"].items()} == ranks
    assert found["left_out"] == 2
    assert modules_in(adapter) == {n.removesuffix(".weight") for n, r in ranks.items() if r}
    model = adapted(family.checkpoint("base"), adapter)
    found_ranks = {n: m.r["default"] for n, m in model.get_base_model().named_modules() if hasattr(m, "r")}
    assert {f"{n}.weight": r for n, r in found_ranks.items()} == {n: r for n, r in ranks.items() if r}
    lost = sum(float((v[ranks[n] :].double() ** 2).sum()) for n, v in values.items())
    total = sum(float((v.double() ** 2).sum()) for v in values.values())
    assert found["error"] == pytest.approx(math.sqrt(lost / total), rel=1e-4)


def test_what_is_not_asked_for_counts_as_error(pairs: Callable[..., Any], mergelab: Command) -> None:
    base, expert = pairs("qwen2", False)
    chosen = ["extract.include=[mlp]", "extract.exclude=[down]", f"extract.rank={FULL}"]
    outcome = mergelab(*of(base, expert, *chosen))
    adapter, found = extracted(outcome), outcome.result["extraction"]
    b, e = weights(base), weights(expert)
    held = {n for n in e if "gate_proj" in n or "up_proj" in n}
    assert modules_in(adapter) == {n.removesuffix(".weight") for n in held}
    assert len(load_file(adapter / "adapter_model.safetensors")) == 2 * len(held)
    squares = {n: float(((e[n] - b[n]).double() ** 2).sum()) for n in e}
    error = math.sqrt(sum(s for n, s in squares.items() if n not in held) / sum(squares.values()))
    assert found["error"] == pytest.approx(error, rel=1e-4)
    assert found["kinds"]["q_proj"]["error"] == found["kinds"]["q_proj bias"]["error"] == 1
    assert found["kinds"]["gate_proj"]["error"] < 1e-5
    assert found["left_out"] == len(e) - len(held)
    adapted(base, adapter)


def test_bfloat16_is_measured_as_it_was_written(pairs: Callable[..., Any], mergelab: Command) -> None:
    base, expert = pairs("qwen2", True, "bfloat16")
    outcome = mergelab(*of(base, expert, f"extract.rank={FULL}"))
    tensors = load_file(extracted(outcome) / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    name = "model.layers.0.mlp.up_proj"
    a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    difference = weights(expert)[f"{name}.weight"].double() - weights(base)[f"{name}.weight"].double()
    error = float(torch.linalg.norm(difference - b @ a) / torch.linalg.norm(difference))
    assert 0.0005 < error < 0.01  # bfloat16 has 8 bits
    found = outcome.result["extraction"]["tensors"][f"{name}.weight"]["error"]
    assert found == pytest.approx(error, rel=1e-3)


def test_a_base_of_the_hub_is_named_by_its_id(
    mergelab: Command, cache: Path
) -> None:  # fmt: skip
    arguments = [
        "job=extract",
        "model.base.path=org/base",
        "experts=single_math",
        "experts.math.path=org/math",
    ]
    adapter = extracted(mergelab(*arguments, "extract.model=math", "extract.rank=2"))
    config = config_of(adapter)
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", commit("base"))
    text = (adapter / "README.md").read_text(encoding="utf-8")
    assert "base_model: org/base\n" in text and f"org/math@{commit('math')[:12]}" in text


def test_a_merged_model_by_its_run_and_output(family: Any, mergelab: Command, tmp_path: Path) -> None:
    merged = mergelab("method=ties", "eval=none")
    assert merged.status == 0, merged.err
    out = tmp_path / "mine" / "lora"
    outcome = mergelab(
        "job=extract", f"extract.path={merged.folder}", f"extract.rank={FULL}", f"output={out}"
    )
    assert extracted(outcome) == out
    assert not (outcome.folder / "adapter").exists()
    assert_same_answers(adapted(family.checkpoint("base"), out), load(merged.folder / "model"))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["extract.model: is not set", "extract.path=DIR"]),
        (["extract.model=math", "experts.math.path=zoo:base"], ["extract.model: it is the base itself"]),
        (
            ["extract.model=mth", "extract.rank=0", "extract.epsilon=-1", "extract.include=['[a']",
             "model.base.path=zoo:bas"],
            ["extract.model: 'mth' is not an expert. Did you mean 'math'?", "physics", "model.base: ",
             "'bas'",
             "extract.rank: 0 is out of range; at least 1", "extract.epsilon: -1 is out of range",
             "extract.include: '[a' is not a regular expression"],
        ),
        (
            ["extract.model=math", "extract.include=[q_prooj]", "extract.embeddings=true",
             "hardware.threads=0"],
            ["extract.include: 'q_prooj' matches none of", "extract.embeddings: the base's head is",
             "hardware.threads: 0"],
        ),
        (
            ["extract.model=math", "extract.path=nowhere", "extract.exclude=[proj]"],
            ["extract.path: extract.model=math names a model, too"],
        ),
        (["extract.path=nowhere"], ["extract.path: ", "nowhere is not a folder"]),
        (["extract.model=math", "extract.exclude=[proj]"], ["extract.exclude: it leaves no weight matrix"]),
    ],
    ids=["neither", "base", "values", "models", "both", "nowhere", "nothing-left"],
)  # fmt: skip
def test_wrong_settings_are_all_told_and_nothing_is_written(
    arguments: list[str], words: list[str], mergelab: Command
) -> None:
    outcome = mergelab("job=extract", *arguments)
    assert outcome.status == 2
    assert all(w in outcome.err for w in words), outcome.err
    assert not (outcome.folder / "adapter").exists()


def test_a_model_that_does_not_fit_the_base(
    make_model: Callable[..., Path], pairs: Callable[..., Any], mergelab: Command, tmp_path: Path
) -> None:
    base, _ = pairs()
    for settings, word in (
        ({"intermediate_size": 40}, "intermediate_size is 40"),
        ({"vocab_size": 320}, "the vocabularies differ"),
        ({"architecture": "llama"}, "its architecture is LlamaForCausalLM"),
    ):
        other = make_model(tmp_path / word, **settings)
        outcome = mergelab(*of(base, other))
        assert outcome.status == 2
        assert "extract.path: " in outcome.err and word in outcome.err, outcome.err
        assert "model.tokenizer" not in outcome.err  # which would help a merge


def test_an_adapter_is_no_model_to_extract_from(family: Any, mergelab: Command) -> None:
    adapter = extracted(mergelab("job=extract", "extract.model=math", "extract.rank=1"))
    outcome = mergelab("job=extract", "extract.model=math", f"experts.math.path=zoo:base+{adapter}")
    assert outcome.status == 2 and "has an adapter already" in outcome.err
    outcome = mergelab("job=extract", "extract.model=code", f"model.base.path=zoo:base+{adapter}")
    assert outcome.status == 2 and "model.base: " in outcome.err and "has an adapter already" in outcome.err


def test_pickled_weights_are_not_read(pairs: Callable[..., Any], mergelab: Command, tmp_path: Path) -> None:
    base, expert = pairs()
    pickled = shutil.copytree(expert, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    outcome = mergelab(*of(base, pickled, "allow=[pickled]"))
    assert outcome.status == 2
    assert f"extract.path: the weights of {pickled} are pickled, and only safetensors" in outcome.err


def test_a_folder_that_holds_something_is_left_alone(mergelab: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine", encoding="utf-8")
    outcome = mergelab("job=extract", "extract.model=math", f"output={out}")
    assert outcome.status == 2 and f"output: {out} is not empty" in outcome.err
    assert [f.name for f in out.iterdir()] == ["mine.txt"]


def test_where_there_is_nothing_to_extract(family: Any, mergelab: Command, tmp_path: Path) -> None:
    base = family.checkpoint("base")
    same = tmp_path / "same"
    shutil.copytree(base, same)
    normed = tmp_path / "normed"
    shutil.copytree(base, normed)
    change(normed, lambda t: t["model.norm.weight"].mul_(2))
    for arguments, words in (
        ([f"extract.path={same}"], "the models do not differ"),
        (
            [f"extract.path={normed}"],
            "decomposed or are not selected: model.norm.weight",
        ),
        (["extract.model=math", "extract.epsilon=1000"], "no singular value is above extract.epsilon=1000"),
        (
            ["extract.model=math", "extract.include=[self_attn]"],
            "the tensors that differ cannot be decomposed",
        ),
    ):
        outcome = mergelab("job=extract", *arguments)
        assert outcome.status == 1 and words in outcome.err, outcome.err
        assert [p.name for p in outcome.folder.iterdir() if "adapter" in p.name] == []
        assert outcome.result["status"] == "failed"


def test_an_entry_that_is_not_a_number(family: Any, mergelab: Command, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(family.checkpoint("math"), broken)
    name = "model.layers.1.mlp.up_proj.weight"
    change(broken, lambda t: t[name][0].fill_(math.nan))
    outcome = mergelab("job=extract", f"extract.path={broken}")
    assert outcome.status == 1 and f"{name} has entries that are NaN" in outcome.err


# ---------------------------------------------------------------- adapters as experts


def test_an_adapter_of_full_rank_merges_as_its_expert(family: Any, mergelab: Command) -> None:
    adapter = extracted(mergelab("job=extract", "extract.model=math", f"extract.rank={FULL}"))
    base = family.checkpoint("base")
    asked = ["method=ties", "eval.limit=16", "eval.baselines=false"]
    ours = mergelab(*asked, f"experts.math.path={base}+{adapter}")
    theirs = mergelab(*asked)
    assert (ours.status, theirs.status) == (0, 0), ours.err + theirs.err
    a, b = weights(ours.folder / "model"), weights(theirs.folder / "model")
    assert a.keys() == b.keys()
    assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-5
    assert ours.result["metrics"]["merged"] == theirs.result["metrics"]["merged"]


def test_an_adapter_is_measured_as_its_expert(family: Any, mergelab: Command, tmp_path: Path) -> None:
    adapter = extracted(mergelab("job=extract", "extract.model=math", "extract.rank=64"))
    base = family.checkpoint("base")
    asked = ["job=evaluate", "experts=math_code", "eval.limit=32", "eval.cache=false"]
    out = mergelab(*asked, f"experts.math.path={base}+{adapter}")
    assert out.status == 0, out.err
    found = {n: m["validation"]["math"]["value"] for n, m in out.result["metrics"].items()}
    assert found["math"] > 0.8 > 0.5 > found["base"]
    out = mergelab(*asked, f"experts.math.path={base}+{adapter}", "hardware.quantize=int8")
    assert out.status == 0, out.err
    assert "not math: adapters" in " ".join(out.out.split()) and "math" not in out.result["metrics"]


def test_an_adapter_of_low_rank_brings_its_recorded_error(family: Any, mergelab: Command) -> None:
    outcome = mergelab("job=extract", "extract.model=math", "extract.rank=4")
    adapter, base = extracted(outcome), family.checkpoint("base")
    alone = ["experts=single_math", "method=task_arithmetic", "eval=none"]
    merged = mergelab(*alone, f"experts.math.path=zoo:base+{adapter}", "experts.math.weight=1")
    assert merged.status == 0, merged.err
    error = left_of(base, family.checkpoint("math"), merged.folder / "model")
    assert error == pytest.approx(outcome.result["extraction"]["error"], rel=1e-3)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_embeddings_norms_and_biases_of_an_adapter_are_merged(
    tied: bool, pairs: Callable[..., Any], mergelab: Command
) -> None:
    base, expert = pairs("qwen2", tied)
    adapter = extracted(mergelab(*of(base, expert, f"extract.rank={FULL}")))
    alone = ["experts=single_math", "method=task_arithmetic", "eval=none", f"model.base.path={base}"]
    merged = mergelab(*alone, f"experts.math.path={base}+{adapter}", "experts.math.weight=1")
    assert merged.status == 0, merged.err
    assert left_of(base, expert, merged.folder / "model") < 1e-5


@pytest.fixture(scope="module")
def trained(pairs: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An adapter as peft saves it, of random numbers; beside it the base that has become one with it."""

    def make(base: Path | None = None, **settings: Any) -> Path:
        import peft

        torch.manual_seed(5)
        wanted = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | settings
        model = peft.get_peft_model(load(base or pairs()[0]), peft.LoraConfig(**wanted))
        folder = tmp_path_factory.mktemp("trained")
        model.save_pretrained(folder / "lora")
        model.merge_and_unload().save_pretrained(folder / "united")
        return folder / "lora"

    return make


@pytest.fixture(scope="module")
def sound_adapter(trained: Callable[..., Path]) -> Path:
    return trained()


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"modules_to_save": ["input_layernorm"]},
        {"rank_pattern": {"model.layers.1.mlp.down_proj": 5}, "alpha_pattern": {"q_proj": 3}},
    ],
    ids=lambda s: next(iter(s)),
)
def test_other_kinds_of_adapters_are_merged_as_peft_does(
    settings: dict[str, Any], trained: Callable[..., Path], pairs: Callable[..., Any], mergelab: Command
) -> None:
    base, _ = pairs()
    adapter = trained(**settings)
    alone = ["experts=single_math", "method=task_arithmetic", "eval=none", f"model.base.path={base}"]
    merged = mergelab(*alone, f"experts.math.path={base}+{adapter}", "experts.math.weight=1")
    assert merged.status == 0, merged.err
    assert "!" not in merged.out
    united = adapter.with_name("united")
    assert left_of(base, united, merged.folder / "model") < 1e-5
    assert left_of(base, united, base) == 1  # which has something in it


def lose(name: str) -> Callable[[Path], None]:
    return lambda adapter: (adapter / name).unlink()


def pickle(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def cut(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def untyped(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")


def garbled(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{", encoding="utf-8")


def deepen(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n.replace("layers.2", "layers.7"): t for n, t in tensors.items()}, file)


def findings(base: Path, adapter: Path) -> list[str]:
    """What preflight has to say of the base with an adapter as an expert."""
    from mergelab.models import adapters, checkpoint
    from mergelab.models.resolver import locate

    def zoo(role: str) -> Path:
        raise LookupError(role)

    source, found = locate("math", "experts.math", f"{base}+{adapter}", None, zoo)
    found += adapters.check(source, checkpoint.read(base, "experts.math"))
    assert {f.place for f in found} <= {"experts.math"}
    return [f"{f.severity}: {f.message}" for f in found]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lose("adapter_model.safetensors"), "has no adapter_model.safetensors"),
        (lose("adapter_config.json"), "has no adapter_config.json"),
        (pickle, "holds only pickled weights (adapter_model.bin)"),
        (cut, "is damaged or truncated"),
        (untyped, "names no peft_type"),
        (garbled, "is not JSON"),
        (deepen, "adapts model.layers.7.mlp.down_proj, model.layers.7.self_attn.q_proj, but"),
    ],
    ids=["no-weights", "no-config", "pickled", "cut", "no-type", "no-json", "deeper"],
)
def test_what_is_wrong_with_an_adapter(
    harm: Callable[[Path], None], words: str, sound_adapter: Path, pairs: Callable[..., Any], tmp_path: Path
) -> None:
    base, _ = pairs()
    assert findings(base, sound_adapter) == []
    adapter = shutil.copytree(sound_adapter, tmp_path / "lora")
    harm(adapter)
    (found,) = findings(base, adapter)
    assert found.startswith("error: ") and words in found


def retyped(kind: str) -> Callable[[Path], None]:
    def change_type(adapter: Path) -> None:
        config = config_of(adapter) | {"peft_type": kind}
        (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")

    return change_type


def strange(adapter: Path) -> None:
    config = config_of(adapter) | {"from_the_future": True}
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (retyped("PROMPT_TUNING"), "error: an adapter of prompt tokens has no weights that could be merged"),
        (retyped("PREFIX_TUNING"), "error: an adapter of prompt tokens has no weights that could be merged"),
        (retyped("ADAPTION_PROMPT"), "error: peft cannot merge adapters of the type ADAPTION_PROMPT"),
        (retyped("LILY"), "error: the model has no module for"),
        (retyped("NEXT_YEARS"), f"error: peft {version('peft')} knows no adapters of the type NEXT_YEARS"),
        (retyped("LOHA"), "error: the model has no module for model.layers.0."),
        (strange, "warning: peft says of "),
    ],
)
def test_what_peft_says_of_an_adapter(
    harm: Callable[[Path], None], words: str, sound_adapter: Path, pairs: Callable[..., Any], tmp_path: Path
) -> None:
    base, _ = pairs()
    adapter = shutil.copytree(sound_adapter, tmp_path / "lora")
    harm(adapter)
    found = [f.replace(f"{adapter} cannot be used with {base}: ", "") for f in findings(base, adapter)]
    assert any(words in f for f in found), found
    assert len([f for f in found if f.startswith("error: ")]) == words.startswith("error: "), found


def test_an_adapter_on_an_architecture_without_a_table(
    trained: Callable[..., Path], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    small, large = (make_model(tmp_path / f"{n}", "phi3", intermediate_size=n) for n in (48, 64))
    adapter = trained(small, target_modules=["qkv_proj", "down_proj"], modules_to_save=["norm"])
    assert findings(small, adapter) == []
    (found,) = [f for f in findings(large, adapter) if "was made for" not in f]
    assert (
        "model.layers.0.mlp.down_proj.lora_A.weight is [2, 48], but the model has [2, 64], and 2 more"
        in found
    )
    other = make_model(tmp_path / "other", "smollm3")
    (found,) = [f for f in findings(other, adapter) if "was made for" not in f]
    assert "the model has no module for model.layers.0.self_attn.qkv_proj.lora_A.weight" in found


def test_the_space_that_an_adapter_needs(trained: Callable[..., Path], pairs: Callable[..., Any]) -> None:
    from mergelab.models import adapters, checkpoint

    base, _ = pairs()
    facts = checkpoint.read(base, "model.base")
    q, down, norm = 3 * (32 + 1) * 32, 3 * 32 * 48, 32  # q_proj has a bias
    adapter = trained(modules_to_save=["model.norm"])
    assert adapters.changed_elements(adapter, facts) == q + down + norm
    assert adapters.changed_elements(trained(target_modules=["lm_head"]), facts) == facts.parameters


def test_what_parts_a_head_from_its_embedding_is_told(
    trained: Callable[..., Path], pairs: Callable[..., Any]
) -> None:
    base, _ = pairs()
    (found,) = findings(base, trained(target_modules=["lm_head"]))
    assert (
        found.startswith("note: ") and "changes lm_head, and lm_head is tied to model.embed_tokens" in found
    )
    assert findings(base, trained(modules_to_save=["embed_tokens"], ensure_weight_tying=True)) == []
    assert (
        findings(pairs("qwen2", False)[0], trained(pairs("qwen2", False)[0], target_modules=["lm_head"]))
        == []
    )


def test_an_adapter_for_a_model_of_other_shapes(
    trained: Callable[..., Path], make_model: Callable[..., Path], pairs: Callable[..., Any],
    mergelab: Command, tmp_path: Path,
) -> None:  # fmt: skip
    base, _ = pairs()
    adapter = trained(make_model(tmp_path / "wider", intermediate_size=64), modules_to_save=["norm"])
    alone = ["experts=single_math", "method=linear", "eval=none", f"model.base.path={base}"]
    outcome = mergelab(*alone, f"experts.math.path={base}+{adapter}")
    assert outcome.status == 2
    assert "✗ experts.math: model.layers.0.mlp.down_proj.lora_A.weight expects 64 inputs, but" in outcome.err
    assert "down_proj.weight has 48 inputs, and 2 more differ" in outcome.err
    assert not (outcome.folder / "model").exists()


def test_an_adapter_that_was_made_for_another_model(
    trained: Callable[..., Path], pairs: Callable[..., Any], mergelab: Command
) -> None:
    base, expert = pairs()
    adapter = trained(expert)
    words = f"was made for {expert}, but is used with {base}"
    (found,) = findings(base, adapter)
    assert found.startswith("warning: ") and words in found
    alone = ["experts=single_math", "method=linear", "eval=none", f"model.base.path={base}", "job=plan"]
    outcome = mergelab(*alone, f"experts.math.path={base}+{adapter}")
    assert outcome.status == 0 and words in " ".join(outcome.out.split())
    config = config_of(adapter) | {"base_model_name_or_path": "/a/folder/elsewhere"}
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert findings(base, adapter) == []  # it cannot be told
