"""What a model brings besides numbers: Python code of its own, and pickles. Nothing of it runs unasked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_models import Models
from conftest import Command
from refusals import refuse, told
from safetensors.torch import load_file

from mergelab.core import hashing
from mergelab.core.errors import StepError
from mergelab.evaluation import load
from mergelab.models import checkpoint, pickles, remote_code
from mergelab.schema import Hardware

CONFIGURATION = """\
import os
from transformers import Qwen2Config

with open(os.environ["CODE_RAN"], "a") as f:
    f.write("configuration\\n")


class StrangeConfig(Qwen2Config):
    model_type = "strange"
"""

MODELING = """\
import os
from transformers import Qwen2ForCausalLM
from .configuration_strange import StrangeConfig
from .extras_strange import SCALE

with open(os.environ["CODE_RAN"], "a") as f:
    f.write("modeling\\n")


class StrangeForCausalLM(Qwen2ForCausalLM):
    config_class = StrangeConfig

    def forward(self, *args, **options):
        out = super().forward(*args, **options)
        out.logits = out.logits * SCALE
        return out
"""

TOKENIZATION = """\
import os
from transformers import PreTrainedTokenizerFast

with open(os.environ["CODE_RAN"], "a") as f:
    f.write("tokenization\\n")


class OddTokenizer(PreTrainedTokenizerFast):
    pass
