"""Evolutions of the tiny family as a user runs them: whole, killed, gone on with, and refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from composing import composed
from conftest import Command, Outcome
from weights import generates, same_bits

from mergelab.main import CONF
from mergelab.optimization import session

SMALL = [
    "-m", "search=cma", "experts=math_code", "search.budget=8", "search.population=4", "search.finalists=2",
    "eval.limit=16",
]  # fmt: skip
"""A search that takes a few seconds."""


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "journal.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def candidates(folder: Path) -> list[dict[str, Any]]:
    return [line for line in lines(folder) if line["event"] == "candidate"]


@pytest.fixture(scope="module")
def swept(family: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small search that has ended."""
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    done = subprocess.run(command(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout, encoding="utf-8")
    return folder


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "mergelab", *SMALL, *more, f"hydra.sweep.dir={folder}"]


# ---------------------------------------------------------------- what a search leaves


def test_the_folder_holds_all_that_is_promised(swept: Path) -> None:
    result = json.loads((swept / "result.json").read_text(encoding="utf-8"))
    assert set(result["metrics"]) >= {"winner", "preset", "base", "math", "code"}
    assert {"validation", "search"} <= set(result["metrics"]["winner"])
    best = max(candidates(swept), key=lambda c: c["fitness"])
    winner = result["winner"]
    assert winner["fitness"] >= best["fitness"]
    assert result["on_disk"] == winner["fitness"] == result["fitness"]["value"]
    assert set(winner["genome"]) == set(result["search"]["space"])
    assert (
        "standard errors" in result["verdict"]
        or "noise" in result["verdict"]
        or "No cand" in result["verdict"]
    )
    assert {p.name for p in (swept / "report").iterdir()} >= {
        "index.html", "fitness.png", "parameters.png", "parallel.png", "importance.png", "validation.png",
        "candidates.csv", "validation.csv",
    }  # fmt: skip
    assert (swept / "recipe.yaml").exists()
    assert generates(swept / "model")
    assert not [n for n in ("early", "wandb", "recorded.json") if (swept / n).exists()]
    assert not list(swept.rglob("*.tmp"))


def test_what_is_said_is_calm_and_complete(swept: Path) -> None:
    said = (swept / "said.txt").read_text(encoding="utf-8")
    assert re.search(r"^mergelab  search · cma · tiny · math_code · dare_ties · skills$", said, re.M)
    assert "4 genes, 2 generations of 4 by CMA, in this process" in said
    assert re.search(r"^generation +best +mean", said, re.M)
    assert len(re.findall(r"^ +[01]  [01]\.\d{3}  ", said, re.M)) == 2
    assert "winner  math weight" in said or "winner  " in said
    assert "Warning" not in said
    assert max(map(len, said.splitlines())) <= 80


def test_the_winner_can_be_made_again_by_its_arguments(swept: Path, mergelab: Command) -> None:
    result = json.loads((swept / "result.json").read_text(encoding="utf-8"))
    outcome = mergelab("experts=math_code", "eval=none", *result["overrides"])
    assert outcome.status == 0, outcome.err
    assert same_bits(outcome.folder / "model", swept / "model")


