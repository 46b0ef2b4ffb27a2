"""What a user types on a login node, on a real cluster, with the tiny family. What does not disturb others is
done at the same time (`slurm_together`)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import wandb_stub
from patience import until
from slurm_search import Lab, Labs, measured
from slurm_together import Ended, after
from wandb_stub import KEY

from mergelab.scheduling import submission_log

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("family")]

TASK = ("hardware=slurm", "hardware.slurm.memory=4GB")
RUN = ("method=linear", "eval=none")
RECORDED = ("tracking=wandb", "tracking.mode=offline")
SEARCH = ("search=cma", "search.budget=8", "search.population=4", "search.finalists=1", "eval.limit=40")


def result(folder: Path) -> Any:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def jobs(sweep: Path) -> list[str]:
    return [x["job"] for x in submission_log.read(sweep / "slurm") if x["event"] == "submitted"]


def here(lab: Lab) -> Path:
    """The search in one process."""
    lab.command("-m", *SEARCH, "hydra.sweep.dir=here", SLURM_CONF="/nonexistent")
    return lab.folder / "here"


def there(lab: Lab) -> tuple[Path, str, str]:
    """The same on the cluster, and again after somebody has removed its model."""
    disk = lab.folder / "disk"
    disk.mkdir()
    tasks = ("hardware.candidates_per_task=4", "hardware.scratch=$SCRATCH", "hydra.sweep.dir=there")
    first = lab.command("-m", *SEARCH, *TASK, *tasks, SCRATCH=str(disk)).stdout
    shutil.rmtree(lab.folder / "there" / "model")
    again = lab.command("-m", *SEARCH, *TASK, *tasks, SCRATCH=str(disk)).stdout
    return lab.folder / "there", first, again


@after(here, there)
def test_a_budget_of_8_in_populations_of_4_is_two_arrays_and_the_same_search(
    ended: Ended, labs: Labs
) -> None:
    alone, (sweep, out, _) = ended()
    assert measured(sweep) == measured(alone)
    assert len(measured(sweep)) == 8
    for key in ("genome", "fitness", "metrics", "verdict", "on_disk"):
        assert result(sweep)[key] == result(alone)[key], key
    tasks = labs.cluster.tasks(submission_log.job_name(sweep), set(jobs(sweep)))
    assert len({t["id"].partition("_")[0] for t in tasks if "_" in t["id"]}) == 2
    assert out.count("submitted array") == 2
    assert (sweep / "5" / "mergelab.log").exists() and list((sweep / "5").glob("slurm-*_*.out"))
    assert list((sweep.parent / "disk").glob("*/*")) == []  # nothing stays on the nodes' disks


def steered(lab: Lab) -> tuple[Path, str, str, str]:
    """A search whose first controller is killed: what the command says before, then, and to the end. The next
    controller is held until a command looks on, so that it cannot have ended by then."""
    sweep = lab.folder / "sweep"
    search = (
        "-m", *TASK, *SEARCH, "hardware.candidates_per_task=4", "search.controller=job",
        "hydra.sweep.dir=sweep",
    )  # fmt: skip
    first = lab.command(*search, "hardware.detach=true").stdout
    until(lambda: len(measured(sweep)) >= 4, "the first population is measured", 400, every=0.1)
    (job,) = [x["job"] for x in submission_log.read(sweep / "slurm") if x["event"] == "controller"]
    name = submission_log.job_name(sweep)
    waiting = lab.cluster.call("squeue", "-h", f"--name={name}", "--states=PD", "-o", "%i %k").splitlines()
    (successor,) = [x.split()[0] for x in waiting if x.split()[1].startswith("controller")]
    lab.cluster.call("scontrol", "hold", successor)
    lab.cluster.call("scancel", "--signal=KILL", "--full", job)
    second = lab.command(*search, "hardware.detach=true").stdout
    with lab.typed(*search) as process:
        assert process.stdout is not None
        third = "".join(takewhile(lambda line: "already controls this sweep" not in line, process.stdout))
        lab.cluster.call("scontrol", "release", successor)
        third += process.stdout.read()
    assert process.returncode == 0, third
    lab.cluster.emptied(name)  # no successor is left
    return sweep, first, second, third


@after(here, steered)
def test_a_sweep_steered_by_a_job_outlives_its_controllers(ended: Ended) -> None:
    alone, (sweep, first, second, third) = ended()
    assert "which controls the sweep" in first
    assert "already controls this sweep" in second
    assert len([x for x in submission_log.read(sweep / "slurm") if x["event"] == "controller"]) == 2
    assert result(sweep)["status"] == "done" and "winner" in third
    assert len(jobs(sweep)) == len(set(jobs(sweep)))
    assert measured(sweep) == measured(alone)


@after(there)
def test_a_model_that_somebody_has_removed_is_merged_again_and_no_candidate_is(ended: Ended) -> None:
    sweep, _, again = ended()
    assert "submitted job" in again and "submitted array" not in again
    assert (sweep / "model" / "config.json").exists()


def grid(lab: Lab) -> tuple[Path, str]:
    command = ("-m", *TASK, "method=linear,ties", "eval=none", *RECORDED, "hydra.sweep.dir=grid")
    return lab.folder / "grid", lab.command(*command).stdout


@after(grid)
def test_the_runs_of_a_grid_are_the_tasks_of_one_array(ended: Ended) -> None:
    sweep, out = ended()
    assert out.count("submitted array") == 1
    for i in range(2):
        assert result(sweep / str(i))["status"] == "done", i
    assert "2 runs, best first" in out
    # What nodes without internet have recorded is in one place, and one command uploads it.
    assert len(list((sweep / "wandb").glob("offline-run-*"))) == 2
    assert "wandb sync grid/wandb/offline-run-*" in out


def detached(lab: Lab) -> list[str]:
    """What a run says, the monitor while it runs, the run again, the monitor, and the run once more."""
    run = ("-m", *TASK, "method=task_arithmetic", "eval=none")

    def seen() -> str:
        out = lab.command("job=monitor").stdout
        return out if "running" in out else ""

    said = [lab.command(*run, "hardware.detach=true").stdout]
    said.append(until(seen, "it runs", 200, every=0.5))
    said += [lab.command(*run).stdout, lab.command("job=monitor").stdout]
    (sweep,) = (lab.folder / "multirun").glob("*/*")  # the second command made none of its own
    assert result(sweep / "0")["status"] == "done"
    said.append(lab.command(*run, "hardware.detach=true").stdout)
    for other in (lab.folder / "multirun").glob("*/*"):
        lab.cluster.call("scancel", f"--name={submission_log.job_name(other)}")
    return said


@after(detached)
def test_detached_runs_are_seen_by_the_monitor_and_picked_up_by_the_same_command(ended: Ended) -> None:
    first, seen, second, seen_again, third = ended()
    assert "submitted job" in first
    assert all(len(line) <= 80 for line in seen.splitlines())
    assert "submitted" not in second and "loads, generates" in second
    assert "done" in seen_again
    assert "submitted job" in third  # when all has been told, it is a new run


def too_large(lab: Lab) -> subprocess.CompletedProcess[str]:
    few = ("hardware=slurm", "hardware.slurm.memory=90MB", "hydra.sweep.dir=few")
    return lab.command("-m", *few, *RUN, status=1)


@after(too_large)
def test_a_run_that_fails_says_why_in_the_terminal(ended: Ended) -> None:
    done = ended()
    assert "out of memory" in done.stderr and "few/0/mergelab.log" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def mended(lab: Lab) -> tuple[Path, list[str], int]:
    """What the same command says three times: before and after what fails is mended, and when all is done.
    It is recorded on its node and uploaded from the login node; how many runs the server has then."""
    setup = f'hardware.slurm.setup=["[ -e {lab.folder}/mended ] || exit 3"]'
    run = ("-m", *TASK, setup, *RUN, *RECORDED, "tracking.sync=true", "hydra.sweep.dir=one")
    with wandb_stub.serve() as server:
        online = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        said = [lab.command(*run, status=1, **online).stderr]
        (lab.folder / "mended").touch()
        said += [lab.command(*run, **online).stdout for _ in range(2)]
        return lab.folder / "one", said, len(server.runs)


@after(mended)
def test_what_has_failed_is_tried_again_by_the_same_command(ended: Ended) -> None:
    _, (failed, done, again), _ = ended()
    assert "failed with exit status 3" in failed
    assert "loads, generates" in done
    assert "loads, generates" in again and "submitted" not in again  # what is done is shown, not done


@after(mended)
def test_offline_records_are_uploaded_from_the_login_node(ended: Ended) -> None:
    sweep, (_, done, _), there = ended()
    assert "1 runs uploaded" in done
    assert there == 1
    assert list((sweep / "wandb").glob("offline-run-*/*.synced"))


def test_the_monitor_in_a_live_terminal_ends_with_ctrl_c(labs: Labs, tmp_path: Path) -> None:
    import pty

    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "from mergelab.cli.main import monitor; monitor()"], cwd=tmp_path,
        stdin=follower, stdout=follower, stderr=follower,
        env=labs.cluster.env | {"TERM": "xterm", "COLUMNS": "80"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whoever started us may ignore it
    )  # fmt: skip
    os.close(follower)
    said = b""
    while b"nothing runs" not in said:
        said += os.read(leader, 4096)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    assert not list(tmp_path.iterdir())  # it wrote nothing
