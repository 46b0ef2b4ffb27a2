"""What a merge leaves on the disk: the right weights, and everything that belongs beside them."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ARCHITECTURES, Command, Outcome
from pairwise import pairwise
from weights import change, generates, mergekit_yaml, same_bits, weights

Weights = dict[str, torch.Tensor]


@pytest.fixture
def models(make_model: Callable[..., Path], tmp_path: Path) -> Callable[..., list[Path]]:
    """`models(3, "llama", tied=False)`: a base and two experts near it."""

    def make(count: int, architecture: str = "qwen2", **settings: Any) -> list[Path]:
        base = make_model(tmp_path / "base", architecture, **settings)
        experts = [tmp_path / f"expert{i}" for i in range(1, count)]
        for i, expert in enumerate(experts, start=1):
            shutil.copytree(base, expert)
            change(expert, lambda tensors, i=i: _shake(tensors, i))
        return [base, *experts]

    return make


def _shake(tensors: Weights, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for t in tensors.values():
        t += (torch.randn(t.shape, generator=random) * 0.02).to(t.dtype)


def chosen(base: Path, *experts: Path) -> list[str]:
    """Overrides that merge these folders, under the roles of an expert set that has as many."""
    sets = {1: ("single_math", "math"), 2: ("math_code", "math", "code")}
    name, *roles = sets[len(experts)]
    paths = [f"experts.{r}.path={e}" for r, e in zip(roles, experts, strict=True)]
    return ["eval=none", f"experts={name}", f"model.base.path={base}", *paths]


def raw(tmp_path: Path, recipe: dict[str, Any]) -> list[str]:
    """Overrides that merge by a mergekit YAML file."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return ["eval=none", "method=mergekit", f"method.path={path}"]


def done(outcome: Outcome) -> Path:
    """The folder of the merged model, of a run that went well and said nothing but its steps."""
    assert outcome.status == 0, outcome.err
    assert outcome.err == ""
    assert all(re.match(r"mergelab|✓|!|  |/|$", line) for line in outcome.out.splitlines()), outcome.out
    return outcome.folder / "model"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def assert_nothing_left(folder: Path) -> None:
    left = {p.name for p in folder.iterdir()} if folder.exists() else set()
    assert not {n for n in left if "model" in n or "partial" in n}, left


def assert_only_set_aside(outcome: Outcome) -> None:
    """An unsound model is kept, whole and under a name that says so, and there is no other."""
    kept = outcome.folder / "model.unsound"
    left = {p.name for p in outcome.folder.iterdir() if "model" in p.name or "partial" in p.name}
    assert left == {kept.name} and (kept / "model.safetensors").exists()
    assert str(kept) in "".join(outcome.err.split())


# ---------------------------------------------------------------- settings reach mergekit


