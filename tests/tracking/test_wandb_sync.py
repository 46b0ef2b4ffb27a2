"""What nodes without internet have recorded for W&B."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from patience import patience, token  # noqa: F401 (fixtures that every test has)

from mergelab.schema import Tracking
from mergelab.tracking import wandb_sync


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep of two runs whose nodes had no internet."""
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        folder = tmp_path / "s" / str(i) / "wandb" / f"offline-run-2026-{i}"
        folder.mkdir(parents=True)
        (folder / f"run-{i}.wandb").write_text("data")
    return tmp_path / "s"


def test_offline_records_are_brought_together_once(sweep: Path) -> None:
    wandb_sync.gather(sweep)
    wandb_sync.gather(sweep)
    assert [p.name for p in wandb_sync.left(sweep)] == ["offline-run-2026-0", "offline-run-2026-1"]
    assert (sweep / "wandb" / "offline-run-2026-1" / "run-1.wandb").exists()
    assert not list(sweep.glob("[01]/wandb/*"))


def test_a_record_that_is_there_already_is_not_overwritten(sweep: Path) -> None:
    there = sweep / "wandb" / "offline-run-2026-0"
    there.mkdir(parents=True)
    (there / "run-0.wandb").write_text("earlier")
    wandb_sync.gather(sweep)
    assert (there / "run-0.wandb").read_text() == "earlier"
    assert (sweep / "0" / "wandb" / "offline-run-2026-0" / "run-0.wandb").exists()


def test_what_is_uploaded_is_not_left(sweep: Path) -> None:
    wandb_sync.gather(sweep)
    (sweep / "wandb" / "offline-run-2026-0" / "run-0.wandb.synced").touch()
    assert [p.name for p in wandb_sync.left(sweep)] == ["offline-run-2026-1"]


def test_without_records_nothing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_sync, "upload", lambda records: pytest.fail("nothing is there to upload"))
    wandb_sync.gather(tmp_path)
    wandb_sync.finish(tmp_path, Tracking(sync=True))
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_the_command_that_uploads_is_printed(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_sync, "upload", lambda records: pytest.fail("nobody has asked for it"))
    wandb_sync.gather(sweep)
    wandb_sync.finish(sweep, Tracking())
    assert said(capsys) == "W&B: 2 runs are offline. To upload them: wandb sync s/wandb/offline-run-*"


def test_the_command_that_uploads_can_be_typed_as_it_is(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sweep.rename(
        sweep.with_name("a sweep with a name that is long " + "enough " * 10 + "to be broken")
    )
    wandb_sync.gather(folder)
    wandb_sync.finish(folder, Tracking())
    line = next(x for x in capsys.readouterr().out.splitlines() if "wandb sync" in x)
    command = line.partition("wandb sync ")[2].partition("  uploads")[0]
    listed = subprocess.run(f"ls -d {command}", shell=True, text=True, capture_output=True)
    assert len(listed.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        ("", "W&B: 2 runs uploaded"),
        ("no network", "! W&B has not taken all of them: no network Try again later:"),
    ],
)
def test_what_is_left_is_uploaded_on_demand_and_a_failure_is_a_warning(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, failure: str, told: str
) -> None:
    uploaded: list[str] = []

    def upload(records: list[Path]) -> str:
        uploaded.extend(p.name for p in records)
        return failure

    monkeypatch.setattr(wandb_sync, "upload", upload)
    wandb_sync.gather(sweep)
    wandb_sync.finish(sweep, Tracking(sync=True))
    assert uploaded == ["offline-run-2026-0", "offline-run-2026-1"]
    assert told in said(capsys)


@pytest.mark.parametrize(
    ("out", "status", "why"),
    [
        ("Syncing: https://w/x ... done.", 0, ""),
        ("", 0, ""),
        ("wandb: ERROR not logged in", 0, "wandb: ERROR not logged in"),
        ("one\ntwo", 1, "two"),
        ("", 3, "wandb sync ended with 3"),
        pytest.param("Syncing: https://w/error_analysis ... done.", 0, ""),
    ],
)  # fmt: skip
def test_what_wandb_says_of_an_upload(
    monkeypatch: pytest.MonkeyPatch, out: str, status: int, why: str
) -> None:
    def run(command: list[str], **how: Any) -> Any:
        assert command[1:] == ["-m", "wandb", "sync", "/s/wandb/offline-run-1"]
        assert how["env"]["WANDB_MODE"] == "online"
        return SimpleNamespace(stdout=out, stderr="", returncode=status)

    monkeypatch.setattr(wandb_sync.subprocess, "run", run)
    assert wandb_sync.upload([Path("/s/wandb/offline-run-1")]) == why