"""

FILES = ["configuration_strange.py", "modeling_strange.py", "extras_strange.py"]
AUTO_MAP = {
    "AutoConfig": "configuration_strange.StrangeConfig",
    "AutoModelForCausalLM": "modeling_strange.StrangeForCausalLM",
}
TRUSTED = "model.trust_remote_code=true"


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """Which of the code has run."""
    file = tmp_path / "ran.txt"
    monkeypatch.setenv("CODE_RAN", str(file))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return lambda: set(file.read_text().split()) if file.exists() else set()


@pytest.fixture
def strange(models: Models) -> Models:
    """A base and two experts of an architecture that only their own code knows."""
    for name in ("base", "math", "physics"):
        models.config(name, model_type="strange", architectures=["StrangeForCausalLM"], auto_map=AUTO_MAP)
        models.text(name, "configuration_strange.py", CONFIGURATION)
        models.text(name, "modeling_strange.py", MODELING)
        models.text(name, "extras_strange.py", "SCALE = 2.0\n")
    return models


@pytest.fixture
def odd(models: Models) -> Models:
    """Models whose tokenizer is code of their own."""
    for name in ("base", "math", "physics"):
        file = models[name] / "tokenizer_config.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        content |= {"tokenizer_class": "OddTokenizer",
                    "auto_map": {"AutoTokenizer": [None, "tokenization_odd.OddTokenizer"]}}  # fmt: skip
        file.write_text(json.dumps(content), encoding="utf-8")
        models.text(name, "tokenization_odd.py", TOKENIZATION)
    return models


# ---------------------------------------------------------------- code


def test_code_of_a_model_is_refused_by_name_and_does_not_run(
    mergelab: Command, strange: Models, ran: Callable[[], set[str]], tmp_path: Path
) -> None:
    errors = refuse(mergelab, strange.arguments(), tmp_path)
    assert len(errors) == 3
    assert errors[1].startswith(
        f"experts.math: {strange['math']} is loaded by Python code that comes with it"
    )
    for word in (*FILES, "everything that you can do", TRUSTED):
        assert word in errors[1]
    with pytest.raises(StepError, match=r"runs only with model\.trust_remote_code=true"):
        load(strange["base"], Hardware())
    looked = mergelab("job=check", f"check.path={strange['base']}")
    assert looked.status != 0
    assert "modeling_strange.py" in looked.err
    assert TRUSTED in looked.err
    measured = mergelab("job=evaluate", f"evaluate.path={strange['base']}", "eval.baselines=false")
    assert measured.status == 2
    assert TRUSTED in measured.err
    assert ran() == set()


def test_code_that_is_trusted_merges_checks_is_measured_and_goes_along(
    mergelab: Command, strange: Models, ran: Callable[[], set[str]], tmp_path: Path
) -> None:
    arguments = [a for a in strange.arguments(TRUSTED, method="linear") if a != "eval=none"]
    out = mergelab(*arguments, "eval.limit=2")
    assert out.status == 0, out.err
    assert ran() == {"configuration", "modeling"}
    folder = out.folder / "model"
    for name in FILES:
        assert (folder / name).read_text() == (strange["base"] / name).read_text()
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    want = (
        sum(load_file(strange[n] / "model.safetensors")["model.norm.weight"] for n in ("math", "physics")) / 2
    )
    assert torch.allclose(load_file(folder / "model.safetensors")["model.norm.weight"], want)
    assert set(out.result["metrics"]) == {"merged", "base", "math", "physics"}
    assert out.result["engine"] == "mergekit"

    model, _ = load(folder, Hardware(), trust_remote_code=True)
    assert type(model).__name__ == "StrangeForCausalLM"
    plain = shutil.copytree(folder, tmp_path / "plain")
    config = json.loads((plain / "config.json").read_text())
    config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (plain / "config.json").write_text(json.dumps(config))
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        assert torch.allclose(model(ids).logits, 2 * load(plain, Hardware())[0](ids).logits), "its code ran"
    checked = mergelab("job=check", f"check.path={folder}", TRUSTED)
    assert checked.status == 0, checked.err


def test_layers_of_such_a_model_can_be_stacked(
    mergelab: Command, strange: Models, ran: Callable[[], set[str]], tmp_path: Path
) -> None:
    slices = [{"sources": [{"model": str(strange[n]), "layer_range": r}]}
              for n, r in (("math", [0, 2]), ("physics", [1, 3]))]  # fmt: skip
    file = tmp_path / "stack.yaml"
    recipe = {"merge_method": "passthrough", "base_model": str(strange["base"]), "slices": slices}
    file.write_text(json.dumps(recipe | {"dtype": "float32"}))
    out = mergelab("method=mergekit", f"method.path={file}", "eval=none", TRUSTED)
    assert out.status == 0, out.err
    model, _ = load(out.folder / "model", Hardware(), trust_remote_code=True)
    assert (type(model).__name__, len(model.model.layers)) == ("StrangeForCausalLM", 4)


def test_code_of_a_tokenizer_needs_leave_as_well(
    mergelab: Command, odd: Models, ran: Callable[[], set[str]], tmp_path: Path
) -> None:
    errors = refuse(mergelab, odd.arguments(), tmp_path)
    assert len(errors) == 3
    assert "tokenization_odd.py" in errors[0]
    assert ran() == set()
    out = mergelab(*odd.arguments(TRUSTED, "model.tokenizer=union", method="linear"))
    assert out.status == 0, out.err
    assert ran() == {"tokenization"}
    _, tokenizer = load(out.folder / "model", Hardware(), trust_remote_code=True)
    assert type(tokenizer).__name__ == "OddTokenizer"
    assert tokenizer("1+1=").input_ids


def test_where_transformers_has_the_architecture_its_own_code_is_used_in_silence(
    mergelab: Command, strange: Models, ran: Callable[[], set[str]]
) -> None:
    for name in ("base", "math", "physics"):
        strange.config(name, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    out = mergelab(*strange.arguments())
    assert out.status == 0, out.err
    assert "code" not in out.out + out.err
    assert ran() == set()
    assert not list((out.folder / "model").glob("*.py"))
    needless = mergelab(*strange.arguments(TRUSTED))
    assert needless.status == 2
    (error,) = told(needless)
    assert error.startswith(
        "model.trust_remote_code: it has no effect because transformers has code of its own"
    )
    assert ran() == set()


def lose_a_file(m: Models) -> None:
    m.remove("math", "extras_strange.py")


def name_another_repository(m: Models) -> None:
    m.config("math", auto_map={**AUTO_MAP, "AutoConfig": "someone/else--configuration_far.FarConfig"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lose_a_file, ["experts.math: ", "lacks extras_strange.py", "Copy or fetch it again"]),
        (name_another_repository,
         ["experts.math: ", "configuration_far.py of someone/else", "revision cannot be pinned", "auto_map"]),
    ],
    ids=["missing", "elsewhere"],
)  # fmt: skip
def test_code_that_is_not_in_the_folder_is_told_before_anything_runs(
    mergelab: Command, strange: Models, ran: Callable[[], set[str]], tmp_path: Path,
    change: Callable[[Models], None], words: list[str],
) -> None:  # fmt: skip
    change(strange)
    (error,) = refuse(mergelab, strange.arguments(TRUSTED), tmp_path)
    for word in words:
        assert word in error
    assert ran() == set()


def test_a_search_does_not_run_such_code_and_says_why(
    mergelab: Command, strange: Models, ran: Callable[[], set[str]], tmp_path: Path
) -> None:
    arguments = [a for a in strange.arguments(TRUSTED, method="linear") if a != "eval=none"]
    (error,) = refuse(mergelab, ["-m", "search=cma", *arguments], tmp_path)
    assert f"does not apply: {strange['base']} is loaded by code of its own" in error
    assert ran() == set()


def test_the_revision_that_was_read_is_named_and_code_is_part_of_what_a_model_is(
    strange: Models, tmp_path: Path
) -> None:
    commit = "c" * 40
    (finding,) = remote_code.check(strange["math"], "experts.math", allowed=False, commit=commit)
    assert finding.remedy.endswith(f"experts.math.revision={commit}")
    (strange["math"] / "custom_generate").mkdir()
    strange.text("math", "custom_generate/generate.py", "")
    assert remote_code.code(strange["math"]) == [*FILES, remote_code.GENERATE]
    before = hashing.file_hashes(strange["math"], tmp_path / "memo.json")
    strange.text("math", "extras_strange.py", "SCALE = 3.0\n")
    after = hashing.file_hashes(strange["math"], tmp_path / "memo.json")
    assert {n for n in before if before[n] != after[n]} == {"extras_strange.py"}


# ---------------------------------------------------------------- pickles


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def to_pickle(m: Models, name: str, *, legacy: bool = False, **more: Any) -> None:
    """One pytorch_model.bin in the place of a model's weights."""
    tensors = load_file(m[name] / "model.safetensors")
    m.remove(name, "*.safetensors")
    options = {"_use_new_zipfile_serialization": not legacy}
    torch.save({**tensors, **more}, m[name] / "pytorch_model.bin", **options)


