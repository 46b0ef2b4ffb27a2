"""What is looked at before a search measures anything: its plan, settings, the folder of another sweep."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Command
from sweeps import SMALL, checked

from mergelab.core.conf_dir import CONF
from mergelab.core.errors import InputError

SEARCH = SMALL[1:]
"""The arguments without -m, which is the command's."""


@pytest.mark.parametrize(
    "option", [p.stem for p in sorted((CONF / "search").glob("*.yaml")) if p.stem != "none"]
)
def test_every_option_passes_its_checks(option: str, family: Any, tmp_path: Path) -> None:
    setup = checked(tmp_path / "sweep", f"search={option}")
    assert setup.genes
    assert setup.generations >= 1


@pytest.mark.parametrize("model", ["tiny", "qwen32b"])
def test_a_plan_says_what_would_run_and_runs_nothing(model: str, family: Any, mergelab: Command) -> None:
    outcome = mergelab("-m", "search=cma", f"model={model}", "job=plan", "search.budget=25")
    if model == "tiny":
        assert outcome.status == 0, outcome.err
        assert "20: 2 generations of 10" in outcome.out
        assert re.search(r"experts\.physics\.density +interval\(0\.1, 1\) +0\.5", outcome.out)
        assert outcome.out.rstrip().endswith("nothing was run")
    else:  # its skills have no prompts for a search, which has to be said before anybody fetches it
        assert outcome.status == 2
        assert "eval.allow_test_split=true" in outcome.err
        outcome = mergelab("-m", "search=cma", f"model={model}", "job=plan", "eval.allow_test_split=true")
        assert outcome.status == 0, outcome.err
        assert "hf download" in outcome.out
    assert not outcome.folder.exists() or not list(outcome.folder.rglob("journal.jsonl"))


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search.optimizer=CMAES"], "search.optimizer: Nevergrad has no 'CMAES'"),
        (["search.budget=0"], "search.budget: 0 is out of range; at least 1"),
        (["search.sigma=2"], "search.sigma: 2 is out of range"),
        (["search.population=1"], "search.population: 1 is out of range"),
        (["search.objectives=[math]"], "one objective is a fitness"),
        (["search.objectives=[math,sums]"], "'sums' is not measured"),
        (["search.against=nowhere"], "search.against: nowhere holds no result.json"),
        (["hardware.workers=0"], "hardware.workers: 0 is out of range"),
        (["eval=none"], "a search needs an evaluation"),
        (["job=evaluate"], "search: job=evaluate merges nothing"),
        (["method=linear", "experts.math.density=interval(0,1)"], "method=linear does not take density"),
        (["experts.maths.weight=interval(0,1)"], "there is no key 'maths'"),
        (["experts.math.weight=interval(0.8,1)"], "the search starts at"),
        (["experts.math.density=interval(0,3)"], "a bound of a range is not accepted"),
        (["hardware.compute_dtype=bfloat16"], "candidates are merged in memory by the fast engine"),
        (["search.fidelity.share=0"], "search.fidelity.share: 0 is out of range"),
        (["search.timeout=-1"], "search.timeout: -1 is out of range"),
        (["eval=perplexity", f"eval.text={__file__}"], "eval.allow_test_split=true"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_measured(
    arguments: list[str], message: str, family: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as e:
        checked(tmp_path / "sweep", *SEARCH, *arguments)
    assert message in str(e.value)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SMALL, "search.budget=0"], "search.budget: 0 is out of range; at least 1"),
        (["search=cma"], "search=cma is for many runs: add -m"),
    ],
)
def test_a_command_that_cannot_be_is_refused_without_a_trace(
    arguments: list[str], message: str, family: Any, mergelab: Command
) -> None:
    outcome = mergelab(*arguments)
    assert outcome.status == 2, outcome.out + outcome.err
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert not (outcome.folder / "journal.jsonl").exists()


def test_a_search_takes_no_launcher_of_others(family: Any, mergelab: Command, tmp_path: Path) -> None:
    other = tmp_path / "conf" / "hydra" / "launcher" / "other.yaml"
    other.parent.mkdir(parents=True)
    other.write_text("_target_: hydra._internal.core_plugins.basic_launcher.BasicLauncher\n")
    outcome = mergelab(*SMALL, "--config-dir", str(tmp_path / "conf"), "hydra/launcher=other")
    assert outcome.status == 2, outcome.out + outcome.err
    assert "a search starts its workers itself" in outcome.err


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ("method=ties", 'method.name: "dare_ties" then, "ties" now'),
        ("search.seed=5", "search.seed: 0 then, 5 now"),
        ("seed=3", "seed: 0 then, 3 now"),
        ("experts.math.weight=0.9", "experts.math.weight: 0.5 then, 0.9 now"),
        ("experts.math.weight=interval(0,2)",
         'search.space.experts.math.weight: "interval(0, 1.5)" then, "interval(0,2)" now'),
    ],
)  # fmt: skip
def test_the_folder_of_another_sweep_is_refused_with_what_differs(
    swept: Path, changed: str, difference: str
) -> None:
    before = (swept / "journal.jsonl").read_bytes()
    with pytest.raises(InputError, match="holds another sweep") as e:
        checked(swept, *SEARCH, changed)
    assert difference in str(e.value).splitlines()
    assert "hydra.sweep.dir=DIR" in str(e.value)
    assert (swept / "journal.jsonl").read_bytes() == before


def test_the_folder_of_the_same_sweep_is_not_refused(swept: Path) -> None:
    checked(swept, *SEARCH)
    checked(swept, *SEARCH, "search.budget=12", "hardware.workers=2")


def test_more_live_models_than_memory_holds_are_refused(
    family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1_000_000}))
    with pytest.raises(InputError) as e:
        checked(tmp_path / "sweep", *SEARCH, "hardware.workers=4")
    assert "hardware.workers: 4 live models need 2.4 MB, 1.0 MB are available" in str(e.value)