def test_filters_reach_mergekit_and_the_weights(models: Any, mergelab: Command) -> None:
    base, expert = models(2)
    outcome = mergelab(
        "method=task_arithmetic", *chosen(base, expert), "experts.math.weight={mlp: 0.5, *: 0.0}"
    )
    merged, b, e = weights(done(outcome)), weights(base), weights(expert)
    recipe = yaml.safe_load((outcome.folder / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["models"][0]["parameters"]["weight"] == [{"value": 0.5, "filter": "mlp"}, {"value": 0.0}]
    for n in b:
        if "mlp" in n:
            torch.testing.assert_close(merged[n], b[n] + 0.5 * (e[n] - b[n]))
            assert not torch.equal(merged[n], b[n]), n
        else:
            assert torch.equal(merged[n], b[n]), n


def test_gradients_reach_mergekit_and_the_weights(models: Any, mergelab: Command) -> None:
    base, expert = models(2)
    outcome = mergelab("method=task_arithmetic", *chosen(base, expert), "experts.math.weight=[0, 1]")
    merged, b, e = weights(done(outcome)), weights(base), weights(expert)
    for n in b:
        layer = re.search(r"layers\.(\d)\.", n)
        share = int(layer[1]) / 2 if layer else 0.0  # three layers; mergekit takes 0 outside them
        torch.testing.assert_close(merged[n], b[n] + share * (e[n] - b[n]))


@pytest.mark.parametrize(
    ("method", "override", "setting"),
    [
        ("ties", "experts.code.density={mlp: [0.2, 0.8], *: 0.5}",
         [{"value": [0.2, 0.8], "filter": "mlp"}, {"value": 0.5}]),
        ("slerp", "method.parameters.t=[0, 0.3, 1]", [0, 0.3, 1]),
        ("breadcrumbs", "method.parameters.gamma={self_attn: 0.02, *: 0.05}",
         [{"value": 0.02, "filter": "self_attn"}, {"value": 0.05}]),
        ("della", "+experts.code.parameters.epsilon=0.1", 0.1),
    ],
)  # fmt: skip
def test_any_parameter_reaches_mergekit_unchanged(
    method: str, override: str, setting: Any, models: Any, mergelab: Command, tmp_path: Path
) -> None:
    outcome = mergelab(f"method={method}", *chosen(*models(3)), override, "hardware.engine=mergekit")
    model = done(outcome)
    recipe = yaml.safe_load((outcome.folder / "recipe.yaml").read_text(encoding="utf-8"))
    name = override.lstrip("+").partition("=")[0].rpartition(".")[2]
    where = recipe["models"][1] if override.lstrip("+").startswith("experts") else recipe
    assert where["parameters"][name] == setting
    assert same_bits(model, mergekit_yaml(outcome.folder / "recipe.yaml", tmp_path / "theirs"))


def test_seed_decides_what_is_random(models: Any, mergelab: Command) -> None:
    arguments = ["method=dare_linear", *chosen(*models(2)), "experts.math.density=0.5"]
    first, again, other = (done(mergelab(*arguments, f"seed={s}")) for s in (1, 1, 2))
    assert same_bits(first, again)
    assert not same_bits(first, other)


def test_file_replaced_at_the_same_path_is_read_again(models: Any, mergelab: Command) -> None:
    base, expert = models(2)
    arguments = ["method=passthrough", *chosen(base, expert)]
    assert same_bits(done(mergelab(*arguments)), expert)
    before = weights(expert)
    change(expert, lambda tensors: _shake(tensors, 7))
    assert not torch.equal(before["model.norm.weight"], weights(expert)["model.norm.weight"])
    assert same_bits(done(mergelab(*arguments)), expert)


# ---------------------------------------------------------------- architectures, dtypes, config.json


@pytest.mark.parametrize(
    ("architecture", "tied", "dtype"), pairwise(ARCHITECTURES, [True, False], ["float32", "bfloat16"])
)
def test_architectures(architecture: str, tied: bool, dtype: str, models: Any, mergelab: Command) -> None:
    base, one, two = models(3, architecture, tied=tied, dtype=dtype)
    outcome = mergelab("method=task_arithmetic", *chosen(base, one, two))
    merged = weights(done(outcome))
    b, e1, e2 = (weights(f) for f in (base, one, two))
    assert merged.keys() == b.keys()
    assert ("lm_head.weight" in merged) is not tied
    for n in b:
        exact = b[n].float() + 0.5 * (e1[n].float() - b[n].float()) + 0.5 * (e2[n].float() - b[n].float())
        assert merged[n].dtype == getattr(torch, dtype)
        torch.testing.assert_close(merged[n], exact.to(merged[n].dtype))
    assert outcome.result["check"]["tied"] is tied
    assert outcome.result["check"]["dtype"] == dtype
    assert read(outcome.folder / "model" / "config.json") == read(base / "config.json")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_override(dtype: str, models: Any, mergelab: Command) -> None:
    base, expert = models(2)
    model = done(mergelab("method=linear", *chosen(base, expert), f"hardware.dtype={dtype}"))
    assert {t.dtype for t in weights(model).values()} == {getattr(torch, dtype)}
    assert read(model / "config.json") == read(expert / "config.json") | {"dtype": dtype}
    assert generates(model)


def test_config_stays_in_the_donors_words(models: Any, mergelab: Command) -> None:
    """As software older than the installed transformers reads it: rope_theta above all."""
    base, expert = models(2)
    config = read(base / "config.json")
    del config["rope_parameters"], config["dtype"], config["layer_types"]
    config |= {"rope_theta": 4321.0, "torch_dtype": "float32", "transformers_version": "4.43.1", "mine": [1]}
    for folder in (base, expert):
        (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "x"}), encoding="utf-8")
    model = done(mergelab("method=ties", *chosen(base, expert)))
    assert read(model / "config.json") == config


