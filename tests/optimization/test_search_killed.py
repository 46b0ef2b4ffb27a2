"""A search that is killed at any moment ends with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Command
from killing import killed, moments
from patience import until
from searching import Pretended, settled, setup_of, smooth
from sweeps import SMALL, candidates, command, lines
from weights import same_bits

from mergelab.core.run_dir import write_json
from mergelab.optimization.candidate_evaluator import Outcome
from mergelab.optimization.executors.base import EvaluationRequest
from mergelab.optimization.request import Setup
from mergelab.report import evolution
from mergelab.schema import Fidelity


class Noting(Pretended):
    """Notes whose outcome the search has taken before it came back for more: that must be safe. A note is
    an empty folder, which is no moment of its own."""

    def __init__(self, folder: Path, last_first: bool):
        super().__init__(one_fails, last_first)
        self._notes = folder / NOTES

    def evaluate(self, requests: Sequence[EvaluationRequest]) -> Iterator[tuple[int, Outcome]]:
        """As `Executor` says."""
        for place, outcome in super().evaluate(requests):
            yield place, outcome
            order = requests[place]
            if order.kind != "preset" and (outcome.scores is not None or order.attempt == 2):
                (self._notes / order.name).mkdir(parents=True)


NOTES = ".notes"


def one_fails(order: EvaluationRequest) -> Any:
    """Number 1 cannot be measured."""
    return "out of memory" if order.number == 1 else smooth(order.run)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report without pictures, which take seconds, and a disk that nobody waits for."""
    monkeypatch.setattr(
        evolution,
        "write_report",
        lambda folder, lines, result: write_json(folder / "report" / "index.html", [lines, result]),
    )
    monkeypatch.setattr("os.fsync", lambda file: None)


def small(share: float) -> Setup:
    """Two generations of three, of two genes."""
    return setup_of(
        "experts=math_code", "method=task_arithmetic", budget=6, population=3, finalists=2,
        fidelity=Fidelity(share=share, promote=0.5),
    )  # fmt: skip


def everything(folder: Path) -> dict[str, bytes]:
    """All files, but for those of which a kill has left a part beside their place."""
    files = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return {str(p.relative_to(folder)): p.read_bytes().replace(bytes(folder), b"FOLDER") for p in files}


def search(folder: Path, setup: Setup, last_first: bool) -> Noting:
    """To the end; returns who has worked."""
    folder.mkdir(exist_ok=True)
    workers = Noting(folder, last_first)
    settled(folder, setup, workers)
    return workers


@pytest.mark.parametrize(("last_first", "share"), [(False, 1), (True, 0.5)])
@pytest.mark.usefixtures("quick")
def test_killed_at_any_moment_it_ends_as_if_undisturbed_and_measures_nothing_twice(
    last_first: bool, share: float, tmp_path: Path
) -> None:
    setup, folder = small(share), tmp_path / "whole"
    names = {o.name for o in search(tmp_path / "before", setup, last_first).asked if o.kind != "preset"}
    left = moments(lambda: search(folder, setup, last_first), folder, tmp_path / "moments")
    whole = everything(folder)
    assert whole == everything(tmp_path / "before")
    assert len(left) >= 3 * whole["journal.jsonl"].count(b"\n")
    for moment in left:
        safe = {p.name for p in moment.glob(f"{NOTES}/*")}
        asked = {o.name for o in search(moment, setup, last_first).asked}
        assert everything(moment) == whole, moment
        assert not safe & asked, moment
        assert len(names - safe - asked) <= 1, moment


@pytest.mark.parametrize(("last_first", "share"), [(True, 1), (False, 0.5)])
@pytest.mark.usefixtures("quick")
def test_killed_again_and_again_it_ends_as_if_undisturbed(
    last_first: bool, share: float, tmp_path: Path
) -> None:
    setup = small(share)
    search(tmp_path / "whole", setup, last_first)
    folder = tmp_path / "sweep"
    kills = 0
    while killed(lambda: search(folder, setup, last_first), folder, 16):
        kills += 1
        assert kills < 30
    assert kills >= 4
    assert everything(folder) == everything(tmp_path / "whole")


# ---------------------------------------------------------------- whole commands


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_command_that_is_killed_goes_on_and_ends_as_if_undisturbed(
    workers: int, swept: Path, tmp_path: Path, mergelab: Command
) -> None:
    folder = tmp_path / "sweep"
    process = subprocess.Popen(
        command(folder, f"hardware.workers={workers}"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    others: list[psutil.Process] = []
    try:
        if workers > 1:  # a worker first, whose candidate is then done again
            wait_for(folder, 1)
            others = measuring(process.pid)
            others[0].kill()
        wait_for(folder, 3)
        others += measuring(process.pid)
    finally:
        process.kill()
        process.wait()
    assert not (folder / "result.json").exists()
    assert psutil.wait_procs(others, timeout=60)[1] == []  # they notice by themselves

    done = mergelab(*SMALL, folder=folder)
    assert done.status == 0, done.err
    assert re.search(r"resumes: [3-7] candidates are in the journal", done.out)
    assert journal(folder) == journal(swept)
    files = ["recipe.yaml", *(f"report/{f.name}" for f in (swept / "report").iterdir())]
    assert [f for f in files if (folder / f).read_bytes() != (swept / f).read_bytes()] == []
    assert without_times(folder) == without_times(swept)
    assert same_bits(folder / "model", swept / "model")
    assert not (folder / "early").exists()


def wait_for(folder: Path, count: int) -> None:
    """Until so many candidates are in the journal."""
    until(lambda: (folder / "journal.jsonl").exists() and len(candidates(folder)) >= count, seconds=120)


def measuring(parent: int) -> list[psutil.Process]:
    """The processes that measure candidates."""
    children = psutil.Process(parent).children(recursive=True)
    return [p for p in children if "popen_loky" in " ".join(p.cmdline())]


def journal(folder: Path) -> list[dict[str, Any]]:
    """Its lines, but for the words of the command that came to write the first one."""
    first, *rest = lines(folder)
    return [first | {"command": ""}, *rest]


def without_times(folder: Path) -> dict[str, Any]:
    """The result, wherever the folder is."""
    text = (folder / "result.json").read_text(encoding="utf-8").replace(str(folder), "FOLDER")
    return {k: v for k, v in json.loads(text).items() if k not in ("timings", "started", "finished")}
