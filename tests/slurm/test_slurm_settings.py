"""What is known of a cluster before anything is submitted to it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from composing import composed
from patience import patience, token  # noqa: F401 (fixtures that every test has)

from mergelab.core.errors import StepError
from mergelab.optimization import controller_job
from mergelab.preflight import value_checks
from mergelab.scheduling.scheduler import scheduler_of
from mergelab.slurm import client

CONF = Path(__file__).parents[2] / "conf" / "hardware"


def test_the_controller_runs_the_same_command_in_the_same_folder() -> None:
    typed = ["-m", "search=cma", "hydra.sweep.dir=elsewhere", "experts=math_code"]
    found = controller_job.command(typed, Path("/my data/sweep"))
    assert found == [sys.executable, "-u", "-m", "mergelab", "-m", "search=cma", "experts=math_code",
                     "hydra.sweep.dir='/my data/sweep'"]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        ((), "partition", "tasks"),
        (("search.controller_job.partition=own",), "partition", "own"),
        ((), "account", "proj1"),
        (("search.controller_job.account=own",), "account", "own"),
        ((), "setup", ["module load cuda"]),
        (("search.controller_job.setup=[own]",), "setup", ["own"]),
        ((), "gpus", 0),
        ((), "time", "24:00:00"),
        ((), "memory", "4GB"),
        ((), "constraint", None),
    ],
)
def test_the_controller_asks_for_what_the_tasks_do_only_where_it_must(
    overrides: tuple[str, ...], key: str, value: Any
) -> None:
    run = composed(
        "hardware=slurm_1gpu", "hardware.slurm.partition=tasks", "hardware.slurm.account=proj1",
        "hardware.slurm.constraint=a100", "hardware.slurm.setup=[module load cuda]", *overrides,
    )  # fmt: skip
    scheduler = scheduler_of(run)
    assert scheduler is not None
    assert getattr(scheduler.for_controller(run).settings, key) == value


@pytest.mark.parametrize(
    ("controller", "inside", "wanted"), [("job", False, True), ("job", True, False), ("here", False, False)]
)
def test_a_job_steers_where_it_is_asked_for_and_is_not_the_job_itself(
    monkeypatch: pytest.MonkeyPatch, controller: str, inside: bool, wanted: bool
) -> None:
    monkeypatch.delenv(controller_job.INSIDE, raising=False)
    if inside:
        monkeypatch.setenv(controller_job.INSIDE, "1")
    run = composed("hardware=slurm", f"search.controller={controller}")
    assert controller_job.wanted(run) is wanted


@pytest.mark.parametrize(
    ("overrides", "code", "key", "message"),
    [
        (["slurm.cpus=0"], "setting", "slurm.cpus", "0 is out of range; at least 1"),
        (["slurm.gpus=-1"], "setting", "slurm.gpus", "-1 is out of range; at least 0"),
        (["slurm.warning=-1"], "setting", "slurm.warning", "-1 is out of range; at least 0"),
        (
            ["slurm.parallel=0"],
            "setting",
            "slurm.parallel",
            "0 is out of range; at least 1 (null: as many as fit)",
        ),
        (["candidates_per_task=0"], "setting", "candidates_per_task", "0 is out of range; at least 1"),
        (["device=cuda"], "setting", "slurm.gpus", "0, but hardware.device=cuda needs one"),
        (["slurm.gpus=2"], "no-effect", "slurm.gpus", "2, but hardware.device=cpu uses none"),
        (["slurm.memory=plenty"], "type", "slurm.memory", "'plenty' is not a size"),
        (["slurm.time=tomorrow"], "type", "slurm.time", "'tomorrow' is not a time as Slurm writes it"),
        (["slurm.time=1:2:3:4"], "type", "slurm.time", "'1:2:3:4' is not a time as Slurm writes it"),
    ],
)
def test_a_wrong_setting_of_the_cluster_is_found(
    overrides: list[str], code: str, key: str, message: str
) -> None:
    run = composed("hardware=slurm", *(f"hardware.{o}" for o in overrides))
    (found,) = value_checks.check(run, [], "error")
    assert (found.severity, found.code, found.place, found.message) == (
        "error", code, f"hardware.{key}", message,
    )  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        ["slurm.time=90", "slurm.memory=200GB", "slurm.parallel=4", "slurm.warning=0"],
        ["candidates_per_task=3"],
        ["slurm.time='12:00:00'", "slurm.memory='0'", "slurm.partition=p"],
        ["slurm.time=2-00:00:00", "detach=true", "scratch=/nowhere"],
        ["device=cuda", "slurm.gpus=1"],
        ["device=cuda", "+slurm.options.gres='gpu:h100:1'"],
    ],
)  # fmt: skip
def test_a_right_setting_of_the_cluster_is_none(overrides: list[str]) -> None:
    marked = [f"+hardware.{o[1:]}" if o.startswith("+") else f"hardware.{o}" for o in overrides]
    assert list(value_checks.check(composed("hardware=slurm", *marked), [], "error")) == []


@pytest.mark.parametrize("setting", ["candidates_per_task=2", "detach=true", "scratch=/tmp"])
def test_a_setting_of_a_cluster_without_one_has_no_effect(setting: str) -> None:
    run = composed("hardware=cpu", f"hardware.{setting}")
    (found,) = value_checks.check(run, [], "error")
    assert (found.code, found.place) == ("no-effect", f"hardware.{setting.partition('=')[0]}")
    assert found.remedy == "Set hardware=slurm."


@pytest.mark.parametrize("option", ["comment", "job_name", "array", "output", "ntasks", "signal"])
def test_an_option_that_would_lose_the_job_is_an_error(option: str) -> None:
    run = composed("hardware=slurm", f"+hardware.slurm.options.{option}=mine")
    assert any(option in f.place for f in value_checks.check(run, [], "error"))


@pytest.mark.parametrize("name", sorted(p.stem for p in CONF.glob("slurm*.yaml")))
def test_every_cluster_that_is_shipped_composes_and_is_sound(name: str) -> None:
    run = composed(f"hardware={name}")
    assert run.hardware.slurm is not None
    assert list(value_checks.check(run, [], "error")) == []
    assert (run.hardware.device == "cpu") is (run.hardware.slurm.gpus == 0)


def succeeded(folder: Path, known: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A controller's job that has found so many lines; the jobs that it submits and cancels."""
    said: list[str] = []
    monkeypatch.setenv(controller_job.INSIDE, "1")
    monkeypatch.setenv("SLURM_JOB_ID", "60")
    monkeypatch.setattr(client, "submit", lambda path: said.append("submitted") or "61")
    monkeypatch.setattr(client, "cancel", lambda jobs: said.append(f"cancelled {list(jobs)}"))
    with controller_job.chained_resubmission(composed("hardware=slurm"), folder, [], known):
        said.append("steered")
    return said


