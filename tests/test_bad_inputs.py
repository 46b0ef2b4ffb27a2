"""What is wrong with an input is said once, clearly, before anything is started or touched."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from broken_models import Models, contents
from conftest import Command, Outcome

Arguments = str | Callable[[Models], list[str]]
"""A command line, or a function that breaks a model and returns one."""


@pytest.fixture(scope="session")
def sound(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    for seed, name in enumerate(("base", "math", "physics")):
        make_model(folder / name, seed=seed)
    return folder


@pytest.fixture
def models(sound: Path, make_model: Callable[..., Path], tmp_path: Path) -> Models:
    return Models(tmp_path / "in", sound, make_model)


def told(out: Outcome) -> list[str]:
    """The errors on stderr, each as one line."""
    assert "Traceback" not in out.err
    first, *errors = out.err.split("✗ ")
    assert first == "", f"stderr begins with {first!r}"
    return [" ".join(e.split()) for e in errors]


def refuse(run: Command, arguments: list[str], tmp_path: Path) -> list[str]:
    """Run a command that must be refused without leaving anything; returns what it said."""
    before = contents(tmp_path, but=tmp_path / "run1")
    out = run(*arguments)
    assert out.status == 2, out.out + out.err
    assert contents(tmp_path, but=out.folder) == before
    assert not [p.name for p in out.folder.rglob("*") if p.name == "model" or p.name.endswith(".partial")]
    if (out.folder / "result.json").exists():
        assert out.result["status"] == "invalid"
    return told(out)


# ---------------------------------------------------------------- the table


def edit(
    change: Callable[[Models], object], *more: str, method: str = "ties"
) -> Callable[[Models], list[str]]:
    """Break something, then merge."""

    def arguments(m: Models) -> list[str]:
        change(m)
        return m.arguments(*more, method=method)

    return arguments


def vocabulary(m: Models) -> None:
    """The same number of tokens, but two of them have changed places."""
    file = m["math"] / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    m.text(
        "math", "tokenizer.json", text.replace('"a":', '"§":').replace('"b":', '"a":').replace('"§":', '"b":')
    )
    assert file.read_text(encoding="utf-8") != text


def cut(m: Models) -> None:
    file = m["math"] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def half_a_header(m: Models) -> None:
    file = m["math"] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20])


def to_float8(m: Models) -> None:
    import torch

    m.tensors("math", lambda t: t.update({n: v.to(torch.float8_e4m3fn) for n, v in t.items()}))


def renamed(m: Models) -> list[str]:
    m["math"].rename(m.folder / "a+b")
    return [a.replace(str(m["math"]), f"{m.folder}/a+b") for a in m.arguments()]


def full(m: Models) -> list[str]:
    (m.folder / "out").mkdir()
    (m.folder / "out" / "thesis.tex").write_text("all of it", encoding="utf-8")
    return m.arguments(f"output={m.folder}/out")


COMPOSITION = [
    ("unknown option", "model=tinny", ["model=tinny", "Did you mean 'tiny'?", "qwen32b"]),
    ("unknown experts", "experts=ballanced", ["experts=ballanced", "Did you mean 'balanced'?", "stem"]),
    ("unknown method file", "method=tiez", ["method=tiez", "Did you mean 'ties'?"]),
    ("unknown job", "job=mergee", ["job=mergee", "Did you mean 'merge'?", "plan"]),
    ("unknown hardware", "hardware=gpuu", ["hardware=gpuu", "Did you mean 'gpu'?"]),
    ("unknown group", "modle=tiny", ["modle", "Did you mean 'model'?"]),
    ("unknown key", "foo=1", ["foo", "there is no key", "experts", "seed"]),
    ("unknown key, added", "+foo=1", ["foo", "there is no key", "experts", "seed"]),
    ("unknown key inside, added", "+hardware.gpus=8", ["hardware.gpus", "device", "threads"]),
    ("misspelt key", "experts.math.wieght=0.4", ["experts.math.wieght", "Did you mean 'weight'?"]),
    ("misspelt key inside", "eval.limt=3", ["eval.limt", "Did you mean 'limit'?"]),
    ("no equals sign", "experts.math.weight", ["'experts.math.weight'", "there is no ="]),
    ("open brace", "experts.math.weight={mlp:", ["'experts.math.weight={mlp:'", "cannot be read"]),
    ("no key", "=3", ["=3", "Config group override"]),
    ("two options", "experts=stem,multi", ["experts=stem,multi", "--multirun"]),
    ("nothing to delete", "'~experts.nobody'", ["experts.nobody", "does not exist"]),
    ("text for a number", "seed=abc", ["seed=abc", "not a whole number"]),
    ("fraction for a number", "hardware.threads=1.5", ["hardware.threads=1.5", "not a whole number"]),
    ("text for a switch", "eval.baselines=perhaps", ["eval.baselines=perhaps", "true nor false"]),
    ("text for a list", "allow=norm", ["allow=norm", "list"]),
    ("number for an expert", "experts.math=3", ["experts.math", "mapping"]),
    ("number for parameters", "method.parameters=3", ["method.parameters=3", "mapping"]),
    ("null for a path", "model.base.path=null", ["model.base.path=null", "null"]),
    ("unset base", "model.base.path=???", ["model.base.path", "not set"]),
    ("unknown reference", "seed=${foo}", ["seed", "'foo' not found"]),
    ("seed below", "seed=-1", ["seed", "-1", "0 to 4294967295"]),
    ("seed above", "seed=4294967296", ["seed", "4294967296", "0 to 4294967295"]),
    ("step", "job.steps=[mrge]", ["job.steps", "'mrge'", "Did you mean 'merge'?"]),
    ("no steps", "job.steps=[]", ["job.steps", "empty", "preflight"]),
    ("steps out of order", "job.steps=[preflight,check,merge]", ["job.steps", "'check'", "after 'merge'"]),
    ("code to allow", "allow=[ropes]", ["allow", "'ropes'", "Did you mean 'rope'?"]),
    ("zoo role", "model.base.path=zoo:bass", ["model.base", "'bass'", "choose base"]),
    ("a run's own name", "tracking.name=mlflow", ["tracking.name", "'mlflow'", "wandb"]),
    ("tracking mode", "tracking.mode=sometimes", ["tracking.mode", "'sometimes'", "offline"]),
    ("tracking timeout", "tracking.timeout=-1", ["tracking.timeout", "-1", "above 0"]),
]  # fmt: skip

EXPERTS = [
    ("no role", "experts.chemistry.weight=1", ["experts.chemistry", "model=tiny", "math", "~experts.chemistry"]),
    ("misspelt role", "experts.phisics.weight=1", ["experts.phisics", "Did you mean 'physics'?"]),
    ("nobody", "'~experts'", ["experts", "no expert", "experts=balanced"]),
    ("no folder", "experts.math.path=/nowhere/at/all", ["experts.math", "/nowhere/at/all is not there"]),
    ("a file", "experts.math.path=/etc/hostname", ["experts.math", "/etc/hostname is a file"]),
    ("empty path", "experts.math.path=\"''\"", ["experts.math", "''", "neither a folder nor a hub id"]),
    ("no such name", "experts.math.path=\"'my model'\"", ["experts.math", "'my model'", "hub id such as"]),
    ("path too long", f"experts.math.path=/{'x' * 300}", ["experts.math", "xxx is not there"]),
    ("nobody's home", "experts.math.path=\"'~nobody-here/x'\"", ["experts.math", "~nobody-here/x is not there"]),
    ("twice", "experts.math.path=zoo:physics", ["experts.physics", "zoo:physics", "experts.math", "~experts.physics"]),
    ("the base itself", "experts.math.path=zoo:base", ["experts.math", "zoo:base", "model.base"]),
    ("revision of a folder", "experts.math.revision=abc", ["experts.math", "'abc'", "Leave the revision out"]),
    ("density above", "experts.math.density=1.5", ["experts.math.density", "1.5", "(0, 1]"]),
    ("density zero", "experts.math.density=0", ["experts.math.density", "0 is out of range", "(0, 1]"]),
    ("density below", "experts.math.density=-0.5", ["experts.math.density", "-0.5", "(0, 1]"]),
    ("density in a gradient", "experts.math.density=[0.5,1.5]", ["experts.math.density", "1.5", "(0, 1]"]),
    ("density text", "experts.math.density=much", ["experts.math.density", "'much' is not a number"]),
    ("density switch", "experts.math.density=true", ["experts.math.density", "True is not a number"]),
    ("weight nan", "experts.math.weight=nan", ["experts.math.weight", "nan", "finite"]),
    ("weight inf", "experts.math.weight={mlp:inf,*:1}", ["experts.math.weight", "inf", "finite"]),
    ("gradient with text", "experts.math.weight=[0.5,a]", ["experts.math.weight", "'a' is not a number"]),
    ("empty gradient", "experts.math.weight=[]", ["experts.math.weight", "[] is not a setting", "gradient"]),
    ("gradient of gradients", "experts.math.weight=[[1],[2]]", ["experts.math.weight", "[[1], [2]]"]),
    ("filter of nothing", "experts.math.weight={self_atn:1,*:0}", ["experts.math.weight", "'self_atn'", "Did you mean 'self_attn'?"]),
    ("rest not last", "experts.math.weight={*:0.5,mlp:1}", ["experts.math.weight", '"*"', "last"]),
    ("no rest", "experts.math.weight={mlp:1}", ["experts.math.weight", "ties needs weight", "embed_tokens", '"*"']),
    ("no effect", "method=linear experts.math.density=0.5", ["experts.math.density=0.5", "linear takes no density", "[no-effect]"]),
    ("density of slerp", "method=slerp experts=stem experts.math.weight=1", ["experts.math.weight=1", "slerp takes no weight"]),
    ("weight for all", "method.parameters.weight=0.5", ["method.parameters.weight", "experts.ROLE.weight"]),
]  # fmt: skip

METHODS = [
    ("name", "method.name=dare-ties", ["method.name", "'dare-ties'", "Did you mean 'dare_ties'?", "slerp"]),
    ("base", "method.base=middle", ["method.base", "'middle'", "model, first, none"]),
    ("no base", "method.base=none", ["ties needs a base model", "method.base=model"]),
    ("base of linear", "method=linear method.base=model", ["method.base", "linear", "method.base=first"]),
    ("unknown parameter", "method.parameters.lamda=1", ["method.parameters.lamda", "ties", "Did you mean 'lambda'?"]),
    ("parameter of another", "method.parameters.t=0.5", ["method.parameters.t", "ties has no parameter 't'", "lambda"]),
    ("for each model", "experts.math.parameters.lambda=2", ["experts.math.parameters.lambda", "once", "method.parameters.lambda"]),
    ("number for a switch", "method.parameters.normalize=3", ["method.parameters.normalize", "3 is no boolean"]),
    ("lambda nan", "method.parameters.lambda=nan", ["method.parameters.lambda", "nan", "finite"]),
    ("lambda text", "method.parameters.lambda=large", ["method.parameters.lambda", "'large' is not a number"]),
    ("t above", "method=slerp experts=stem method.parameters.t=1.5", ["method.parameters.t", "1.5", "[0, 1]"]),
    ("t unset", "method=slerp experts=stem method.parameters.t=null", ["method.parameters.t", "slerp needs t"]),
    ("t without rest", "method=slerp experts=stem method.parameters.t={mlp:0.5}", ["method.parameters.t", "nothing sets it", '"*"']),
    ("t of nearswap", "method=nearswap experts=stem method.parameters.t=0", ["method.parameters.t", "above 0"]),
    ("select_topk", "method=sce method.parameters.select_topk=0", ["method.parameters.select_topk", "(0, 1]"]),
    ("gamma", "method=breadcrumbs method.parameters.gamma=1", ["method.parameters.gamma", "[0, 1)"]),
    ("gamma and density", "method=breadcrumbs method.parameters.gamma=0.6", ["experts.math.density, experts.physics.density", "0.5", "0.6", "at most 1"]),
    ("epsilon", "method=della method.parameters.epsilon=-0.1", ["method.parameters.epsilon", "-0.1"]),
    ("epsilon and density", "method=della experts.math.density=0.1", ["experts.math.density", "0.1 ± 0.15", "method.parameters.epsilon"]),
    ("whole number", "method=karcher method.parameters.max_iter=2.5", ["method.parameters.max_iter", "2.5", "whole number"]),
    ("whole gradient", "method=karcher method.parameters.max_iter=[1,10]", ["method.parameters.max_iter", "[1, 10]", "no gradient"]),
    ("tolerance", "method=karcher method.parameters.tol=0", ["method.parameters.tol", "above 0"]),
    ("zero sum", "method=linear experts=stem experts.math.weight=-0.6", ["experts.math.weight, experts.physics.weight", "-0.6, 0.6 sum to 0", "normalize=false"]),
    ("zero sum in a layer", "method=linear experts=stem experts.math.weight=[1,-0.6]", ["sum to 0 at model.layers.1.", "normalize=false"]),
    ("four for a pair", "method=slerp", ["experts", "slerp takes exactly 2 models; here are 4", "experts=math_physics"]),
    ("four besides the base", "method=nuslerp", ["nuslerp takes exactly 2 models besides the base; here are 4"]),
    ("one for a stock", "method=model_stock experts=single_math", ["at least 2 models besides the base; here is 1", "experts=balanced"]),
    ("two to pass through", "method=passthrough experts=stem", ["passthrough takes exactly 1 model; here are 2", "experts=single_math"]),
    ("path of another", "method.path=my.yaml", ["method.path", "method=ties reads no file", "method=mergekit"]),
]  # fmt: skip

ELSEWHERE = [
    ("device", "hardware.device=tpu", ["hardware.device", "'tpu'", "cpu, cuda"]),
    ("device number", "hardware.device=cuda:first", ["hardware.device", "'cuda:first'", "cuda:N"]),
    ("dtype", "hardware.dtype=float23", ["hardware.dtype", "'float23'", "Did you mean 'float32'?"]),
    ("arithmetic", "hardware.compute_dtype=int8", ["hardware.compute_dtype", "'int8'", "bfloat16"]),
    ("threads", "hardware.threads=0", ["hardware.threads", "0 is out of range", "at least 1"]),
    ("shard size", "hardware.shard_size=large", ["hardware.shard_size", "'large'", "5GB"]),
    ("chat template", "model.chat_template=chatmll", ["model.chat_template", "Did you mean 'chatml'?"]),
    ("broken template", "'model.chat_template=\"{% if x\"'", ["model.chat_template", "Jinja", "line 1"]),
    ("tokenizer", "model.tokenizer=unoin", ["model.tokenizer", "'unoin'", "union"]),
    ("kind", "eval.kind=vibes", ["eval.kind", "'vibes'", "perplexity"]),
    ("task", "eval=lm_eval eval.tasks=[tiny_mth]", ["eval.tasks", "no lm_eval task 'tiny_mth'", "Did you mean 'tiny_math'?"]),
    ("no task", "eval=lm_eval", ["eval.tasks", "empty"]),
    ("task of a skill", "model.skills.math.validation=tiny_mth", ["model.skills.math.validation", "tiny_mth", "Did you mean 'tiny_math'?"]),
    ("metric", "eval=lm_eval eval.tasks=[tiny_math] eval.metrics.tiny_math=elo", ["eval.metrics.tiny_math", "'elo'", "exact_match"]),
    ("share of nobody", "eval.shares.poetry=2", ["eval.shares.poetry", "measured are math"]),
    ("limit", "eval.limit=0", ["eval.limit", "0 is neither"]),
    ("limit between", "eval.limit=1.5", ["eval.limit", "1.5 is neither"]),
    ("batch size", "eval.batch_size=0", ["eval.batch_size", "at least 1"]),
    ("no text", "eval=perplexity", ["eval.text", "not set", "my.txt"]),
    ("missing text", "eval=perplexity eval.text=/nowhere.txt", ["eval.text", "/nowhere.txt", "No such file"]),
    ("empty text", "eval=perplexity eval.text=/dev/null", ["eval.text", "/dev/null holds no text"]),
    ("check nothing", "job=check check.path=/nowhere", ["check.path", "/nowhere"]),
    ("check in vain", "check.path=/tmp", ["check.path", "no effect", "job=check"]),
    ("evaluate nothing", "job=evaluate evaluate.path=/nowhere", ["evaluate.path", "/nowhere is no folder"]),
    ("evaluate no model", "job=evaluate evaluate.path=/etc", ["evaluate.path", "/etc has no config.json"]),
]  # fmt: skip

FILES: list[tuple[str, Arguments, list[str]]] = [
    ("no config.json", edit(lambda m: m.remove("math", "config.json")), ["experts.math", "in/math has no config.json"]),
    ("config.json cut short", edit(lambda m: m.text("math", "config.json", '{"a": ')), ["experts.math", "math/config.json is not JSON", "line 1", "Fetch it again"]),
    ("config.json is a list", edit(lambda m: m.text("math", "config.json", "[]")), ["experts.math", "math/config.json", "architecture"]),
    ("config.json is a folder", edit(lambda m: m.folder_instead("math", "config.json")), ["experts.math", "cannot read", "config.json: Is a directory"]),
    ("no architecture", edit(lambda m: m.config("base", architectures=None)), ["model.base", "base/config.json", "architecture"]),
    ("quantized", edit(lambda m: m.config("math", quantization_config={"bits": 4})), ["experts.math", "quantized", "unquantized"]),
    ("float8", edit(to_float8), ["experts.math", "F8_E4M3", "unquantized"]),
    ("cut short", edit(cut), ["experts.math", "math/model.safetensors is damaged or was cut short", "bytes", "Fetch it again"]),
    ("half a header", edit(half_a_header), ["experts.math", "math/model.safetensors is damaged", "20 bytes"]),
    ("no safetensors at all", edit(lambda m: m.text("math", "model.safetensors", "<html>404</html> not found")), ["experts.math", "math/model.safetensors is damaged"]),
    ("empty file", edit(lambda m: m.text("math", "model.safetensors", "")), ["experts.math", "math/model.safetensors is damaged", "0 bytes"]),
    ("a folder of weights", edit(lambda m: m.folder_instead("math", "model.safetensors")), ["experts.math", "math/model.safetensors"]),
    ("no weights", edit(lambda m: m.remove("math", "model.safetensors")), ["experts.math", "in/math has no model.safetensors"]),
    ("pickled", edit(lambda m: (m.remove("math", "*.safetensors"), m.text("math", "pytorch_model.bin", "x"))), ["experts.math", "pickled", "Convert"]),
    ("missing shard", edit(lambda m: (m.shard("math"), m.remove("math", "*2-of-00002.safetensors"))), ["experts.math", "model-00002-of-00002.safetensors is not there", "index", "Fetch it again"]),
    ("index without its shards' tensor", edit(lambda m: (m.shard("math"), m.index("math", **{"model.norm.weight": "model-00001-of-00002.safetensors"}))), ["experts.math", "model-00001-of-00002.safetensors lacks model.norm.weight"]),
    ("index without a map", edit(lambda m: (m.shard("math"), m.text("math", "model.safetensors.index.json", "{}"))), ["experts.math", "index.json has no weight_map"]),
    ("missing tensor", edit(lambda m: m.tensors("math", lambda t: t.pop("model.norm.weight"))), ["experts.math", "in/math lacks model.norm.weight"]),
    ("missing head", edit(lambda m: [m.config(n, tie_word_embeddings=False) for n in ("base", "math", "physics")] and [m.tensors(n, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})) for n in ("base", "physics")]), ["experts.math", "in/math lacks lm_head.weight"]),
    ("extra tensor", edit(lambda m: m.tensors("math", lambda t: t.update({"model.extra": t["model.norm.weight"].clone()}))), ["experts.math", "model.extra", "drop", "allow=[extra-tensor]"]),
    ("another architecture", edit(lambda m: m.again("math", "llama")), ["experts.math", "LlamaForCausalLM", "Qwen2ForCausalLM"]),
    ("another width", edit(lambda m: m.again("math", hidden_size=64)), ["experts.math", "hidden_size is 64, the base's is 32"]),
    ("another inner width", edit(lambda m: m.again("math", intermediate_size=56)), ["experts.math", "intermediate_size is 56, the base's is 48"]),
    ("another depth", edit(lambda m: m.again("math", num_hidden_layers=2)), ["experts.math", "num_hidden_layers is 2, the base's is 3"]),
    ("shapes unlike config.json", edit(lambda m: m.tensors("math", lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:16].clone()}))), ["experts.math", "model.norm.weight is [16], the base's is [32]"]),
    ("other heads, same shapes", edit(lambda m: m.config("math", num_attention_heads=2, num_key_value_heads=1, head_dim=16)), ["experts.math", "num_attention_heads is 2, the base's is 4"]),
    ("rope_theta", edit(lambda m: m.config("math", rope_parameters=None, rope_theta=5e5)), ["experts.math", "rope_theta=500000", "math/config.json", "allow=[rope]"]),
    ("rope_parameters", edit(lambda m: m.config("math", rope_parameters={"rope_theta": 777.0, "rope_type": "default"})), ["experts.math", "rope_theta=777", "allow=[rope]"]),
    ("rope scaling", edit(lambda m: m.config("math", rope_scaling={"type": "yarn", "factor": 4})), ["experts.math", "rope_type=yarn", "factor=4"]),
    ("norm", edit(lambda m: m.config("math", rms_norm_eps=1e-5)), ["experts.math", "rms_norm_eps is 1e-05, the base's is 1e-06", "allow=[norm]"]),
    ("norm left out", edit(lambda m: (m.config("math", rms_norm_eps=None), m.config("base", rms_norm_eps=1e-5), m.config("physics", rms_norm_eps=1e-5))), ["experts.math", "rms_norm_eps is 1e-06, the base's is 1e-05"]),
    ("activation", edit(lambda m: m.config("math", hidden_act="gelu")), ["experts.math", "hidden_act is gelu, the base's is silu"]),
    ("vocabulary", edit(lambda m: m.again("math", vocab_size=320)), ["experts.math", "320 rows, the base's has 304", "model.tokenizer=union"]),
    ("tokenizer at equal size", edit(vocabulary), ["experts.math", "2 ids mean something else", "model.tokenizer=union"]),
    ("tokenizer broken", edit(lambda m: m.text("math", "tokenizer.json", "{")), ["experts.math", "math/tokenizer.json is not JSON"]),
    ("tokenizer of another kind", edit(lambda m: m.text("math", "tokenizer.json", "[1]")), ["experts.math", "math/tokenizer.json is not a tokenizer's"]),
    ("tokenizer settings broken", edit(lambda m: m.text("math", "tokenizer_config.json", "{")), ["experts.math", "math/tokenizer_config.json is not JSON"]),
    ("no tokenizer to lend", edit(lambda m: m.remove("base", "*token*")), ["model.base", "in/base has no tokenizer", "Copy"]),
    ("no tokenizer to lend, first", edit(lambda m: m.remove("math", "*token*"), method="slerp"), ["experts.math", "in/math has no tokenizer", "Copy"]),
    ("no tokenizer to measure with", edit(lambda m: m.remove("math", "*token*"), "eval=skills"), ["experts.math", "in/math has no tokenizer", "eval.baselines=false"]),
    ("tied and untied", edit(lambda m: m.again("math", tied=False)), ["experts.math", "tie_word_embeddings is False, the base's is True"]),
    ("plus in a path", renamed, ["experts.math", "a+b", "Rename"]),
    ("no adapter", lambda m: [*m.arguments(), f"experts.math.path='{m['math']}+{m['physics']}'"], ["experts.math", "in/physics has no adapter_config.json"]),
]  # fmt: skip

OUTPUT: list[tuple[str, Arguments, list[str]]] = [
    ("an input", lambda m: m.arguments(f"output={m['math']}"), ["output", "in/math is the folder of math", "overwritten"]),
    ("inside an input", lambda m: m.arguments(f"output={m['base']}/new"), ["output", "in/base/new", "folder of base"]),
    ("not empty", full, ["output", "in/out is not empty", "not there yet"]),
    ("a file", lambda m: m.arguments(f"output={m['base']}.txt") if m.text("base", "../base.txt", "x") is None else [], ["output", "in/base.txt is not a folder"]),
    ("under a file", lambda m: m.arguments(f"output={m['base']}.txt/a/b") if m.text("base", "../base.txt", "x") is None else [], ["output", "in/base.txt is not a folder"]),
]  # fmt: skip

MERGEKIT: list[tuple[str, Arguments, list[str]]] = [
    ("no path", "method=mergekit eval=none", ["method.path", "method.path=my.yaml"]),
    ("missing file", "method=mergekit method.path=/nowhere.yaml eval=none", ["method.path", "/nowhere.yaml", "No such file"]),
    ("a folder", "method=mergekit method.path=/etc eval=none", ["method.path", "/etc", "directory"]),
    ("not YAML", lambda m: m.yaml("a: [1,"), ["method.path", "my.yaml is not YAML", "line"]),
    ("not a mapping", lambda m: m.yaml("- ties"), ["my.yaml", "not a mapping"]),
    ("empty", lambda m: m.yaml(""), ["my.yaml", "not a mapping"]),
    ("no method", lambda m: m.recipe(without="merge_method"), ["my.yaml: merge_method", "name a merge method"]),
    ("method", lambda m: m.recipe({"merge_method": "dare-ties"}), ["my.yaml: merge_method", "'dare-ties'", "Did you mean 'dare_ties'?"]),
    ("unknown key", lambda m: m.recipe({"parmeters": {}}), ["my.yaml: parmeters", "Did you mean 'parameters'?"]),
    ("key without effect", lambda m: m.slices(([0, 3], [0, 3]), slices=[{"sources": [{"model": str(m["base"]), "layer_range": [0, 3]}, {"model": str(m["math"]), "layer_range": [0, 3]}], "residual_weight": 0.5}]), ["my.yaml: slices[0].residual_weight", "no use"]),
    ("misspelt parameter", lambda m: m.recipe({"parameters": {"densty": 0.5}}), ["my.yaml: parameters.densty", "ties has no parameter 'densty'", "Did you mean 'density'?"]),
    ("parameter out of range", lambda m: m.recipe({"parameters": {"lambda": float("nan")}}), ["my.yaml: parameters.lambda", "nan"]),
    ("parameter of a model", lambda m: m.recipe({"models": [{"model": str(m["math"]), "parameters": {"weight": 1, "density": 5}}]}), ["my.yaml: models[0].parameters.density", "5", "(0, 1]"]),
    ("no setting", lambda m: m.recipe({"parameters": {"lambda": {"mlp": {}}}}), ["my.yaml: parameters.lambda", "not a setting"]),
    ("condition misspelt", lambda m: m.recipe({"parameters": {"lambda": [{"fitler": "mlp", "value": 1}]}}), ["my.yaml: parameters.lambda", "fitler", "`filter`"]),
    ("both forms", lambda m: m.recipe({"slices": [{"sources": [{"model": str(m["base"]), "layer_range": [0, 3]}]}]}), ["my.yaml", "needs one of models, slices, modules", "models and slices"]),
    ("neither form", lambda m: m.recipe(without="models"), ["my.yaml", "none of them"]),
    ("models no list", lambda m: m.recipe({"models": "math"}), ["my.yaml: models", "list"]),
    ("model without a name", lambda m: m.recipe({"models": [{"weight": 1}]}), ["my.yaml: models[0]", "`model: PATH`"]),
    ("missing model", lambda m: m.recipe({"models": [{"model": "/nowhere/math", "parameters": {"weight": 1}}]}), ["my.yaml: /nowhere/math", "is not there"]),
    ("a model twice", lambda m: m.recipe({"models": [{"model": str(m["math"]), "parameters": {"weight": 1}}] * 2}), ["my.yaml: models", "in/math takes part twice"]),
    ("no base", lambda m: m.recipe(without="base_model"), ["my.yaml: models", "ties needs a base model"]),
    ("dtype", lambda m: m.recipe({"dtype": "bf16"}), ["my.yaml: dtype", "'bf16'", "bfloat16"]),
    ("base_model no text", lambda m: m.recipe({"base_model": 3}), ["my.yaml: base_model", "3 is no text"]),
    ("chat template", lambda m: m.recipe({"chat_template": "lama3"}), ["my.yaml: chat_template", "'lama3'", "Did you mean 'llama3'?"]),
    ("two tokenizers", lambda m: m.recipe({"tokenizer": {"source": "union"}, "tokenizer_source": "base"}), ["my.yaml: tokenizer", "tokenizer_source", "keep one"]),
    ("tokenizer of nobody", lambda m: m.recipe({"tokenizer_source": "unionn"}), ["my.yaml: tokenizer_source", "'unionn'", "union, base"]),
    ("layers reversed", lambda m: m.slices(([2, 0], [2, 0])), ["my.yaml: slices[0].sources[0].layer_range, ", "my.yaml: slices[0].sources[1].layer_range: ", "[2, 0] holds no layers"]),
    ("layers that are not there", lambda m: m.slices(([0, 3], [1, 4])), ["my.yaml: slices[0]", "[1, 4] of", "in/math, which has 3 layers"]),
    ("unequal lengths", lambda m: m.slices(([0, 2], [0, 3])), ["my.yaml: slices[0]", "[2, 3] layers", "equal"]),
    ("layers no numbers", lambda m: m.slices(([0, 3], ["0", 3])), ["my.yaml: slices[0].sources[1].layer_range", "['0', 3]"]),
    ("unknown module", lambda m: m.recipe({"modules": {"text": {"models": [{"model": str(m["math"]), "parameters": {"weight": 1}}]}}}, without="models"), ["my.yaml: modules.text", "no module 'text'", "default"]),
    ("setting of the file", lambda m: [*m.recipe(), "hardware.dtype=float16"], ["hardware.dtype=float16", "my.yaml decides it"]),
    ("experts beside the file", lambda m: [*m.recipe(), "experts=stem"], ["experts=stem", "my.yaml decides it"]),
]  # fmt: skip


def row(group: str, case: tuple[str, Arguments, list[str]]) -> Any:
    return pytest.param(case[1], case[2], id=f"{group}: {case[0]}")


SIMPLE = {"composition": COMPOSITION, "experts": EXPERTS, "method": METHODS, "settings": ELSEWHERE}
BROKEN = {"files": FILES, "output": OUTPUT, "mergekit": MERGEKIT}


@pytest.mark.parametrize(("line", "said"), [row(g, c) for g, cases in SIMPLE.items() for c in cases])
def test_a_wrong_setting(line: str, said: list[str], mergelab: Command, tmp_path: Path, family: Any) -> None:
    import shlex

    plain = [] if "method=" in line else ["method=ties"]
    errors = refuse(mergelab, [*plain, *shlex.split(line)], tmp_path)
    assert len(errors) == 1, errors
    for fragment in said:
        assert fragment in errors[0], errors[0]


@pytest.mark.parametrize(("broken", "said"), [row(g, c) for g, cases in BROKEN.items() for c in cases])
def test_a_wrong_file(
    broken: Arguments, said: list[str], mergelab: Command, tmp_path: Path, models: Models
) -> None:
    arguments = broken.split() if isinstance(broken, str) else broken(models)
    errors = refuse(mergelab, arguments, tmp_path)
    assert len(errors) == 1, errors
    for fragment in said:
        assert fragment in errors[0], errors[0]


def test_the_sound_models_are_accepted(mergelab: Command, models: Models) -> None:
    """Every row above breaks one thing of these; none would be worth much if they were refused too."""
    for arguments in (models.arguments(), models.recipe(), models.slices(([0, 3], [0, 3]))):
        out = mergelab(*arguments)
        assert out.status == 0, out.err
        assert out.err == ""


def test_everything_is_said_at_once(mergelab: Command, models: Models, tmp_path: Path) -> None:
    models.config("math", rms_norm_eps=1e-3, rope_parameters={"rope_theta": 5.0, "rope_type": "default"})
    models.remove("physics", "model.safetensors")
    errors = refuse(
        mergelab,
        models.arguments(
            "seed=-1", "hardware.dtype=int4", "experts.math.density=7", "experts.physics.weight=nan",
            "method.parameters.lamda=1", "experts.chemistry.weight=1", f"output={models['base']}",
            "tracking.mode=never", "eval.limit=0", "eval=perplexity",
        ),
        tmp_path,
    )  # fmt: skip
    starts = [
        "eval.limit:", "eval.text:", "tracking.mode:", "hardware.dtype:", "seed:", "experts.chemistry:",
        "experts.math: rms_norm_eps", "experts.math: rope", "experts.physics:", "experts.math.density:",
        "experts.physics.weight:", "method.parameters.lamda:", "output:",
    ]  # fmt: skip
    for start in starts:
        assert [e for e in errors if e.startswith(start)], (start, errors)
    assert len(errors) == len(starts)


# ---------------------------------------------------------------- disks


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a small file system of its own; only root can."""
    points: list[Path] = []

    def mount(options: str) -> Path:
        point = tmp_path / f"disk{len(points)}"
        point.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)], capture_output=True
        )
        if done.returncode:
            pytest.skip(f"cannot mount a file system here: {done.stderr.decode().strip()}")
        points.append(point)
        return point

    yield mount
    for point in points:
        subprocess.run(["umount", str(point)], check=True)


def test_a_disk_that_is_too_small(mergelab: Command, mounted: Any, models: Models, tmp_path: Path) -> None:
    disk = mounted("size=40k")
    (error,) = refuse(mergelab, models.arguments(f"output={disk}/model"), tmp_path)
    for fragment in ("output:", f"{disk}/model needs", "41.0 kB are free", "output=DIR on another disk"):
        assert fragment in error, error


def test_a_disk_that_cannot_be_written(
    mergelab: Command, mounted: Any, models: Models, tmp_path: Path
) -> None:
    disk = mounted("ro")
    (error,) = refuse(mergelab, models.arguments(f"output={disk}/a/model"), tmp_path)
    assert f"output: no permission to write in {disk}" in error


def test_a_run_that_cannot_have_its_folder(mergelab: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    out = mergelab(folder=tmp_path / "file" / "run")
    assert out.status == 2
    (error,) = told(out)
    assert f"hydra.run.dir: cannot write {tmp_path}/file/run" in error and "Not a directory" in error


def test_nothing_was_done_to_the_tiny_family(family: Any) -> None:
    from mergelab.zoo.store import problems

    assert problems(family.root) == []