def test_config_says_the_dtype_that_was_written(models: Any, mergelab: Command, tmp_path: Path) -> None:
    """Also where a plain recipe leaves the dtype to the inputs, and the config lender's is another."""
    base, expert = models(2)
    change(base, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    (base / "config.json").write_text(
        json.dumps(read(base / "config.json") | {"dtype": "bfloat16"}), encoding="utf-8"
    )
    whole = [{"sources": [{"model": str(expert), "layer_range": [0, 3]}]}]
    recipe = {"merge_method": "passthrough", "base_model": str(base), "slices": whole}
    model = done(mergelab(*raw(tmp_path, recipe)))
    assert {t.dtype for t in weights(model).values()} == {torch.float32}
    assert read(model / "config.json")["dtype"] == "float32"


# ---------------------------------------------------------------- files


def test_shards_hold_the_same_weights(models: Any, mergelab: Command) -> None:
    arguments = ["method=ties", *chosen(*models(3))]
    whole = done(mergelab(*arguments))
    parts = done(mergelab(*arguments, "hardware.shard_size=20KB"))
    files = sorted(p.name for p in parts.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(read(parts / "model.safetensors.index.json")["weight_map"].values()) == set(files)
    assert same_bits(whole, parts)
    assert generates(parts)


@pytest.fixture
def careful_umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.parametrize("tokenizer", ["null", "union"])
def test_modes_follow_the_umask(tokenizer: str, careful_umask: None, models: Any, mergelab: Command) -> None:
    model = done(mergelab("method=ties", *chosen(*models(3)), f"model.tokenizer={tokenizer}"))
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in model.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(modes)
    assert set(modes.values()) == {0o640}, modes
    assert stat.S_IMODE(model.stat().st_mode) == 0o750


def test_output_elsewhere_and_on_another_disk(models: Any, mergelab: Command, tmp_path: Path) -> None:
    arguments = ["method=linear", *chosen(*models(2))]
    target = tmp_path / "new" / "name"
    outcome = mergelab(*arguments, f"output={target}")
    assert outcome.status == 0, outcome.err
    assert generates(target)
    assert not (outcome.folder / "model").exists()
    assert [p.name for p in target.parent.iterdir()] == ["name"]
    shm = Path("/dev/shm")
    if shm.is_dir() and os.access(shm, os.W_OK) and shm.stat().st_dev != tmp_path.stat().st_dev:
        other = shm / f"mergelab-{os.getpid()}"
        try:
            assert mergelab(*arguments, f"output={other}").status == 0
            assert same_bits(other, target)
        finally:
            shutil.rmtree(other, ignore_errors=True)


@pytest.fixture
def lender(family: Any, tmp_path: Path) -> Path:
    """A copy of the tiny family's base that has settings of its own for generation."""
    folder = tmp_path / "lender"
    shutil.copytree(family.checkpoint("base"), folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 1, "repetition_penalty": 1.25, "mine": "kept"}), encoding="utf-8"
    )
    return folder


@pytest.mark.parametrize(
    "override", ["model.tokenizer=null", "model.tokenizer=base", "model.tokenizer=union",
                 "model.chat_template=chatml", "model.chat_template='{{ messages[0].content }}!'"],
)  # fmt: skip
def test_tokenizer_template_and_generation_config(
    override: str, lender: Path, family: Any, mergelab: Command
) -> None:
    from transformers import AutoTokenizer

    model = done(mergelab("method=ties", *chosen(lender, family.checkpoint("math")), override))
    assert (model / "generation_config.json").read_bytes() == (lender / "generation_config.json").read_bytes()
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (model, lender))
    if "chat_template" not in override:
        assert ours.chat_template == theirs.chat_template
    else:
        said = ours.apply_chat_template([{"role": "user", "content": "1+1="}], tokenize=False)
        assert said == ("<|im_start|>user\n1+1=<|im_end|>\n" if "chatml" in override else "1+1=!")
    if "model.tokenizer" not in override or "null" in override:
        assert (model / "tokenizer.json").read_bytes() == (lender / "tokenizer.json").read_bytes()
    assert ours("1+1=").input_ids == theirs("1+1=").input_ids


