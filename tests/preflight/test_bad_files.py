"""Wrong files and folders: each is said once, clearly, before anything is started or touched."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from broken_models import Models
from conftest import Command
from refusals import refuse, refused, told

Break = Callable[[Models], Any]
"""Breaks one thing."""

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def cut_to(size: int) -> Break:
    def cut(m: Models) -> None:
        file = m["math"] / "model.safetensors"
        file.write_bytes(file.read_bytes()[:size])

    return cut


def to_float8(m: Models) -> None:
    import torch

    m.tensors("math", lambda t: t.update({n: v.to(torch.float8_e4m3fn) for n, v in t.items()}))


def quantize(m: Models) -> None:
    """What GPTQ leaves of a projection, as far as a header shows it."""
    import torch

    name = "model.layers.0.self_attn.q_proj"
    scales = torch.zeros(1, 32, dtype=torch.float16)
    packed = {"qweight": torch.zeros(4, 32, dtype=torch.int32), "scales": scales}
    m.tensors("math", lambda t: t.pop(f"{name}.weight"))
    m.tensors("math", lambda t: t.update({f"{name}.{n}": p for n, p in packed.items()}))
    m.config("math", quantization_config={"quant_method": "gptq", "bits": 4})


def leave_the_single_file(m: Models) -> None:
    """Shards and their index beside the file from before."""
    whole = (m["math"] / "model.safetensors").read_bytes()
    m.shard("math")
    (m["math"] / "model.safetensors").write_bytes(whole)


def untie_all_but_math(m: Models) -> None:
    for name in ("base", "math", "physics"):
        m.config(name, tie_word_embeddings=False)
        if name != "math":
            m.add_tensor(name, "lm_head.weight", like="model.embed_tokens.weight")


def leave_norm_out(m: Models) -> None:
    """The default of transformers, 1e-6, against what the others say."""
    for name, value in (("base", 1e-5), ("math", None), ("physics", 1e-5)):
        m.config(name, rms_norm_eps=value)


def shorten_norm(m: Models) -> None:
    m.tensors("math", lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:16].clone()}))


def move_tensor_in_index(m: Models) -> None:
    m.shard("math")
    m.index("math", **{"model.norm.weight": FIRST})


def leave_old_index(m: Models) -> None:
    whole = (m["math"] / "model.safetensors").read_bytes()
    m.shard("math")
    m.remove("math", SECOND)
    (m["math"] / "model.safetensors").write_bytes(whole)


def leave_out_of_index(m: Models) -> None:
    m.shard("math")
    index = json.loads((m["math"] / "model.safetensors.index.json").read_text(encoding="utf-8"))
    del index["weight_map"]["model.norm.weight"]
    m.text("math", "model.safetensors.index.json", json.dumps(index))


def lose_shard(m: Models) -> None:
    m.shard("math")
    m.remove("math", SECOND)


def empty_index(m: Models) -> None:
    m.shard("math")
    m.text("math", "model.safetensors.index.json", "{}")


def pickle(m: Models) -> None:
    m.remove("math", "*.safetensors")
    m.text("math", "pytorch_model.bin", "x")


FILES: list[tuple[str, Break, list[str]]] = [
    ("no config.json", lambda m: m.remove("math", "config.json"), ["in/math has no config.json"]),
    ("config.json cut short", lambda m: m.text("math", "config.json", '{"a": '),
     ["math/config.json is not JSON", "line 1", "Fetch it again"]),
    ("config.json is a list", lambda m: m.text("math", "config.json", "[]"),
     ["math/config.json", "architecture"]),
    ("config.json is a folder", lambda m: m.folder_instead("math", "config.json"),
     ["cannot read", "config.json: Is a directory"]),
    ("no architecture", lambda m: m.config("math", architectures=None), ["math/config.json", "architecture"]),
    ("quantized", quantize, ["quantization_config (gptq)", "q_proj.qweight", "unquantized"]),
    ("two sets of weights", leave_the_single_file,
     ["two sets of weights", "those of model.safetensors.index.json", "Move model.safetensors elsewhere"]),
    ("an adapter beside the weights", lambda m: m.text("math", "adapter_config.json", "{}"),
     ["adapter_config.json beside its weights", "a folder of their own"]),
    ("float8", to_float8, ["F8_E4M3", "unquantized"]),
    ("cut short", cut_to(40_000),
     ["math/model.safetensors is damaged or truncated", "40,000 bytes", "Fetch it again"]),
    ("half a header", cut_to(20), ["math/model.safetensors is damaged", "20 bytes"]),
    ("empty file", cut_to(0), ["math/model.safetensors is damaged", "0 bytes"]),
    ("no safetensors at all", lambda m: m.text("math", "model.safetensors", "<html>404 not found</html>"),
     ["math/model.safetensors is damaged"]),
    ("a folder of weights", lambda m: m.folder_instead("math", "model.safetensors"),
     ["cannot read", "math/model.safetensors"]),
    ("no weights", lambda m: m.remove("math", "model.safetensors"), ["in/math has no model.safetensors"]),
    ("pickled", pickle, ["pickled", "Convert"]),
    ("missing shard", lose_shard, [f"math/{SECOND} does not exist", "index", "Fetch it again"]),
    ("an older index", leave_old_index,
     [f"math/{SECOND} does not exist", "Move model.safetensors.index.json elsewhere"]),
    ("index names another shard", move_tensor_in_index, [f"math/{FIRST} lacks model.norm.weight"]),
    ("index without a tensor", leave_out_of_index,
     ["the index in", "does not list model.norm.weight, which its shards hold", "`save_pretrained`"]),
    ("index without a map", empty_index, ["index.json has no weight_map"]),
    ("missing tensor", lambda m: m.tensors("math", lambda t: t.pop("model.norm.weight")),
     ["in/math lacks model.norm.weight"]),
    ("missing head", untie_all_but_math, ["in/math lacks lm_head.weight"]),
    ("extra tensor", lambda m: m.add_tensor("math", "model.extra", like="model.norm.weight"),
     ["model.extra", "left out", "allow=[extra-tensor]"]),
    ("another architecture", lambda m: m.again("math", "llama"), ["LlamaForCausalLM", "Qwen2ForCausalLM"]),
    ("another width", lambda m: m.again("math", hidden_size=64), ["hidden_size is 64, the base's is 32"]),
    ("another inner width", lambda m: m.again("math", intermediate_size=56),
     ["intermediate_size is 56, the base's is 48"]),
    ("another depth", lambda m: m.again("math", num_hidden_layers=2),
     ["num_hidden_layers is 2, the base's is 3"]),
    ("shapes unlike config.json", shorten_norm, ["model.norm.weight is [16], but by config.json it is [32]"]),
    ("other heads, same shapes",
     lambda m: m.config("math", num_attention_heads=2, num_key_value_heads=1, head_dim=16),
     ["num_attention_heads is 2, the base's is 4", "head_dim is 16", "allow=[heads]"]),
    ("rope_theta", lambda m: m.config("math", rope_parameters=None, rope_theta=5e5),
     ["rope_theta=500000", "math/config.json", "allow=[rope]"]),
    ("rope_parameters", lambda m: m.config("math", rope_parameters={"rope_theta": 777.0}),
     ["rope_theta=777", "allow=[rope]"]),
    ("rope scaling", lambda m: m.config("math", rope_scaling={"type": "yarn", "factor": 4}),
     ["rope_type=yarn", "factor=4"]),
    ("norm", lambda m: m.config("math", rms_norm_eps=1e-5),
     ["rms_norm_eps is 1e-05, the base's is 1e-06", "allow=[norm]"]),
    ("norm left out", leave_norm_out, ["rms_norm_eps is 1e-06, the base's is 1e-05"]),
    ("activation", lambda m: m.config("math", hidden_act="gelu"), ["hidden_act is gelu, the base's is silu"]),
    ("vocabulary", lambda m: m.again("math", vocab_size=320),
     ["320 rows, the base's has 304", "model.tokenizer=union"]),
    ("tokenizer at equal size", lambda m: m.swap_two_ids("math"),
     ["2 ids mean other tokens", "model.tokenizer=union"]),
    ("tokenizer broken", lambda m: m.text("math", "tokenizer.json", "{"),
     ["math/tokenizer.json is not JSON"]),
    ("tokenizer of another kind", lambda m: m.text("math", "tokenizer.json", "[1]"),
     ["math/tokenizer.json does not describe a tokenizer"]),
    ("tokenizer settings broken", lambda m: m.text("math", "tokenizer_config.json", "{"),
     ["math/tokenizer_config.json is not JSON"]),
    ("tied and untied", lambda m: m.again("math", tied=False),
     ["tie_word_embeddings is False, the base's is True"]),
]  # fmt: skip


def renamed(m: Models) -> list[str]:
    m["math"].rename(m.folder / "a+b")
    return [a.replace(str(m["math"]), f"{m.folder}/a+b") for a in m.arguments()]


def without_tokenizer(name: str, *more: str, method: str = "ties") -> Callable[[Models], list[str]]:
    def arguments(m: Models) -> list[str]:
        m.remove(name, "*token*")
        return m.arguments(*more, method=method)

    return arguments


def output(name: str, **files: str) -> Callable[[Models], list[str]]:
    """Write there, where these files are."""

    def arguments(m: Models) -> list[str]:
        for file, text in files.items():
            (m.folder / file).parent.mkdir(exist_ok=True)
            (m.folder / file).write_text(text, encoding="utf-8")
        return m.arguments(f"output={m.folder}/{name}")

    return arguments


Arguments = Callable[[Models], list[str]]

FOLDERS: list[tuple[str, Arguments, list[str]]] = [
    ("no tokenizer to lend", without_tokenizer("base", "eval=skills"),
     ["model.base", "in/base has no tokenizer", "is measured", "eval=none"]),
    ("no tokenizer to lend, first", without_tokenizer("math", "eval=skills", method="slerp"),
     ["experts.math", "in/math has no tokenizer", "is measured", "Copy"]),
    ("no tokenizer to build from", without_tokenizer("base", "model.tokenizer=union"),
     ["model.base", "in/base has no tokenizer", "a tokenizer is to be built from it"]),
    ("no tokenizer for a template", without_tokenizer("base", "model.chat_template=chatml"),
     ["model.base", "in/base has no tokenizer", "a chat template needs one"]),
    ("no tokenizer to measure with", without_tokenizer("math", "eval=skills"),
     ["experts.math", "in/math has no tokenizer", "eval.baselines=false"]),
    ("plus in a path", renamed, ["experts.math", "a+b", "Rename"]),
    ("no adapter", lambda m: [*m.arguments(), f"experts.math.path='{m['math']}+{m['physics']}'"],
     ["experts.math", "in/physics has no adapter_config.json"]),
    ("output is an input", output("math"), ["output", "in/math is the folder of math", "overwritten"]),
    ("output inside an input", output("base/new"), ["output", "in/base/new", "folder of base"]),
    ("output not empty", output("out", **{"out/thesis.tex": "all of it"}),
     ["output", "in/out is not empty", "not there yet"]),
    ("output a file", output("out", out="x"), ["output", "in/out is not a folder"]),
    ("output under a file", output("out/a/b", out="x"), ["output", "in/out is not a folder"]),
]  # fmt: skip

MERGEKIT: list[tuple[str, Arguments, list[str]]] = [
    ("no path", lambda m: ["method=mergekit"], ["method.path", "method.path=my.yaml"]),
    ("missing file", lambda m: ["method=mergekit", "method.path=/nowhere.yaml"],
     ["method.path", "/nowhere.yaml", "No such file"]),
    ("a folder", lambda m: ["method=mergekit", "method.path=/etc"], ["method.path", "/etc", "directory"]),
    ("not YAML", lambda m: m.yaml("a: [1,"), ["method.path", "my.yaml is not YAML", "line"]),
    ("not a mapping", lambda m: m.yaml("- ties"), ["my.yaml", "not a mapping"]),
    ("empty", lambda m: m.yaml(""), ["my.yaml", "not a mapping"]),
    ("no method", lambda m: m.recipe(without="merge_method"),
     ["my.yaml: merge_method", "name a merge method"]),
    ("method", lambda m: m.recipe({"merge_method": "dare-ties"}),
     ["my.yaml: merge_method", "'dare-ties'", "Did you mean 'dare_ties'?"]),
    ("unknown key", lambda m: m.recipe({"parmeters": {}}),
     ["my.yaml: parmeters", "Did you mean 'parameters'?"]),
    ("misspelt parameter", lambda m: m.recipe({"parameters": {"densty": 0.5}}),
     ["my.yaml: parameters.densty", "ties has no parameter 'densty'", "Did you mean 'density'?",
      "allow=[unknown-key]"]),
    ("parameter out of range", lambda m: m.recipe({"parameters": {"lambda": float("nan")}}),
     ["my.yaml: parameters.lambda", "nan"]),
    ("parameter of a model", lambda m: m.recipe({"models": [m.model("math", density=5)]}),
     ["my.yaml: models[0].parameters.density", "5", "(0, 1]"]),
    ("no weight", lambda m: m.recipe({"models": [{"model": str(m["math"])}]}),
     ["my.yaml: parameters.weight", "ties needs weight", "of ", "in/math"]),
    ("no setting", lambda m: m.recipe({"parameters": {"lambda": {"mlp": {}}}}),
     ["my.yaml: parameters.lambda", "not a setting"]),
    ("condition misspelt", lambda m: m.recipe({"parameters": {"lambda": [{"fitler": "mlp", "value": 1}]}}),
     ["my.yaml: parameters.lambda[0].fitler", "Did you mean 'filter'?", "[unknown-key]"]),
    ("both forms", lambda m: m.recipe({"slices": [m.slice()]}),
     ["my.yaml", "needs one of models, slices, modules", "models and slices"]),
    ("neither form", lambda m: m.recipe(without="models"), ["my.yaml", "none of them"]),
    ("models no list", lambda m: m.recipe({"models": "math"}), ["my.yaml: models", "list"]),
    ("model without a name", lambda m: m.recipe({"models": [{"weight": 1}]}),
     ["my.yaml: models[0]", "`model: PATH`"]),
    ("missing model", lambda m: m.recipe({"models": [m.model("math") | {"model": "/nowhere/math"}]}),
     ["my.yaml: /nowhere/math", "does not exist"]),
    ("a model twice", lambda m: m.recipe({"models": [m.model("math")] * 2}),
     ["my.yaml: models", "in/math takes part twice"]),
    ("no base", lambda m: m.recipe(without="base_model"), ["my.yaml: models", "ties needs a base model"]),
    ("dtype", lambda m: m.recipe({"dtype": "bf16"}), ["my.yaml: dtype", "'bf16'", "bfloat16"]),
    ("base_model no text", lambda m: m.recipe({"base_model": 3}),
     ["my.yaml: base_model", "3 does not name a model"]),
    ("chat template", lambda m: m.recipe({"chat_template": "lama3"}),
     ["my.yaml: chat_template", "'lama3'", "Did you mean 'llama3'?"]),
    ("two tokenizers", lambda m: m.recipe({"tokenizer": {"source": "union"}, "tokenizer_source": "base"}),
     ["my.yaml: tokenizer", "tokenizer_source", "keep one"]),
    ("tokenizer of nobody", lambda m: m.recipe({"tokenizer_source": "unionn"}),
     ["my.yaml: tokenizer_source", "'unionn'", "union, base"]),
    ("layers reversed", lambda m: m.slices(([2, 0], [2, 0])),
     ["my.yaml: slices[0].sources[0].layer_range, ", "slices[0].sources[1].layer_range: ",
      "[2, 0] holds no layers"]),
    ("layers that are not there", lambda m: m.slices(([0, 3], [1, 4])),
     ["my.yaml: slices[0]", "[1, 4] of", "in/math, which has 3 layers"]),
    ("unequal lengths", lambda m: m.slices(([0, 2], [0, 3])),
     ["my.yaml: slices[0]", "[2, 3] layers", "equal"]),
    ("layers no numbers", lambda m: m.slices(([0, 3], ["all", 3])),
     ["my.yaml: slices[0].sources[1].layer_range", "['all', 3]"]),
    ("unknown module",
     lambda m: m.recipe({"modules": {"text": {"models": [m.model("math")]}}}, without="models"),
     ["my.yaml: modules.text", "no module 'text'", "default"]),
    ("setting of the file", lambda m: [*m.recipe(), "hardware.dtype=float16"],
     ["hardware.dtype=float16", "whose file decides it"]),
    ("experts beside the file", lambda m: [*m.recipe(), "experts=stem"],
     ["experts=stem", "whose file decides it"]),
]  # fmt: skip


def check(errors: list[str], said: list[str]) -> None:
    assert len(errors) == 1, errors
    for fragment in said:
        assert fragment in errors[0], errors[0]


@pytest.mark.parametrize(("damage", "said"), [pytest.param(d, s, id=n) for n, d, s in FILES])
def test_a_damaged_or_foreign_model(damage: Break, said: list[str], tmp_path: Path, models: Models) -> None:
    damage(models)
    check(refused(models.arguments(), tmp_path), ["experts.math: ", *said])


@pytest.mark.parametrize(("arguments", "said"), [pytest.param(a, s, id=n) for n, a, s in FOLDERS + MERGEKIT])
def test_a_wrong_folder_or_file(
    arguments: Arguments, said: list[str], tmp_path: Path, models: Models
) -> None:
    check(refused(arguments(models), tmp_path), said)


@pytest.mark.parametrize("damage", [pytest.param(d, id=n) for n, d, _ in FILES[::8]])
def test_the_command_says_the_same_of_a_damaged_or_foreign_model(
    damage: Break, mergelab: Command, tmp_path: Path, models: Models
) -> None:
    damage(models)
    assert refuse(mergelab, models.arguments(), tmp_path) == refused(models.arguments(), tmp_path)


@pytest.mark.parametrize("arguments", [pytest.param(a, id=n) for n, a, _ in (FOLDERS + MERGEKIT)[::8]])
def test_the_command_says_the_same_of_a_wrong_folder_or_file(
    arguments: Arguments, mergelab: Command, tmp_path: Path, models: Models
) -> None:
    typed = arguments(models)
    assert refuse(mergelab, typed, tmp_path) == refused(typed, tmp_path)


def test_the_sound_models_are_accepted(mergelab: Command, models: Models) -> None:
    """Every row above breaks one thing of these; none would be worth much if they were refused too."""
    for arguments in (models.arguments(), models.recipe(), models.slices(([0, 3], [0, 3]))):
        out = mergelab(*arguments)
        assert out.status == 0, out.err
        assert out.err == ""


def test_everything_is_said_at_once(mergelab: Command, models: Models, tmp_path: Path) -> None:
    models.config("math", rms_norm_eps=1e-3, rope_parameters={"rope_theta": 5.0})
    models.remove("physics", "model.safetensors")
    wrong = [
        "seed=-1", "hardware.dtype=int4", "experts.math.density=7", "experts.physics.weight=nan",
        "method.parameters.lamda=1", "experts.chemistry.weight=1", f"output={models['base']}",
        "tracking.mode=never", "eval.limit=0", "eval=perplexity",
    ]  # fmt: skip
    errors = refuse(mergelab, models.arguments(*wrong), tmp_path)
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
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", point], capture_output=True)
        if done.returncode:
            pytest.skip(f"cannot mount a file system here: {done.stderr.decode().strip()}")
        points.append(point)
        return point

    yield mount
    for point in points:
        # Lazily, for the run's log is open there until the next run begins.
        subprocess.run(["umount", "--lazy", str(point)], check=True)


def test_a_disk_that_is_too_small(mergelab: Command, mounted: Any, models: Models, tmp_path: Path) -> None:
    disk = mounted("size=40k")
    errors = refuse(mergelab, models.arguments(f"output={disk}/model"), tmp_path)
    check(errors, ["output:", f"{disk}/model needs", "41.0 kB are free", "output=DIR on another disk"])


def test_a_disk_that_cannot_be_written(
    mergelab: Command, mounted: Any, models: Models, tmp_path: Path
) -> None:
    disk = mounted("ro")
    errors = refuse(mergelab, models.arguments(f"output={disk}/a/model"), tmp_path)
    check(errors, [f"output: no permission to write in {disk}"])


def test_a_run_that_cannot_have_its_folder(mergelab: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    out = mergelab(folder=tmp_path / "file" / "run")
    assert out.status == 2
    check(told(out), [f"hydra.run.dir: cannot write {tmp_path}/file/run", "Not a directory"])


@pytest.mark.parametrize("size", ["4k", "20k"])
def test_a_run_whose_folder_fills_up_at_the_start(
    mergelab: Command, mounted: Any, models: Models, size: str
) -> None:
    out = mergelab(*models.arguments(), folder=mounted(f"size={size}") / "run")
    assert out.status == 2
    check(told(out), ["No space left on device"])


def test_a_home_that_cannot_be_written(
    mergelab: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    monkeypatch.setenv("MERGELAB_HOME", str(tmp_path / "file" / "home"))
    check(refuse(mergelab, [], tmp_path), [f"{tmp_path}/file/home", "set MERGELAB_HOME to a writable folder"])