def to_shards(m: Models, name: str) -> None:
    """Two shards and an index."""
    tensors = load_file(m[name] / "model.safetensors")
    m.remove(name, "*.safetensors")
    places = {n: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, n in enumerate(sorted(tensors))}
    for shard in set(places.values()):
        torch.save({n: tensors[n] for n, at in places.items() if at == shard}, m[name] / shard)
    m.text(name, "pytorch_model.bin.index.json", json.dumps({"metadata": {}, "weight_map": places}))


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_pickled_weights_merge_when_allowed_and_to_the_same_bits(mergelab: Command, models: Models) -> None:
    arguments = [*models.arguments(method="dare_ties"), "seed=5"]
    usual = mergelab(*arguments, "hardware.engine=mergekit")
    assert usual.status == 0, usual.err
    facts = {n: checkpoint.read(models[n], n).tensors for n in ("base", "math", "physics")}
    to_pickle(models, "base", legacy=True)
    to_pickle(models, "math")
    to_shards(models, "physics")
    for name, tensors in facts.items():
        read = checkpoint.read(models[name], name, pickled=True)
        assert read.findings == ()
        assert read.pickled
        assert {n: (t.dtype, t.shape) for n, t in read.tensors.items()} == {
            n: (t.dtype, t.shape) for n, t in tensors.items()
        }
        assert all(Path(t.file).is_file() for t in read.tensors.values())
    allowed = [a for a in arguments if a != "eval=none"] + ["allow=[pickled]", "eval.limit=2"]
    out = mergelab(*allowed)
    assert out.status == 0, out.err
    assert digest(out.folder / "model/model.safetensors") == digest(usual.folder / "model/model.safetensors")
    assert set(out.result["metrics"]) == {"merged", "base", "math", "physics"}
    files = {m["name"]: m["files"] for m in out.result["inputs"]}
    assert "pytorch_model.bin" in files["math"]
    shards = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    assert {n for n in files["physics"] if "pytorch" in n} == {*shards, "pytorch_model.bin.index.json"}
    plan = json.loads((out.folder / "plan.json").read_text())
    assert plan["engine"] == {"name": "mergekit", "why": f"the weights of {models['base']} are pickled"}
    read = json.loads((usual.folder / "plan.json").read_text())["estimate"]["read"]
    assert plan["estimate"]["read"] == read


