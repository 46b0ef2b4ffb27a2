"""The batch script, as text and really run by bash."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from patience import patience, token, until  # noqa: F401 (fixtures that every test has)

from mergelab.merging import node_local_cache
from mergelab.scheduling.scheduler import JobRequest
from mergelab.schema import Slurm
from mergelab.slurm import sbatch_script

OURS = node_local_cache.own_name("task-")


FOLDER = Path("/data/slurm/b0001-0000")


def job(command: Sequence[str] = ("true",), folder: Path = FOLDER, **about: Any) -> JobRequest:
    """A job that runs a command."""
    return JobRequest(folder, "mergelab-1", command, **about)


def script(command: Sequence[str] = ("true",), folder: Path = FOLDER, **about: Any) -> str:
    """The script of a task with these settings; other arguments are those of the job."""
    own = {k: about.pop(k) for k in list(about) if k in Slurm.__dataclass_fields__}
    return sbatch_script.text(Slurm(**own), job(command, folder, **about), Path("/home/me"))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"partition": "gpu"}, "--partition=gpu"),
        ({"account": "proj1"}, "--account=proj1"),
        ({"qos": "long"}, "--qos=long"),
        ({"constraint": "a100&nvlink"}, "--constraint='a100&nvlink'"),
        ({"time": "2-00:00:00"}, "--time=2-00:00:00"),
        ({"memory": "200GB"}, "--mem=200G"),
        ({"memory": "500 mb"}, "--mem=500M"),
        ({"memory": "0"}, "--mem=0"),
        ({"cpus": 12}, "--cpus-per-task=12"),
        ({"gpus": 2}, "--gres=gpu:2"),
        ({"gpus": 2, "gpu_type": "a100"}, "--gres=gpu:a100:2"),
        ({"exclusive": True}, "--exclusive"),
        ({"warning": 30}, "--signal=B:USR2@30"),
        ({"parallel": 4, "tasks": 8}, "--array=0-7%4"),
        ({"tasks": 8}, "--array=0-7"),
        ({"tasks": 8}, "--output=/data/slurm/b0001-0000/%A_%a.out"),
        ({}, "--output=/data/slurm/b0001-0000/%j.out"),
        ({}, "--comment=b0001-0000"),
        ({}, "--job-name=mergelab-1"),
        ({}, "--chdir=/home/me"),
        ({}, "--requeue"),
        ({"restart": False}, "--no-requeue"),
        ({"ranks": 4}, "--ntasks-per-node=4"),
        ({"options": {"exclude": "n13", "mail_type": "END"}}, "--mail-type=END"),
        ({"options": {"gres": "gpu:h100:1"}, "gpus": 2}, "--gres=gpu:h100:1"),
        ({"options": {"contiguous": True}}, "--contiguous"),
        ({"options": {"nice": 0}}, "--nice=0"),
        ({"after": "60"}, "--dependency=afterany:60"),
    ],
)
def test_each_setting_is_a_line_of_the_script(settings: dict[str, Any], line: str) -> None:
    lines = script(**settings).splitlines()
    assert lines[0] == "#!/bin/bash"
    option = line.partition("=")[0]
    assert [x for x in lines if x.split("=")[0] == f"#SBATCH {option}"] == [f"#SBATCH {line}"]


def test_every_setting_is_looked_at() -> None:
    plain = script(tasks=2)
    changed = {"partition": "p", "account": "a", "qos": "q", "constraint": "c", "time": "9", "memory": "9GB",
               "cpus": 9, "gpus": 9, "exclusive": True, "parallel": 9, "options": {"nice": 9},
               "warning": 9}  # fmt: skip
    for key, value in changed.items():
        assert script(tasks=2, **{key: value}) != plain, key
    elsewhere = {"setup", "gpu_type"}
    assert {*changed, *elsewhere} == {*Slurm.__dataclass_fields__}


@pytest.mark.parametrize("key", ["partition", "account", "qos", "constraint", "time", "mem", "gres",
                                 "exclusive", "array", "no-requeue"])  # fmt: skip
def test_what_is_not_asked_for_is_left_to_the_cluster(key: str) -> None:
    assert f"#SBATCH --{key}=" not in script()


@pytest.mark.parametrize("nothing", [None, False])
def test_an_option_may_be_taken_away(nothing: Any) -> None:
    assert "requeue" not in script(options={"requeue": nothing})


def test_paths_with_spaces_are_quoted() -> None:
    text = script(["my program", "an argument"], Path("/my data/b0001-0000"))
    assert "#SBATCH --output='/my data/b0001-0000/%j.out'" in text
    assert "'my program' 'an argument' &" in text
    assert "'/my data/b0001-0000/status'" in text


def test_the_users_lines_come_before_the_command_and_after_what_is_asked() -> None:
    text = script(["work"], setup=["module load cuda", "source v/bin/activate"])
    places = [text.index(x) for x in ("#SBATCH --job-name", "module load cuda", "source v", "work &")]
    assert places == sorted(places)


def test_several_processes_are_started_by_srun() -> None:
    assert "srun" not in script(["work"])
    line = "srun --ntasks=4 --cpus-per-task=12 --kill-on-bad-exit=0 work &"
    assert line in script(["work"], ranks=4, cpus=12)


def started(tmp_path: Path, *command: str, setup: Sequence[str] = ()) -> subprocess.Popen[str]:
    """The script of a command, really run by bash, as task 3 of its array."""
    path = tmp_path / "job.sh"
    path.write_text(script(command, tmp_path, setup=setup, scratch=str(tmp_path)))
    return subprocess.Popen(
        ["bash", str(path)], cwd=tmp_path, env={**os.environ, "SLURM_ARRAY_TASK_ID": "3"}, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("command", "status"), [("exit 0", 0), ("exit 3", 3), ("kill -KILL $$", 137), ("no_such_program", 127)]
)
def test_the_commands_exit_status_is_the_scripts_and_in_a_file(
    tmp_path: Path, command: str, status: int
) -> None:
    left = tmp_path / f"{OURS}1"  # on the node's disk
    left.mkdir()
    left.with_name(f"{left.name}.lock").touch()
    process = started(tmp_path, "bash", "-c", command)
    process.communicate(timeout=30)
    assert process.returncode == status
    assert (tmp_path / "status.3").read_text() == f"{status}\n"
    assert left.exists() is (status == 0)


@pytest.mark.parametrize("line", ["set -e", "set -euo pipefail"])
def test_a_strict_setup_changes_nothing(tmp_path: Path, line: str) -> None:
    process = started(tmp_path, "bash", "-c", "exit 3", setup=[line])
    process.communicate(timeout=30)
    assert process.returncode == 3
    assert (tmp_path / "status.3").read_text() == "3\n"


def test_the_command_has_what_the_setup_exports(tmp_path: Path) -> None:
    process = started(tmp_path, "bash", "-c", "echo $OF_OURS", setup=["export OF_OURS='a value'"])
    assert process.communicate(timeout=30)[0] == "a value\n"


LISTENER = """
trap 'echo {signal} >> heard; {then}' {signal}
touch ready
while [ ! -e go ]; do sleep 0.02; done
exit 5
"""


@pytest.mark.parametrize(
    ("name", "then", "status"), [("USR2", "true", 5), ("TERM", "true", 5), ("TERM", "sleep 0.2; exit 9", 9)]
)
def test_a_signal_reaches_the_command_which_decides_what_comes_of_it(
    tmp_path: Path, name: str, then: str, status: int
) -> None:
    process = started(tmp_path, "bash", "-c", LISTENER.format(signal=name, then=then))
    until((tmp_path / "ready").exists)
    for n in (1, 2) if then == "true" else (1,):
        process.send_signal(getattr(signal, f"SIG{name}"))
        until(
            lambda n=n: (tmp_path / "heard").exists() and len((tmp_path / "heard").read_text().split()) == n
        )
        if then == "true":
            assert process.poll() is None
    (tmp_path / "go").touch()
    process.communicate(timeout=30)
    assert process.returncode == status
    assert (tmp_path / "status.3").read_text() == f"{status}\n"


def test_a_command_that_ends_by_the_signal_says_so(tmp_path: Path) -> None:
    process = started(tmp_path, "sleep", "60", setup=["touch ready"])
    until((tmp_path / "ready").exists)
    time.sleep(0.3)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