def test_template_in_the_tokenizers_config_is_replaced_there(
    lender: Path, family: Any, mergelab: Command
) -> None:
    settings = read(lender / "tokenizer_config.json") | {"chat_template": "old {{ messages[0].content }}"}
    (lender / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (lender / "chat_template.jinja").unlink()
    arguments = ["method=ties", *chosen(lender, family.checkpoint("math"))]
    kept = done(mergelab(*arguments))
    assert read(kept / "tokenizer_config.json") == settings
    assert not (kept / "chat_template.jinja").exists()
    new = done(mergelab(*arguments, "model.chat_template=chatml"))
    template = (new / "chat_template.jinja").read_text(encoding="utf-8")
    assert "im_start" in template
    assert read(new / "tokenizer_config.json") == settings | {"chat_template": template}


def test_further_templates_are_kept(lender: Path, family: Any, mergelab: Command) -> None:
    (lender / "additional_chat_templates").mkdir()
    (lender / "additional_chat_templates" / "tools.jinja").write_text("{{ messages[0].content }} tools")
    model = done(mergelab("method=ties", *chosen(lender, family.checkpoint("math"))))
    assert (
        model / "additional_chat_templates" / "tools.jinja"
    ).read_text() == "{{ messages[0].content }} tools"


# ---------------------------------------------------------------- vocabularies


def grow(folder: Path, *tokens: str) -> None:
    """Add tokens to a model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_union_of_vocabularies(models: Any, mergelab: Command) -> None:
    from transformers import AutoTokenizer

    base, one, two = models(3, vocab_size=304)
    grow(two, "<mine>")
    arguments = ["method=task_arithmetic", *chosen(base, one, two)]
    assert mergelab(*arguments).status == 2
    model = done(mergelab(*arguments, "model.tokenizer=union"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    new = tokenizer.convert_tokens_to_ids("<mine>")
    rows = weights(model)["model.embed_tokens.weight"]
    assert read(model / "config.json")["vocab_size"] == len(rows) == len(tokenizer)
    its = AutoTokenizer.from_pretrained(two).convert_tokens_to_ids("<mine>")
    # Only one expert knows the token, so that mergekit takes its row for everybody.
    torch.testing.assert_close(rows[new], weights(two)["model.embed_tokens.weight"][its])
    assert generates(model)


def test_special_tokens_follow_another_models_tokenizer(
    models: Any, mergelab: Command, tmp_path: Path
) -> None:
    """Their ids in config.json and generation_config.json move with them."""
    base, other = models(2)
    path = other / "tokenizer.json"
    tokenizer = read(path)
    swap = {"<|pad|>": 1, "<|endoftext|>": 0}
    tokenizer["model"]["vocab"] |= swap
    for token in tokenizer["added_tokens"]:
        token["id"] = swap[token["content"]]
    tokenizer["added_tokens"].sort(key=lambda t: t["id"])
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    recipe = {
        "merge_method": "linear", "base_model": str(base), "tokenizer": {"source": str(other)},
        "models": [{"model": str(m), "parameters": {"weight": 0.5}} for m in (base, other)],
    }  # fmt: skip
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 5], "pad_token_id": 0, "top_k": 3}')
    model = done(mergelab(*raw(tmp_path, recipe), "allow=[tokenizer]"))
    assert [read(model / "config.json")[k] for k in ("eos_token_id", "pad_token_id")] == [0, 1]
    assert read(model / "generation_config.json") == {"eos_token_id": [0, 5], "pad_token_id": 1, "top_k": 3}
    b, o = (weights(m)["model.embed_tokens.weight"] for m in (base, other))
    merged = weights(model)["model.embed_tokens.weight"]
    torch.testing.assert_close(merged[0], (b[1] + o[0]) / 2)
    torch.testing.assert_close(merged[2], (b[2] + o[2]) / 2)


# ---------------------------------------------------------------- plain mergekit YAML


def stacked(one: Path, other: Path) -> list[dict[str, Any]]:
    """Four layers of three-layer models: 0 and 1 of one, 1 and 2 of the other."""
    return [
        {"sources": [{"model": str(one), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(other), "layer_range": [1, 3]}]},
    ]


@pytest.mark.parametrize(
    ("architecture", "form"),
    [(a, "slices") for a in ("qwen2", "qwen3", "llama", "gemma2", "gpt2")] + [("gemma2", "modules")],
)
def test_slices_change_the_number_of_layers(
    architecture: str, form: str, models: Any, mergelab: Command, tmp_path: Path
) -> None:
    base, expert = models(2, architecture)
    slices = stacked(base, expert)
    layers = {"slices": slices} if form == "slices" else {"modules": {"default": {"slices": slices}}}
    model = done(mergelab(*raw(tmp_path, {"merge_method": "passthrough", "dtype": "float32"} | layers)))
    config = read(model / "config.json")
    assert config["n_layer" if architecture == "gpt2" else "num_hidden_layers"] == 4
    merged, b, e = weights(model), weights(base), weights(expert)
    for out, (source, layer) in enumerate([(b, 0), (b, 1), (e, 1), (e, 2)]):
        for n in b:
            if f".{layer}." in n:
                assert torch.equal(merged[n.replace(f".{layer}.", f".{out}.", 1)], source[n])
    if architecture == "gemma2":
        kinds = read(base / "config.json")["layer_types"]
        assert len(set(kinds[:2])) == 2, "a model of one kind would show nothing"
        assert config["layer_types"] == [kinds[0], kinds[1], kinds[1], kinds[2]]
    assert generates(model)


def test_layer_types_are_right_where_config_leaves_them_out(
    models: Any, mergelab: Command, tmp_path: Path
) -> None:
    """Gemma 2's own config.json has none, and transformers alternates from the first layer on."""
    base, expert = models(2, "gemma2")
    config = read(base / "config.json")
    kinds = config.pop("layer_types")
    for folder in (base, expert):
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    recipe = {"merge_method": "passthrough", "slices": stacked(base, expert)}
    model = done(mergelab(*raw(tmp_path, recipe)))
    assert read(model / "config.json")["layer_types"] == [kinds[0], kinds[1], kinds[1], kinds[2]]


@pytest.fixture
def adapter(models: Any, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base, a LoRA adapter for it as peft saves it, and the two made one by peft."""
    import peft
    from transformers import AutoModelForCausalLM

    base, _ = models(2)
    torch.manual_seed(5)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "united")
    return base, tmp_path / "adapter", tmp_path / "united"


@pytest.mark.parametrize("form", ["expert", "raw"])
def test_adapters(form: str, adapter: tuple[Path, Path, Path], mergelab: Command, tmp_path: Path) -> None:
    base, lora, united = adapter
    reference = f"{base}+{lora}"
    if form == "expert":
        arguments = ["method=dare_linear", *chosen(base, Path(reference)), "experts.math.density=0.8"]
        arguments.append("experts.math.weight=0.5")
    else:
        item = {"model": reference, "parameters": {"weight": 0.5, "density": 0.8}}
        recipe = {"merge_method": "dare_linear", "base_model": str(base), "models": [item]}
        arguments = raw(tmp_path, recipe | {"dtype": "float32"})
    outcome = mergelab(*arguments)
    model = done(outcome)
    theirs = mergekit_yaml(
        outcome.folder / "recipe.yaml", tmp_path / "theirs", "--lora-merge-cache", str(tmp_path / "cache")
    )
    assert same_bits(model, theirs)
    merged, b, u = weights(model), weights(base), weights(united)
    changed = {n for n in b if not torch.equal(merged[n], b[n])}
    assert changed == {n for n in b if not torch.equal(u[n], b[n])}
    assert changed == {n for n in b if "q_proj.weight" in n or "down_proj" in n}
    assert [p.name for p in model.iterdir() if p.is_dir()] == []


@pytest.mark.slow
def test_without_base_model_the_first_model_lends_config_and_tokenizer(models: Any, tmp_path: Path) -> None:
    """In two processes whose sets are ordered differently."""
    folders = models(5)[::-1]
    for folder in folders:
        config = read(folder / "config.json") | {"mine": folder.name}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    items = [{"model": str(m), "parameters": {"weight": 0.25}} for m in folders]
    recipe = {"merge_method": "linear", "models": items, "tokenizer_source": "union"}
    outputs = []
    for seed in ("1", "2"):
        arguments = [*raw(tmp_path, recipe), f"hydra.run.dir={tmp_path / seed}"]
        command = [sys.executable, "-m", "mergelab", *arguments]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run(command, check=True, capture_output=True, timeout=300, env=environment)
        outputs.append(tmp_path / seed / "model")
    assert read(outputs[0] / "config.json")["mine"] == folders[0].name
    names = {p.name for p in outputs[0].iterdir()}
    assert names == {p.name for p in outputs[1].iterdir()}
    for name in names - {"README.md"}:
        assert (outputs[0] / name).read_bytes() == (outputs[1] / name).read_bytes(), name


# ---------------------------------------------------------------- when it goes wrong


@pytest.mark.parametrize("form", ["models", "slices"])
def test_nan_in_an_input_is_named(form: str, models: Any, mergelab: Command, tmp_path: Path) -> None:
    base, expert = models(2)
    name = "model.layers.2.mlp.up_proj.weight"
    change(expert, lambda tensors: tensors[name].view(-1)[3].fill_(float("nan")))
    if form == "models":
        outcome, out = mergelab("method=linear", *chosen(base, expert)), name
    else:
        recipe = {"merge_method": "passthrough", "slices": stacked(base, expert)}
        outcome, out = mergelab(*raw(tmp_path, recipe)), name.replace(".2.", ".3.")
    said = " ".join(outcome.err.split())
    assert outcome.status == 1
    assert f"{out} has 1 entry that is NaN" in said
    assert f"so has {name} of" in said
    assert str(expert / "model.safetensors") in said.replace(" ", "")
    assert outcome.result["error"]["step"] == "verify"
    assert_only_set_aside(outcome)


def test_overflow_is_told_from_damage(models: Any, mergelab: Command) -> None:
    base, expert = models(2)
    outcome = mergelab(
        "method=task_arithmetic", *chosen(base, expert), "experts.math.weight=1e9", "hardware.dtype=float16"
    )
    assert outcome.status == 1
    assert "the inputs are finite: lower the weights" in " ".join(outcome.err.split())
    assert_only_set_aside(outcome)


def test_what_mergekit_refuses_names_the_tensor(family: Any, mergelab: Command) -> None:
    """Three and more experts that leave a tensor as it is are too much for multislerp."""
    arguments = ["method=multislerp", "experts=balanced", "eval=none"]
    outcome = mergelab(*arguments, "hardware.engine=mergekit")
    assert outcome.status == 1
    assert "failed at model.embed_tokens.weight: ValueError: The weighted sum" in " ".join(
        outcome.err.split()
    )
    assert "Traceback" not in outcome.err
    assert "Traceback" in (outcome.folder / "mergelab.log").read_text(encoding="utf-8")
    assert_nothing_left(outcome.folder)
    base = weights(family.checkpoint("base"))
    merged = weights(done(mergelab(*arguments)))  # ours has an answer: what nobody changed stays
    assert torch.equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_killed_in_the_middle(models: Any, mergelab: Command, tmp_path: Path) -> None:
    """Nothing under the final name, and the same command in the same folder goes through."""
    arguments = ["method=ties", *chosen(*models(3)), "hardware.shard_size=20KB"]
    folder = tmp_path / "run"
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\n"
        "from mergelab.merging import model_files\n"
        "def die(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "model_files.write_config = die\n"  # when the weights have been written
        "from mergelab.cli.main import main\n"
        "main()\n",
        encoding="utf-8",
    )
    command = [sys.executable, str(script), *arguments, f"hydra.run.dir={folder}"]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == -9
    assert not (folder / "model").exists()
    assert any((folder / ".model.partial").glob("*.safetensors"))
    model = done(mergelab(*arguments, folder=folder))
    assert sorted(p.name for p in folder.glob("*model*")) == ["model"]
    assert not (folder / ".model.partial").exists()
    assert generates(model)


@pytest.mark.parametrize("moment", ["merge", "verify"])
def test_interrupted(moment: str, models: Any, mergelab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    target = {"merge": "mergelab.merging.model_files.write_config", "verify": "mergelab.steps.verify.move"}
    monkeypatch.setattr(target[moment], interrupt)
    outcome = mergelab("method=ties", *chosen(*models(3)), "hardware.engine=mergekit")
    assert outcome.status == 130
    assert_nothing_left(outcome.folder)


def test_file_too_large_for_its_limit(
    models: Any, mergelab: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The nearest thing to a full disk that needs no rights."""
    import resource

    base, expert = models(2)
    monkeypatch.setenv("MERGELAB_HOME", str(tmp_path / "home"))  # its memo of hashes may be large by now
    size = (base / "model.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        outcome = mergelab("method=linear", *chosen(base, expert))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert outcome.status == 1
    assert "the merge failed: File too large: " in " ".join(outcome.err.split())
    assert_nothing_left(outcome.folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("nobody here may mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("engine", ["fast", "mergekit"])
def test_disk_that_fills_up_in_the_meantime(
    engine: str, small_disk: Path, family: Any, mergelab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergelab.merging import fast_backend as ours
    from mergelab.steps import merge

    place: Any = (ours, "prepare") if engine == "fast" else (merge, "identify")
    real = getattr(*place)

    def fill(*arguments: Any) -> Any:
        (small_disk / "others").write_bytes(bytes(800_000))
        return real(*arguments)

    monkeypatch.setattr(*place, fill)
    arguments = ["eval=none", f"output={small_disk / 'model'}"]
    if engine == "mergekit":
        outcome = mergelab(*arguments, "hardware.engine=mergekit")
        said = " ".join(outcome.err.split())
        assert outcome.status == 1
        assert "the merge failed: No space left on device: " in said
        assert "set output=DIR on another disk" in said
        assert [p.name for p in small_disk.iterdir()] == ["others"]
        return
    outcome = mergelab(*arguments)
    assert outcome.status == 1
    said = re.search(r"no space left on device for .*: (\S+) kB more are needed, 0 B are free", outcome.err)
    assert said, outcome.err
    assert 100 < float(said[1]) < 510
    assert "run the same command again: it resumes where it stopped" in outcome.err
    monkeypatch.setattr(*place, real)
    os.truncate(small_disk / "others", 450_000)  # there is room for what is missing, not for the whole
    again = mergelab(*arguments)
    assert again.status == 0, again.err
    assert "were there already" in again.out
    assert sorted(p.name for p in small_disk.iterdir()) == ["model", "others"]
    assert generates(small_disk / "model")


def test_something_appears_at_the_final_place(
    models: Any, mergelab: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It stays as it is."""
    from mergelab.merging import verify

    target = tmp_path / "target"
    real = verify.verify

    def meddle(*arguments: Any, **options: Any) -> Any:
        target.mkdir()
        (target / "theirs").write_text("1")
        return real(*arguments, **options)

    monkeypatch.setattr("mergelab.context.verify", meddle)
    outcome = mergelab("method=ties", *chosen(*models(3)), f"output={target}")
    assert outcome.status == 1
    assert "cannot put the model at" in outcome.err
    assert [p.name for p in target.iterdir()] == ["theirs"]
    assert_nothing_left(outcome.folder)


# ---------------------------------------------------------------- the card


def test_card(family: Any, mergelab: Command) -> None:
    from huggingface_hub import ModelCard

    outcome = mergelab(
        "experts=single_math", "method=task_arithmetic", "eval.limit=8", "eval.baselines=false"
    )
    assert outcome.status == 0, outcome.err
    card = ModelCard.load(outcome.folder / "model" / "README.md")
    assert card.data.library_name == "transformers"
    assert "merge" in card.data.tags
    recipe = yaml.safe_load((outcome.folder / "recipe.yaml").read_text(encoding="utf-8"))
    shown = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert shown["merge_method"] == recipe["merge_method"]
    assert shown["models"][0]["parameters"] == recipe["models"][0]["parameters"]
    for m in outcome.result["inputs"]:
        assert m["content"][:16] in card.text
    assert outcome.result["command"] in card.text
    scores = outcome.result["metrics"]["merged"]["validation"]
    assert scores
    assert all(name in card.text for name in scores)
    assert all(f"{s['samples']}" in card.text for s in scores.values())