def test_a_controller_submits_its_successor_first_and_takes_it_away_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert succeeded(tmp_path, 1, monkeypatch) == ["submitted", "steered", "cancelled ['61']"]
    text = (tmp_path / "slurm" / "controller001" / "job.sh").read_text(encoding="utf-8")
    assert "#SBATCH --dependency=afterany:60" in text and "#SBATCH --no-requeue" in text


def test_controllers_that_follow_each_other_without_progress_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known in (1, 5, 5, 5):
        succeeded(tmp_path, known, monkeypatch)
    with pytest.raises(StepError, match="3 controllers in a row ended without any progress"):
        succeeded(tmp_path, 5, monkeypatch)
    succeeded(tmp_path, 6, monkeypatch)


def test_slow_candidates_are_no_lack_of_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_job, "STALL_S", -1.0)  # as if each had lived for long
    for _ in range(5):
        succeeded(tmp_path, 5, monkeypatch)


@pytest.mark.parametrize(
    ("status", "told", "candidates", "whole"),
    [("done", 8, 8, True), ("done", 4, 8, False), ("settling", 8, 8, False), ("done", 8, 4, False)],
)
def test_a_result_counts_when_it_is_that_of_the_whole_budget(
    status: str, told: int, candidates: int, whole: bool
) -> None:
    lines = [{"event": "begin"}, *({"event": "candidate"} for _ in range(candidates))]
    assert controller_job.is_of({"status": status, "search": {"budget": told}}, lines, 8) is whole
    assert not controller_job.is_of({}, lines, 8)


@pytest.mark.parametrize("name", ["mergelab_cluster", "mergelab_slurm"])
def test_a_file_may_name_the_launcher_as_before(tmp_path: Path, name: str) -> None:
    from hydra import compose, initialize_config_dir
    from hydra.utils import get_class

    from mergelab import composition

    composition.register()
    with initialize_config_dir(str(composition.CONF)):
        cfg = compose("config", [f"hydra/launcher={name}"], return_hydra_config=True)
    assert get_class(cfg.hydra.launcher._target_).__name__ == "ArrayLauncher"
