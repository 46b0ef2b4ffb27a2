"""A run's sign of life."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from patience import patience, token, until  # noqa: F401 (fixtures that every test has)

from mergelab.core import heartbeat


@pytest.fixture
def beat(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], dict[str, Any]]:
    """The heartbeat in a folder, a beat after this."""
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.01)
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID", "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)

    def read(folder: Path) -> dict[str, Any]:
        path = folder / heartbeat.NAME
        for _ in range(2):  # the first may have been on its way
            path.unlink(missing_ok=True)
            until(path.exists)
        return dict(json.loads(path.read_text()))

    return read


Beat = Callable[[Path], dict[str, Any]]


def test_a_pulse_says_what_is_done_and_goes_away(tmp_path: Path, beat: Beat) -> None:
    with heartbeat.running(tmp_path):
        found = beat(tmp_path)
        assert found["pid"] == os.getpid() and found["rss"] > 0 and found["job"] is None
        assert abs(found["time"] - time.time()) < 30 and "gpus" not in found
        heartbeat.step("merge")
        heartbeat.report_progress("tensors", 3, 7, unit="bytes")
        found = beat(tmp_path)
        about = ("step", "what", "done", "total", "unit")
        assert [found[k] for k in about] == ["merge", "tensors", 3, 7, "bytes"]
        heartbeat.step("evaluate")
        assert beat(tmp_path)["what"] is None
    assert list(tmp_path.iterdir()) == []


def test_the_time_of_a_piece_of_work_is_that_of_its_beginning(tmp_path: Path, beat: Beat) -> None:
    with heartbeat.running(tmp_path):
        heartbeat.report_progress("tensors", 0, 7)
        since = beat(tmp_path)["since"]
        heartbeat.report_progress("tensors", 5, 7)
        assert beat(tmp_path)["since"] == since
        heartbeat.report_progress("prompts", 0, 9)
        assert beat(tmp_path)["since"] > since


@pytest.mark.parametrize("raised", [None, ValueError, KeyboardInterrupt])
def test_a_pulse_goes_away_however_the_run_ends(
    tmp_path: Path, beat: Beat, raised: type[BaseException] | None
) -> None:
    try:
        with heartbeat.running(tmp_path):
            beat(tmp_path)
            if raised:
                raise raised
    except (ValueError, KeyboardInterrupt):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_run_within_another_is_part_of_its_pulse(tmp_path: Path, beat: Beat) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    with heartbeat.running(tmp_path):
        began = beat(tmp_path)["started"]
        with heartbeat.running(inner):
            heartbeat.report_progress("tensors", 3, 7)
            assert beat(tmp_path)["what"] == "tensors"
            assert list(inner.iterdir()) == []
        found = beat(tmp_path)
        assert (found["what"], found["started"]) == ("tensors", began)
    with heartbeat.running(inner):
        assert "what" not in beat(inner)


@pytest.mark.parametrize(
    ("env", "job"),
    [
        ({"SLURM_JOB_ID": "57"}, "57"),
        ({"SLURM_JOB_ID": "60", "SLURM_ARRAY_JOB_ID": "57", "SLURM_ARRAY_TASK_ID": "3"}, "57_3"),
    ],
)
def test_a_pulse_names_its_task_and_node(
    tmp_path: Path, beat: Beat, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], job: str
) -> None:
    for name, value in {**env, "SLURMD_NODENAME": "n13"}.items():
        monkeypatch.setenv(name, value)
    with heartbeat.running(tmp_path):
        found = beat(tmp_path)
    assert (found["job"], found["host"]) == (job, "n13")


def test_a_folder_that_cannot_be_written_to_ends_no_run(tmp_path: Path) -> None:
    with heartbeat.running(tmp_path / "nowhere"):
        heartbeat.report_progress("tensors", 1, 2)
    assert not (tmp_path / "nowhere").exists()
