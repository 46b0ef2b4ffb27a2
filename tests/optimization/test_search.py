"""Evolutions of the tiny family as a user runs them: what they leave, going on with one, other searches."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Command
from patience import until
from searching import Pretended, settled, setup_of
from sweeps import SMALL, candidates, copied, lines
from weights import generates, same_bits

from mergelab.cli.main import main
from mergelab.core.conf_dir import CONF

# ---------------------------------------------------------------- what a search leaves


def test_the_folder_holds_all_that_is_promised(swept: Path) -> None:
    result = json.loads((swept / "result.json").read_text(encoding="utf-8"))
    assert set(result["metrics"]) >= {"winner", "preset", "base", "math", "code"}
    assert {"validation", "search"} <= set(result["metrics"]["winner"])
    best = max(candidates(swept), key=lambda c: c["fitness"])
    (preset,) = (line for line in lines(swept) if line["event"] == "preset")
    winner = result["winner"]
    assert winner["fitness"] == max(best["fitness"], preset["fitness"])
    assert result["on_disk"] == winner["fitness"] == result["fitness"]["value"]
    assert set(winner["genome"]) == set(result["search"]["space"])
    moved = winner["number"] is not None
    assert result["verdict"].startswith("On the validation split the winner's" if moved else "No candidate")
    assert {p.name for p in (swept / "report").iterdir()} == {
        "index.html", "fitness.png", "parameters.png", "parallel.png", "importance.png", "validation.png",
        "candidates.csv", "generations.csv", "importance.csv", "validation.csv",
    }  # fmt: skip
    assert (swept / "recipe.yaml").exists()
    assert generates(swept / "model")
    assert not [n for n in ("early", "wandb", "recorded.json") if (swept / n).exists()]
    assert [
        p.name for p in swept.rglob(".*") if p.name != ".hydra"
    ] == []  # what is written aside has its place


def test_what_is_said_is_calm_and_complete(swept: Path) -> None:
    said = (swept / "said.txt").read_text(encoding="utf-8")
    assert re.search(r"^mergelab  search · cma · tiny · math_code · dare_ties · skills$", said, re.M)
    assert "4 genes, 2 generations of 4 by CMA, in this process" in said
    assert re.search(r"^generation +best +mean", said, re.M)
    assert len(re.findall(r"^ +[01]  [01]\.\d{3}  ", said, re.M)) == 2
    assert re.search(r"^winner  math weight \d", said, re.M)
    assert "Warning" not in said
    assert max(map(len, said.splitlines())) <= 80


def test_the_winner_can_be_made_again_by_its_arguments(swept: Path, mergelab: Command) -> None:
    result = json.loads((swept / "result.json").read_text(encoding="utf-8"))
    outcome = mergelab("experts=math_code", "eval=none", *result["overrides"])
    assert outcome.status == 0, outcome.err
    assert same_bits(outcome.folder / "model", swept / "model")


def test_a_hundred_candidates_take_less_than_five_megabytes(tmp_path: Path) -> None:
    settled(tmp_path / "sweep", setup_of(budget=100, population=10), Pretended())
    assert len(candidates(tmp_path / "sweep")) == 100
    sizes = {f.name: f.stat().st_size for f in (tmp_path / "sweep").rglob("*") if f.is_file()}
    assert {"journal.jsonl", "result.json", "index.html", "parallel.png"} <= set(sizes)
    assert sum(sizes.values()) < 5_000_000


# ---------------------------------------------------------------- going on


def test_the_same_command_again_measures_nothing_and_more_goes_on(
    swept: Path, tmp_path: Path, mergelab: Command
) -> None:
    folder = copied(swept, tmp_path / "sweep")
    kept = {f: f.read_bytes() for f in [folder / "journal.jsonl", *folder.glob("report/*")]}
    again = mergelab(*SMALL, folder=folder)
    assert again.status == 0, again.err
    assert "resumes: 8 candidates are in the journal" in again.out
    assert {f: f.read_bytes() for f in kept} == kept

    more = mergelab(*SMALL, "search.budget=12", folder=folder)
    assert more.status == 0, more.err
    assert (folder / "journal.jsonl").read_bytes().startswith(kept[folder / "journal.jsonl"])
    assert [c["number"] for c in candidates(folder)] == list(range(12))
    assert more.result["search"]["budget"] == 12
    assert (folder / "model").is_dir()


def test_interrupted_it_is_found_again_without_its_folder_and_nobody_else_may_work_in_it(
    family: Any, tmp_path: Path, mergelab: Command, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    settings = [*SMALL, "seed=77", "search.population=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mergelab", *settings], cwd=tmp_path, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(CONF.parent)},
    )  # fmt: skip
    try:
        (journal,) = until(lambda: list(tmp_path.glob("multirun/*/*/journal.jsonl")), seconds=120)
        until(lambda: journal.read_text(encoding="utf-8").count('"candidate"'), seconds=120)
        process.send_signal(signal.SIGSTOP)
        other = mergelab(*settings, folder=journal.parent)
        assert other.status == 2
        assert "another run is working in " in other.err
        assert "Traceback" not in other.err
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert re.search(r"interrupted; \d of 8 candidates are safe in multirun/", err)
    assert "Run the same command again to resume." in err
    assert "Traceback" not in err

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["mergelab", *settings, "search.budget=4"])  # which is no other sweep
    with suppress(SystemExit):
        main()
    assert "resumes: " in capfd.readouterr().out
    assert len(list(tmp_path.glob("multirun/*/*/journal.jsonl"))) == 1
    assert (journal.parent / "result.json").exists()


# ---------------------------------------------------------------- other searches


def test_few_prompts_first_and_choices_of_a_group(mergelab: Command) -> None:
    outcome = mergelab(
        *SMALL, "search.fidelity.share=0.5", "search.fidelity.promote=0.5", "search.optimizer=TwoPointsDE",
        "method=choice(task_arithmetic,dare_linear)",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    found = candidates(outcome.folder)
    told = outcome.result["fidelity"]
    assert told["cost"] == pytest.approx(0.5 + 0.5)
    assert told["measured_on_all"] == sum(c["status"] == "done" for c in found) == 4
    assert re.search(r"few prompts first: 0% of the measuring saved; rank correlation", outcome.out)
    assert sum(c["status"] == "screened" for c in found) == 4
    assert {c["genome"]["method"] for c in found} == {"task_arithmetic", "dare_linear"}


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


def test_a_random_search_with_a_range_on_the_command_line_is_compared_with_another(
    swept: Path, mergelab: Command
) -> None:
    outcome = mergelab(
        *SMALL, "search=random", "search.finalists=1", "method=task_arithmetic",
        "experts.math.weight=interval(0.2,0.9)", f"search.against={swept}",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert outcome.result["search"]["name"] == "random"
    assert outcome.result["search"]["space"]["experts.math.weight"] == "interval(0.2,0.9)"
    assert all(0.2 <= c["genome"]["experts.math.weight"] <= 0.9 for c in candidates(outcome.folder))
    other = json.loads((swept / "result.json").read_text(encoding="utf-8"))
    assert outcome.result["metrics"]["cma"] == other["metrics"]["winner"]


def test_where_memory_does_not_do_models_are_read_again_for_each_candidate(
    mergelab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1_000_000}))
    streamed = mergelab(*SMALL, "search.budget=2", "search.population=2")
    assert streamed.status == 0, streamed.err
    assert "1.5 MB of models do not fit into the 1.0 MB of free memory" in streamed.out


def test_hydras_own_sweepers_work_as_well(mergelab: Command) -> None:
    outcome = mergelab(
        "-m", "hydra/sweeper=nevergrad", "hydra.sweeper.optim.budget=2", "hydra.sweeper.optim.num_workers=1",
        "experts=math_code", "experts.math.weight=interval(0,1)", "eval.limit=16",
        "hydra.sweeper.optim.maximize=true",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert (outcome.folder / "optimization_results.yaml").exists()
    grid = mergelab("-m", "experts=math_code", "experts.math.weight=0.2,0.8", "eval=none")
    assert grid.status == 0, grid.err
    assert sorted(p.parent.name for p in grid.folder.glob("*/result.json")) == ["0", "1"]
