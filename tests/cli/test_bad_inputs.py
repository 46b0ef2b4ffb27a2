"""Wrong settings: each is said once, clearly, before anything is started or touched."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from refusals import refuse, refused

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
    ("steps out of order", "job.steps=[preflight,verify,merge]", ["job.steps", "'verify'", "after 'merge'"]),
    ("code to allow", "allow=[ropes]", ["allow", "'ropes'", "Did you mean 'rope'?"]),
    ("zoo role", "model.base.path=zoo:bass", ["model.base", "'bass'", "choose base"]),
    ("a run's own name", "tracking.name=mlflow", ["tracking.name", "'mlflow'", "wandb"]),
    ("tracking mode", "tracking.mode=sometimes", ["tracking.mode", "'sometimes'", "offline"]),
    ("tracking timeout", "tracking.timeout=-1", ["tracking.timeout", "-1", "above 0"]),
]  # fmt: skip

EXPERTS = [
    ("no role", "experts.chemistry.weight=1",
     ["experts.chemistry", "model=tiny", "math", "~experts.chemistry"]),
    ("misspelt role", "experts.phisics.weight=1", ["experts.phisics", "Did you mean 'physics'?"]),
    ("nobody", "'~experts'", ["experts", "no expert", "experts=balanced"]),
    ("no folder", "experts.math.path=/nowhere/at/all", ["experts.math", "/nowhere/at/all does not exist"]),
    ("a file", "experts.math.path=/etc/hostname", ["experts.math", "/etc/hostname is a file"]),
    ("empty path", "experts.math.path=\"''\"", ["experts.math", "''", "neither a folder nor a hub id"]),
    ("no such name", "experts.math.path=\"'my model'\"", ["experts.math", "'my model'", "hub id such as"]),
    ("path too long", f"experts.math.path=/{'x' * 300}", ["experts.math", "xxx does not exist"]),
    ("nobody's home", "experts.math.path=\"'~nobody-here/x'\"",
     ["experts.math", "~nobody-here/x does not exist"]),
    ("twice", "experts.math.path=zoo:physics",
     ["experts.physics", "zoo:physics", "experts.math", "~experts.physics"]),
    ("the base itself", "experts.math.path=zoo:base", ["experts.math", "zoo:base", "model.base"]),
    ("revision of a folder", "experts.math.revision=abc",
     ["experts.math", "'abc'", "Leave the revision out"]),
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
    ("filter of nothing", "experts.math.weight={self_atn:1,*:0}",
     ["experts.math.weight", "'self_atn'", "Did you mean 'self_attn'?"]),
    ("rest not last", "experts.math.weight={*:0.5,mlp:1}", ["experts.math.weight", '"*"', "last"]),
    ("no rest", "experts.math.weight={mlp:1}",
     ["experts.math.weight", "ties needs weight", "embed_tokens", '"*"']),
    ("no effect", "method=linear experts.math.density=0.5",
     ["experts.math.density=0.5", "linear takes no density", "[no-effect]"]),
    ("density of slerp", "method=slerp experts=stem experts.math.weight=1",
     ["experts.math.weight=1", "slerp takes no weight"]),
    ("weight for all", "method.parameters.weight=0.5", ["method.parameters.weight", "experts.ROLE.weight"]),
]  # fmt: skip

METHODS = [
    ("name", "method.name=dare-ties", ["method.name", "'dare-ties'", "Did you mean 'dare_ties'?", "slerp"]),
    ("base", "method.base=middle", ["method.base", "'middle'", "model, first, none"]),
    ("no base", "method.base=none", ["ties needs a base model", "method.base=model"]),
    ("base of linear", "method=linear method.base=model", ["method.base", "linear", "method.base=first"]),
    ("unknown parameter", "method.parameters.lamda=1",
     ["method.parameters.lamda", "ties", "Did you mean 'lambda'?"]),
    ("parameter of another", "method.parameters.t=0.5",
     ["method.parameters.t", "ties has no parameter 't'", "lambda"]),
    ("for each model", "experts.math.parameters.lambda=2",
     ["experts.math.parameters.lambda", "once", "method.parameters.lambda"]),
    ("number for a switch", "method.parameters.normalize=3",
     ["method.parameters.normalize", "3 is not a boolean"]),
    ("lambda nan", "method.parameters.lambda=nan", ["method.parameters.lambda", "nan", "finite"]),
    ("lambda text", "method.parameters.lambda=large",
     ["method.parameters.lambda", "'large' is not a number"]),
    ("t above", "method=slerp experts=stem method.parameters.t=1.5",
     ["method.parameters.t", "1.5", "[0, 1]"]),
    ("t unset", "method=slerp experts=stem method.parameters.t=null",
     ["method.parameters.t", "slerp needs t"]),
    ("t without rest", "method=slerp experts=stem method.parameters.t={mlp:0.5}",
     ["method.parameters.t", "nothing sets it", '"*"']),
    ("t of nearswap", "method=nearswap experts=stem method.parameters.t=0",
     ["method.parameters.t", "above 0"]),
    ("select_topk", "method=sce method.parameters.select_topk=0",
     ["method.parameters.select_topk", "(0, 1]"]),
    ("gamma", "method=breadcrumbs method.parameters.gamma=1", ["method.parameters.gamma", "[0, 1)"]),
    ("gamma and density", "method=breadcrumbs method.parameters.gamma=0.6",
     ["experts.math.density, experts.physics.density", "0.5", "0.6", "at most 1"]),
    ("epsilon", "method=della method.parameters.epsilon=-0.1", ["method.parameters.epsilon", "-0.1"]),
    ("epsilon and density", "method=della experts.math.density=0.1",
     ["experts.math.density", "0.1 ± 0.15", "method.parameters.epsilon"]),
    ("whole number", "method=karcher method.parameters.max_iter=2.5",
     ["method.parameters.max_iter", "2.5", "whole number"]),
    ("whole gradient", "method=karcher method.parameters.max_iter=[1,10]",
     ["method.parameters.max_iter", "[1, 10]", "no gradient"]),
    ("tolerance", "method=karcher method.parameters.tol=0", ["method.parameters.tol", "above 0"]),
    ("zero sum", "method=linear experts=stem experts.math.weight=-0.6",
     ["experts.math.weight, experts.physics.weight", "-0.6, 0.6 sum to 0", "normalize=false"]),
    ("zero sum in a layer", "method=linear experts=stem experts.math.weight=[1,-0.6]",
     ["sum to 0 at model.layers.1.", "normalize=false"]),
    ("four for a pair", "method=slerp",
     ["experts", "slerp takes exactly 2 models; here are 4", "experts=math_physics"]),
    ("four besides the base", "method=nuslerp",
     ["nuslerp takes exactly 2 models besides the base; here are 4"]),
    ("one for a stock", "method=model_stock experts=single_math",
     ["at least 2 models besides the base; here is 1", "experts=balanced"]),
    ("two to pass through", "method=passthrough experts=stem",
     ["passthrough takes exactly 1 model; here are 2", "experts=single_math"]),
    ("path of another", "method.path=my.yaml",
     ["method.path", "no effect unless method=mergekit", "Set method=mergekit"]),
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
    ("task", "eval=lm_eval eval.tasks=[tiny_mth]",
     ["eval.tasks", "no lm_eval task 'tiny_mth'", "Did you mean 'tiny_math'?"]),
    ("no task", "eval=lm_eval", ["eval.tasks", "empty"]),
    ("task of a skill", "model.skills.math.validation=tiny_mth",
     ["model.skills.math.validation", "tiny_mth", "Did you mean 'tiny_math'?"]),
    ("metric", "eval=lm_eval eval.tasks=[tiny_math] eval.metrics.tiny_math=elo",
     ["eval.metrics.tiny_math", "'elo'", "exact_match"]),
    ("share of nobody", "eval.shares.poetry=2", ["eval.shares.poetry", "measured are math"]),
    ("limit", "eval.limit=0", ["eval.limit", "0 is neither"]),
    ("limit between", "eval.limit=1.5", ["eval.limit", "1.5 is neither"]),
    ("batch size", "eval.batch_size=0", ["eval.batch_size", "at least 1"]),
    ("no text", "eval=perplexity", ["eval.text", "not set", "my.txt"]),
    ("missing text", "eval=perplexity eval.text=/nowhere.txt", ["eval.text", "/nowhere.txt", "No such file"]),
    ("empty text", "eval=perplexity eval.text=/dev/null", ["eval.text", "/dev/null holds no text"]),
    ("check nothing", "job=check check.path=/nowhere", ["check.path", "/nowhere"]),
    ("check in vain", "check.path=/tmp", ["check.path", "job=merge does not look at it", "job=check"]),
    ("evaluate nothing", "job=evaluate evaluate.path=/nowhere",
     ["evaluate.path", "/nowhere is not a folder"]),
    ("evaluate no model", "job=evaluate evaluate.path=/etc", ["evaluate.path", "/etc is neither a model's"]),
]  # fmt: skip

ALL = {"composition": COMPOSITION, "experts": EXPERTS, "method": METHODS, "elsewhere": ELSEWHERE}
"""For each: what is wrong, the command line, and what the one message must contain."""

WHOLE = ("seed below", "misspelt key", "twice", "no rest", "base", "four for a pair", "device", "no task")
"""Those that are typed as whole commands, too."""


def arguments(line: str) -> list[str]:
    method = [] if "method=" in line else ["method=ties"]
    return [*method, *shlex.split(line)]


@pytest.mark.parametrize(
    ("line", "said"),
    [pytest.param(x, said, id=f"{group}: {name}") for group, rows in ALL.items() for name, x, said in rows],
)
def test_a_wrong_setting(line: str, said: list[str], tmp_path: Path, family: Any) -> None:
    errors = refused(arguments(line), tmp_path)
    assert len(errors) == 1, errors
    for fragment in said:
        assert fragment in errors[0], errors[0]


@pytest.mark.parametrize(
    "line", [pytest.param(x, id=name) for rows in ALL.values() for name, x, _ in rows if name in WHOLE]
)
def test_the_command_says_the_same_and_touches_nothing(
    line: str, mergelab: Command, tmp_path: Path, family: Any
) -> None:
    assert refuse(mergelab, arguments(line), tmp_path) == refused(arguments(line), tmp_path)


def test_nothing_was_done_to_the_tiny_family(family: Any) -> None:
    from mergelab.zoo.store import problems

    assert problems(family.root) == []