def test_pickled_weights_are_not_looked_at_without_leave(
    mergelab: Command, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_pickle(models, "math")

    def opened(*args: Any, **options: Any) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(torch, "load", opened)
    (error,) = refuse(mergelab, models.arguments(), tmp_path)
    for word in ("experts.math: ", "can run code", "[pickled]", "Convert them", "allow=[pickled]"):
        assert word in error


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(
    mergelab: Command, models: Models, tmp_path: Path, legacy: bool
) -> None:
    mark = tmp_path / "pwned"
    to_pickle(models, "math", legacy=legacy, extra=Evil(mark))
    (error,) = refuse(mergelab, models.arguments("allow=[pickled]"), tmp_path)
    assert "experts.math: " in error
    assert f"{models['math']}/pytorch_model.bin is refused: reading it would call posix.system" in error
    with pytest.raises(StepError, match="damaged, or hold more than weights"):
        load(models["math"], Hardware())
    assert not mark.exists()
    torch.load(models["math"] / "pytorch_model.bin", weights_only=False)
    assert mark.exists(), "the file is as bad as it is meant to be"


def cut(m: Models) -> None:
    to_pickle(m, "math")
    file = m["math"] / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:30_000])


def lose_shard(m: Models) -> None:
    to_shards(m, "math")
    m.remove("math", "*-00002-of-00002.bin")


def to_text(m: Models) -> None:
    m.remove("math", "*.safetensors")
    m.text("math", "pytorch_model.bin", "a page that says that there is no such file")


def to_nest(m: Models) -> None:
    tensors = load_file(m["math"] / "model.safetensors")
    m.remove("math", "*.safetensors")
    torch.save({"state_dict": tensors}, m["math"] / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (cut, "it is damaged, truncated, or not a file of weights"),
        (to_text, "it is damaged, truncated, or not a file of weights"),
        (to_nest, "it holds 'state_dict' of type dict, which is not a tensor"),
        (lambda m: to_pickle(m, "math", step=3), "it holds 'step' of type int, which is not a tensor"),
        (lose_shard, "pytorch_model-00002-of-00002.bin does not exist, but the index names it"),
    ],
    ids=["cut short", "no pickle", "nested", "more than tensors", "missing shard"],
)
def test_what_else_is_wrong_with_pickles_is_told(
    mergelab: Command, models: Models, tmp_path: Path, change: Callable[[Models], None], word: str
) -> None:
    change(models)
    (error,) = refuse(mergelab, models.arguments("allow=[pickled]"), tmp_path)
    assert word in error


def test_pickles_want_what_reads_them_safely(
    mergelab: Command, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_pickle(models, "math")
    (error,) = refuse(mergelab, models.arguments("allow=[pickled]", "hardware.engine=fast"), tmp_path)
    assert (
        f"hardware.engine: fast cannot do this recipe: the weights of {models['math']} are pickled" in error
    )
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(
        pickles.PickleRefused, match=r"2\.9\.1.* cannot read it safely; torch 2\.10 or newer can"
    ):
        pickles.tensors(models["math"] / "pytorch_model.bin")


def test_a_search_leaves_pickles_to_others(mergelab: Command, models: Models, tmp_path: Path) -> None:
    to_pickle(models, "physics")
    arguments = [a for a in models.arguments("allow=[pickled]") if a != "eval=none"]
    (error,) = refuse(mergelab, ["-m", "search=cma", *arguments], tmp_path)
    assert f"does not apply: the weights of {models['physics']} are pickled" in error