def test_the_journal_has_no_times_and_the_same_search_the_same_bytes(swept: Path, tmp_path: Path) -> None:
    other = tmp_path / "again"
    done = subprocess.run(command(other), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    def without_folder(path: Path) -> list[dict[str, Any]]:
        return [line | {"command": ""} for line in lines(path)]

    assert without_folder(other)[1:-1] == without_folder(swept)[1:-1]


def test_a_hundred_candidates_take_less_than_five_megabytes(mergelab: Command) -> None:
    outcome = mergelab("-m", "search=cma", "eval.limit=1", "search.finalists=1")
    assert outcome.status == 0, outcome.err
    assert len(candidates(outcome.folder)) == 100
    files = [f for f in outcome.folder.rglob("*") if f.is_file() and "model" not in f.parts]
    assert sum(f.stat().st_size for f in files) < 5_000_000


# ---------------------------------------------------------------- going on


def test_the_same_command_again_measures_nothing_and_ends_the_same(
    mergelab: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = mergelab(*SMALL)
    assert first.status == 0, first.err
    files = [first.folder / "journal.jsonl", *first.folder.glob("report/*")]
    kept = {f: f.read_bytes() for f in files}
    again = mergelab(*SMALL, folder=first.folder)
    assert again.status == 0, again.err
    assert "goes on: 8 candidates are in the journal" in again.out
    assert {f: f.read_bytes() for f in kept} == kept

    more = mergelab(*SMALL, "search.budget=12", folder=first.folder)
    assert more.status == 0, more.err
    assert len(candidates(first.folder)) == 12
    assert (first.folder / "model").is_dir()

    for changed, key in (("method=ties", 'method.name: "dare_ties" then, "ties" now'),
                         ("search.seed=5", "search.seed: 0 then, 5 now"), ("seed=3", "seed: 0 then, 3 now"),
                         ("experts.math.weight=0.9", "experts.math.weight:"),
                         ("experts.math.weight=interval(0,2)",
                          "search.space.experts.math.weight:")):  # fmt: skip
        refused = mergelab(*SMALL, changed, folder=first.folder)
        assert refused.status == 2
        assert "holds another sweep" in refused.err
        assert key in refused.err
        assert "hydra.sweep.dir=DIR" in refused.err


def test_without_a_folder_an_interrupted_search_is_found_again(family: Any, tmp_path: Path) -> None:
    start = [sys.executable, "-m", "mergelab", *SMALL, "seed=77"]
    environment = {**os.environ, "PYTHONPATH": str(CONF.parent)}
    process = subprocess.Popen(
        start, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    (journal,) = waited(lambda: list(tmp_path.glob("multirun/*/*/journal.jsonl")))
    waited(lambda: journal.read_text(encoding="utf-8").count('"candidate"') >= 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"interrupted; \d of 8 candidates are safe in multirun/", err)
    assert "Run the same command again: it goes on from there." in err
    assert "Traceback" not in err
    done = subprocess.run(start, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "goes on: " in done.stdout
    assert len(list(tmp_path.glob("multirun/*/*/journal.jsonl"))) == 1
    assert (journal.parent / "result.json").exists()


def waited(ready: Any, seconds: float = 120) -> Any:
    """What `ready` gives once it gives something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := ready():
                return found
        except FileNotFoundError:
            pass
        time.sleep(0.05)
    raise TimeoutError


def test_two_on_one_folder_the_second_refuses(family: Any, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    first = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        waited(lambda: (folder / "journal.jsonl").stat().st_size > 0)
        second = subprocess.run(command(folder), capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert "another" in second.stderr
        assert "Traceback" not in second.stderr
    finally:
        first.wait(timeout=120)
    assert first.returncode == 0


# ---------------------------------------------------------------- other searches


@pytest.mark.parametrize(
    "option", [p.stem for p in sorted((CONF / "search").glob("*.yaml")) if p.stem != "none"]
)
def test_every_option_passes_its_checks(option: str, family: Any, tmp_path: Path) -> None:
    def compose(groups: Any) -> Any:
        return composed(f"search={option}", *(f"{k}={v}" for k, v in groups.items()))

    setup, plan = session.prepare(session.Request(compose, {}, {}, [], tmp_path, True))
    assert setup.genes
    assert setup.generations >= 1
    assert session.identify(setup, plan)["search"]["space"]


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


def test_few_prompts_first_is_reported(mergelab: Command) -> None:
    outcome = mergelab(*SMALL, "search.fidelity.share=0.5", "search.fidelity.promote=0.5")
    assert outcome.status == 0, outcome.err
    told = outcome.result["fidelity"]
    assert told["cost"] == pytest.approx(0.5 + 0.5)
    assert told["measured_on_all"] == 4
    assert re.search(r"few prompts first: 0% of the measuring saved; rank correlation", outcome.out)
    assert sum(c["status"] == "screened" for c in candidates(outcome.folder)) == 4


def test_several_objectives_end_with_a_front(mergelab: Command) -> None:
    outcome = mergelab(*SMALL, "search.objectives=[math,code]", "search.optimizer=TwoPointsDE")
    assert outcome.status == 0, outcome.err
    assert outcome.result["winner"] is None
    assert outcome.result["pareto"]
    assert set(outcome.result["overrides"]) == {str(n) for n in outcome.result["pareto"]}
    assert (outcome.folder / "report" / "pareto.png").exists()
    assert (outcome.folder / "report" / "pareto.csv").exists()
    assert not (outcome.folder / "model").exists()
    assert "Pareto front: candidate" in outcome.out


def test_a_range_on_the_command_line_and_a_random_search_to_compare_with(
    mergelab: Command, tmp_path: Path
) -> None:
    rival = mergelab(*SMALL, "search=random", "search.finalists=1")
    assert rival.status == 0, rival.err
    outcome = mergelab(*SMALL, "method=task_arithmetic", "experts.math.weight=interval(0.2,0.9)",
                       f"search.against={rival.folder}")  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert outcome.result["search"]["space"]["experts.math.weight"] == "interval(0.2,0.9)"
    assert all(0.2 <= c["genome"]["experts.math.weight"] <= 0.9 for c in candidates(outcome.folder))
    assert "random" in outcome.result["metrics"]


def test_choices_of_a_group_evolve(mergelab: Command) -> None:
    outcome = mergelab(*SMALL, "method=choice(task_arithmetic,dare_linear)", "search.optimizer=TwoPointsDE")
    assert outcome.status == 0, outcome.err
    assert {c["genome"]["method"] for c in candidates(outcome.folder)} <= {"task_arithmetic", "dare_linear"}


def test_hydras_own_sweepers_work_as_well(mergelab: Command) -> None:
    outcome = mergelab(
        "-m", "hydra/sweeper=nevergrad", "hydra.sweeper.optim.budget=2", "hydra.sweeper.optim.num_workers=1",
        "experts=math_code", "experts.math.weight=interval(0,1)", "eval.limit=4",
        "hydra.sweeper.optim.maximize=true",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert (outcome.folder / "optimization_results.yaml").exists()
    grid = mergelab("-m", "experts=math_code", "experts.math.weight=0.2,0.8", "eval.limit=4")
    assert grid.status == 0, grid.err
    assert {p.name for p in grid.folder.glob("[01]/result.json")} == {"result.json"}


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search.optimizer=CMAES"], "search.optimizer: Nevergrad has no 'CMAES'"),
        (["search.budget=0"], "search.budget: 0 is out of range; 1 or more"),
        (["search.sigma=2"], "search.sigma: 2.0 is out of range"),
        (["search.population=1"], "search.population: 1 is out of range"),
        (["search.objectives=[math]"], "one objective is a fitness"),
        (["search.objectives=[math,sums]"], "'sums' is not measured"),
        (["search.against=nowhere"], "search.against: nowhere holds no result.json"),
        (["hydra/launcher=submitit_local"], "a search starts its workers itself"),
        (["hardware.workers=0"], "hardware.workers: 0 is out of range"),
        (["eval=none"], "a search needs something to climb"),
        (["job=evaluate"], "search: job=evaluate merges nothing"),
        (["method=linear", "experts.math.density=interval(0,1)"], "method=linear takes no density"),
        (["experts.maths.weight=interval(0,1)"], "maths"),
        (["experts.math.weight=interval(0.8,1)"], "the search starts at"),
        (["experts.math.density=interval(0,3)"], "an end of a range is not possible"),
        (["hardware.compute_dtype=bfloat16"], "candidates are merged in memory by our own kernels"),
        (["search.fidelity.share=0"], "search.fidelity.share: 0.0 is out of range"),
        (["search.timeout=-1"], "search.timeout: -1.0 is out of range"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_measured(
    arguments: list[str], message: str, family: Any, mergelab: Command
) -> None:
    outcome: Outcome = mergelab(*SMALL, *arguments)
    assert outcome.status == 2, outcome.out + outcome.err
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert not (outcome.folder / "journal.jsonl").exists()


def test_memory_that_does_not_do_is_told(
    family: Any, mergelab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1_000_000}))
    streamed = mergelab(*SMALL, "search.budget=4")
    assert streamed.status == 0, streamed.err
    assert "1.5 MB of models do not fit into the 1.0 MB of memory that are free" in streamed.out
    refused = mergelab(*SMALL, "hardware.workers=4")
    assert refused.status == 2
    assert "hardware.memory: 4 live models need 2.4 MB, 1.0 MB are available" in refused.err


def test_a_search_without_m_is_refused(mergelab: Command) -> None:
    outcome = mergelab("search=cma")
    assert outcome.status == 2
    assert "search=cma is for many runs: add -m" in outcome.err


def test_a_public_tests_prompts_are_not_climbed_by_accident(tmp_path: Path, mergelab: Command) -> None:
    outcome = mergelab(*SMALL, "eval=perplexity", f"eval.text={Path(__file__)}")
    assert outcome.status == 2
    assert "eval.allow_test_split=true" in outcome.err
