"""Every merge method: its file says what mergekit declares, and its merge is mergekit's, bit for bit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from composing import composed, merged
from conftest import Command
from weights import mergekit_yaml, same_bits, weights

from mergelab.core.conf_dir import CONF
from mergelab.merging import mergekit_backend
from mergelab.merging.torch_threads import threads
from mergelab.methods import registry
from mergelab.recipes import recipe as recipes
from mergelab.schema import Hardware

FILES = {
    p.stem: p
    for p in sorted((CONF / "method").glob("*.yaml"))
    if p.stem not in ("mergekit", "mergekit_moe", "moe")
}

EXPERTS = {
    "arcee_fusion": "math_physics",
    "nearswap": "math_code",
    "nuslerp": "math_japanese",
    "slerp": "code_japanese",
    "passthrough": "single_math",
    "multislerp": "stem",
}
"""The set that fits a method; balanced for any other."""

LAST_BITS = {"dare_linear", "dare_ties", "della", "della_linear", "karcher", "model_stock", "nuslerp"}
"""Methods that sum over whole tensors (a norm, an angle): above 32768 entries, torch splits such
a sum among its threads, and its last bits differ with their number."""


def test_there_is_a_file_for_each_of_mergekits_methods() -> None:
    assert set(FILES) == set(registry.methods())


@pytest.mark.parametrize("name", FILES)
def test_file_says_what_mergekit_declares(name: str) -> None:
    text = FILES[name].read_text(encoding="utf-8")
    conf = yaml.safe_load(text)
    declared = registry.get(name)
    assert conf["name"] == name
    own = {p for p in declared.parameters if p not in recipes.PER_MODEL}
    assert set(conf["parameters"]) == own
    for p in own:
        if not declared.parameters[p].required:
            assert conf["parameters"][p] == declared.parameters[p].default, p
        else:
            assert conf["parameters"][p] is not None, f"{name} cannot do without {p}"
    assert (
        conf["base"]
        in {"required": ("model", "first"), "optional": ("model",), "ignored": ("first",)}[
            declared.inputs.base
        ]
    )
    header = text[: text.index("\nname:")]
    assert all(line.startswith("#") for line in header.splitlines())
    assert re.search(r"https://\S+", header), "no reference"


@pytest.mark.parametrize("name", FILES)
def test_merges_as_mergekit_does(name: str, family: Any, tmp_path: Path) -> None:
    """With nothing set but what its file says, on trained models."""
    run = composed(f"method={name}", f"experts={EXPERTS.get(name, 'balanced')}", "eval=none")
    model = merged(run, tmp_path)
    ours, base = weights(model), weights(family.checkpoint("base"))
    assert ours.keys() == base.keys()
    assert all(bool(t.isfinite().all()) for t in ours.values())
    assert any(not torch.equal(ours[n], base[n]) for n in base), "nothing was merged"
    with threads(1):  # as a worker of ours has; see LAST_BITS
        theirs = mergekit_yaml(tmp_path / "recipe.yaml", tmp_path / "theirs")
    assert same_bits(model, theirs) is not registry.get(name).traits.random, "the masks are our own"


@pytest.mark.slow
def test_command_of_mergekit_gives_the_same_bits(family: Any, mergelab: Command, tmp_path: Path) -> None:
    outcome = mergelab("eval=none", "seed=3", "hardware.engine=mergekit")
    theirs = tmp_path / "theirs"
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(outcome.folder / "recipe.yaml"),
               str(theirs), "--random-seed", "3"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert same_bits(outcome.folder / "model", theirs)


@pytest.fixture(scope="module")
def wide(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two experts whose matrices torch would share among its threads."""
    root = tmp_path_factory.mktemp("wide")
    side = {"vocab_size": 192, "hidden_size": 192, "intermediate_size": 192, "head_dim": 48}
    return [make_model(root / str(i), seed=i, num_hidden_layers=1, **side) for i in range(3)]


@pytest.mark.parametrize("name", FILES)
def test_threads_change_no_more_than_last_bits(name: str, wide: list[Path], tmp_path: Path) -> None:
    conf = yaml.safe_load(FILES[name].read_text(encoding="utf-8"))
    takes = registry.get(name).used
    experts = wide[1 : 2 if name == "passthrough" else 3]
    own = {k: v for k, v in {"weight": 0.5, "density": 0.5}.items() if k in takes}
    recipe = {
        "merge_method": name,
        "base_model": str(wide[0] if conf["base"] == "model" else experts[0]),
        "models": [{"model": str(e), "parameters": own} for e in experts],
        "parameters": {k: v for k, v in conf["parameters"].items() if v is not None},
        "dtype": "float32",
    }
    before = torch.get_num_threads()
    for count in (1, 2):
        out, told = tmp_path / str(count), []
        out.mkdir()
        mergekit_backend.merge(
            recipe, out, hardware=Hardware(threads=count), seed=0,
            progress=lambda *step, told=told: told.append((*step, torch.get_num_threads())),
        )  # fmt: skip
        assert {t for *_, t in told} == {count}
        merged = [(done, total) for what, done, total, _ in told if what == "merge"]
        assert merged == [(i + 1, len(merged)) for i in range(len(merged))]
    assert torch.get_num_threads() == before
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    for n in one:
        if name in LAST_BITS:
            torch.testing.assert_close(one[n], two[n], rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(one[n], two[n]), n
