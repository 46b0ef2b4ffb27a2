"""What a user types on a login node, on a real cluster, with the tiny family."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb_stub
from patience import until
from slurm_cluster import Cluster
from wandb_stub import KEY, Stub

from mergelab.optimization.journal import read
from mergelab.slurm import ledger

pytestmark = pytest.mark.slurm

TASK = ("hardware=slurm", "hardware.slurm.memory=4GB")
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(cluster: Cluster, family: Any, tmp_path: Path) -> Command:
    """`command("-m", ...)`: on the login node, in a directory of its own."""

    def run(*arguments: str, status: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "mergelab", *arguments], env=cluster.env | env, cwd=tmp_path, text=True,
            capture_output=True, check=False, timeout=700,
        )  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        return done

    return run


def candidates(folder: Path) -> list[dict[str, Any]]:
    return [x for x in read(folder / "journal.jsonl") if x["event"] == "candidate"]


def result(folder: Path) -> Any:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_a_budget_of_24_in_populations_of_8_is_three_arrays_and_the_same_search(
    command: Command, cluster: Cluster, tmp_path: Path
) -> None:
    search = ["-m", "search=cma", "search.budget=24", "search.population=8"]
    command(*search, "hydra.sweep.dir=here", SLURM_CONF="/nonexistent")
    there = ["hardware.candidates_per_task=4", "hardware.scratch=$SCRATCH", "hydra.sweep.dir=there"]
    (tmp_path / "disk").mkdir()
    out = command(*search, *TASK, *there, SCRATCH=str(tmp_path / "disk")).stdout

    here, there_ = tmp_path / "here", tmp_path / "there"
    assert candidates(there_) == candidates(here)
    assert [x["genome"] for x in candidates(there_)] == [x["genome"] for x in candidates(here)]
    for key in ("genome", "fitness", "metrics", "verdict", "on_disk"):
        assert result(there_)[key] == result(here)[key], key
    name = ledger.job_name(there_)
    jobs = {x["job"] for x in ledger.read(there_) if x["event"] == "submitted"}
    arrays = {t["id"].partition("_")[0] for t in cluster.tasks(name, jobs) if "_" in t["id"]}
    assert len(arrays) == 3
    assert out.count("submitted array") == 3
    assert (there_ / "17" / "mergelab.log").exists() and list((there_ / "17").glob("slurm-*_*.out"))
    assert list((tmp_path / "disk").glob("*/*")) == []  # nothing stays on the nodes' disks

    # A model that somebody has removed is merged again; no candidate is.
    shutil.rmtree(there_ / "model")
    again = command(*search, *TASK, *there, SCRATCH=str(tmp_path / "disk")).stdout
    assert "submitted job" in again and "submitted array" not in again
    assert (there_ / "model" / "config.json").exists()


def test_the_runs_of_a_grid_are_the_tasks_of_one_array(command: Command, tmp_path: Path) -> None:
    recorded = ["tracking=wandb", "tracking.mode=offline", "hydra.sweep.dir=grid"]
    done = command("-m", *TASK, "method=linear,ties", "eval=none", *recorded)
    assert done.stdout.count("submitted array") == 1
    for i in range(2):
        assert result(tmp_path / "grid" / str(i))["status"] == "done", i
    assert "2 runs, best first" in done.stdout
    # What nodes without internet have recorded is in one place, and one command uploads it.
    assert len(list((tmp_path / "grid" / "wandb").glob("offline-run-*"))) == 2
    assert "wandb sync grid/wandb/offline-run-*" in done.stdout


@pytest.fixture
def server() -> Iterator[Stub]:
    with wandb_stub.serve() as stub:
        yield stub


def test_offline_records_are_uploaded_from_the_login_node(
    command: Command, server: Stub, tmp_path: Path
) -> None:
    online = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
    done = command(
        "-m", *TASK, "method=linear", "eval=none", "tracking=wandb", "tracking.mode=offline",
        "tracking.sync=true", "hydra.sweep.dir=one", **online,
    )  # fmt: skip
    assert "1 runs uploaded" in done.stdout, done.stdout
    assert len(server.runs) == 1
    assert list((tmp_path / "one" / "wandb").glob("offline-run-*/*.synced"))


def test_detached_runs_are_seen_by_the_monitor_and_picked_up_by_the_same_command(
    command: Command, tmp_path: Path
) -> None:
    run = ["-m", *TASK, "method=task_arithmetic", "eval=none"]
    first = command(*run, "hardware.detach=true").stdout
    assert "submitted job" in first
    seen = until(lambda: (out := command("job=monitor").stdout) and "running" in out and out, "it runs", 120)
    assert all(len(line) <= 80 for line in seen.splitlines())
    second = command(*run).stdout
    assert "submitted" not in second and "loads, generates" in second
    (sweep,) = (tmp_path / "multirun").glob("*/*")  # the second command made none of its own
    assert result(sweep / "0")["status"] == "done"
    assert "done" in command("job=monitor").stdout
    assert "submitted job" in command(*run).stdout  # when all has been told, it is a new run


def test_a_run_that_fails_says_why_in_the_terminal(command: Command, tmp_path: Path) -> None:
    few = ["hardware=slurm", "hardware.slurm.memory=90MB", "eval=none", "hydra.sweep.dir=few"]
    done = command("-m", *few, "method=linear", status=1)
    assert "out of memory" in done.stderr and "few/0/mergelab.log" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_what_has_failed_is_tried_again_by_the_same_command(command: Command, tmp_path: Path) -> None:
    setup = f'hardware.slurm.setup=["[ -e {tmp_path}/mended ] || exit 3"]'
    run = ["-m", *TASK, setup, "eval=none", "method=linear", "hydra.sweep.dir=here"]
    assert "failed with exit status 3" in command(*run, status=1).stderr
    (tmp_path / "mended").touch()
    assert "loads, generates" in command(*run).stdout
    again = command(*run).stdout  # and what is done is shown, not done
    assert "loads, generates" in again and "submitted" not in again


def test_a_sweep_steered_by_a_job_outlives_its_controllers(
    command: Command, cluster: Cluster, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    search = [
        "-m", *TASK, "search=cma", "search.budget=12", "search.population=4", "eval.limit=40",
        "hardware.candidates_per_task=4", "search.controller=job", "hydra.sweep.dir=sweep",
        "search.finalists=1",
    ]  # fmt: skip
    out = command(*search, "hardware.detach=true").stdout
    assert "which steers the sweep" in out
    until(lambda: len(candidates(sweep)) >= 4, "the first population is measured", 400)
    (job,) = [x["job"] for x in ledger.read(sweep) if x["event"] == "controller"]
    cluster.call("scancel", "--signal=KILL", "--full", job)
    assert "steers this sweep already" in command(*search, "hardware.detach=true").stdout
    out = command(*search).stdout
    steered = [x["job"] for x in ledger.read(sweep) if x["event"] == "controller"]
    assert len(steered) == 2 and steered[0] == job
    assert result(sweep)["status"] == "done" and "winner" in out
    jobs = [x["job"] for x in ledger.read(sweep) if x["event"] == "submitted"]
    assert len(jobs) == len(set(jobs))
    until(lambda: not cluster.call("squeue", "-h"), "no successor is left", 120)

    ours = ("hardware", "search.controller", "hydra")
    command(*(a for a in search if not a.startswith(ours)), "hydra.sweep.dir=here", SLURM_CONF="/nonexistent")
    assert candidates(sweep) == candidates(tmp_path / "here")


def test_the_monitor_in_a_live_terminal_ends_with_ctrl_c(command: Command, tmp_path: Path) -> None:
    import pty

    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "from mergelab.main import monitor; monitor()"], cwd=tmp_path,
        stdin=follower, stdout=follower, stderr=follower, env=os.environ | {"TERM": "xterm", "COLUMNS": "80"},
    )  # fmt: skip
    os.close(follower)
    said = b""
    while b"nothing runs" not in said:
        said += os.read(leader, 4096)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    assert not list(tmp_path.iterdir())  # it wrote nothing
