"""A search that is killed at any moment ends with the bytes of an undisturbed one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from killing import killed, moments
from searching import Pretended, settled, setup_of, smooth

from mergelab.optimization.bench import Outcome
from mergelab.optimization.controller import Setup
from mergelab.optimization.workers import Order
from mergelab.report import evolution
from mergelab.schema import Fidelity
from mergelab.workspace import write_json


class Noting(Pretended):
    """Notes whose outcome the search has taken before it came back for more: that must be safe. A note is
    an empty folder, which is no moment of its own."""

    def __init__(self, folder: Path, last_first: bool):
        super().__init__(one_fails, last_first)
        self._notes = folder / NOTES

    def work(self, orders: Sequence[Order]) -> Iterator[tuple[int, Outcome]]:
        """As `Workers` says."""
        for place, outcome in super().work(orders):
            yield place, outcome
            order = orders[place]
            if order.kind != "preset" and (outcome.scores is not None or order.attempt == 2):
                (self._notes / order.name).mkdir(parents=True)


NOTES = ".notes"


def one_fails(order: Order) -> Any:
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
