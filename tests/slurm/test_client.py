"""What Slurm says, and how it is read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from patience import patience, token  # noqa: F401 (fixtures that every test has)

from mergelab.scheduling.scheduler import (
    ENDED,
    SchedulerLimitReached,
    SchedulerRejected,
    SchedulerUnavailable,
    Task,
)
from mergelab.slurm import client

CONF = Path(__file__).parents[2] / "conf" / "hardware"


FAILED = "sbatch: error: Batch job submission failed: "
POLICY = f"{FAILED}Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (f"{FAILED}Unable to contact slurm controller (connect failure)", SchedulerUnavailable),
        (f"{FAILED}Socket timed out on send/recv operation", SchedulerUnavailable),
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", SchedulerUnavailable),
        (
            "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying",
            SchedulerUnavailable,
        ),
        (f"sbatch: error: AssocMaxSubmitJobLimit\n{POLICY}", SchedulerLimitReached),
        (f"sbatch: error: QOSMaxSubmitJobPerUserLimit\n{POLICY}", SchedulerLimitReached),
        (f"{FAILED}Invalid job array specification", SchedulerLimitReached),
        (f"sbatch: error: QOSMaxWallDurationPerJobLimit\n{POLICY}", SchedulerRejected),
        (f"sbatch: error: QOSMaxCpuPerJobLimit\n{POLICY}", SchedulerRejected),
        (
            f"sbatch: error: invalid partition specified: nowhere\n{FAILED}Invalid partition name specified",
            SchedulerRejected,
        ),
        ("allocation failure: Requested node configuration is not available", SchedulerRejected),
        ("allocation failure: Invalid account or account/partition combination specified", SchedulerRejected),
        (f"{FAILED}Requested time limit is invalid (missing or exceeds some limit)", SchedulerRejected),
        ("sbatch: error: Memory specification can not be satisfied", SchedulerRejected),
        ("", SchedulerRejected),
    ],
)
def test_what_slurm_says_is_one_of_three_kinds_of_error(said: str, kind: type[Exception]) -> None:
    assert type(client.classify_error("sbatch", said)) is kind


def test_an_error_is_told_in_slurms_own_words_and_each_of_them_once() -> None:
    said = "sbatch: error: no such thing\n\nsbatch: error: no such thing\nallocation failure: too bad\n"
    assert str(client.classify_error("sbatch", said)) == "sbatch: no such thing; too bad"
    assert str(client.classify_error("sbatch", "")) == "sbatch: it failed without a message"


@pytest.mark.parametrize(
    ("state", "code", "words"),
    [
        ("FAILED", "1:0", "failed with exit status 1"),
        ("FAILED", "", "failed"),
        ("FAILED", "0:9", "killed by SIGKILL"),
        ("FAILED", "137:0", "killed by SIGKILL"),
        ("FAILED", "139:0", "killed by SIGSEGV"),
        pytest.param(
            "FAILED", "255:0", "failed with exit status 255"
        ),
        ("TIMEOUT", "0:15", "out of time"),
        ("OUT_OF_MEMORY", "0:125", "out of memory"),
        ("CANCELLED", "0:0", "cancelled"),
        ("PREEMPTED", "", "preempted"),
        ("SOMETHING_NEW", "", "something_new"),
    ],
)  # fmt: skip
def test_how_a_task_ended_in_words(state: str, code: str, words: str) -> None:
    assert Task("57", 3, state, exit=code).describe() == words


@pytest.mark.parametrize(
    ("state", "reason", "over", "stuck"),
    [
        ("PENDING", "Resources", False, False),
        ("PENDING", "launch failed requeued held", False, True),
        ("RUNNING", "None", False, False),
        ("COMPLETING", "None", False, False),
        ("REQUEUED", "None", False, False),
        ("FAILED", "launch failed requeued held", True, False),
        *((state, "None", True, False) for state in ENDED),
    ],
)
def test_which_states_are_an_end(state: str, reason: str, over: bool, stuck: bool) -> None:
    task = Task("57", 0, state, reason)
    assert (task.over, task.stuck) == (over, stuck)


Program = Callable[..., Path]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """`program("squeue", out=...)`: a command that says this; returns the file with its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, out: str = "", err: str = "", status: int = 0) -> Path:
        told = {end: folder / f"{name}.{end}" for end in ("out", "err", "arguments", "environment")}
        told["out"].write_text(out)
        told["err"].write_text(err)
        path = folder / name
        path.write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$@" > {told["arguments"]}\nenv > {told["environment"]}\n'
            f"cat {told['out']}\ncat {told['err']} >&2\nexit {status}\n"
        )
        path.chmod(0o755)
        return told["arguments"]

    return make


def test_the_queue_is_read_task_by_task(program: Program) -> None:
    given = program(
        "squeue",
        "57_0|RUNNING|None|n1|mergelab-1|b0002-0000\n"
        "57_11|PENDING|Resources||mergelab-1|b0002-0000\n"
        "58|COMPLETED|None|n2|a name with spaces|a comment | of two\n"
        "lines\n"
        "59|PENDING|Nodes required for job are DOWN, DRAINED||x|N/A\n"
        "60_[3-7]|PENDING|Priority||x|b0003-0000\n",
    )
    assert client.queue("mergelab-1") == [
        Task("57", 0, "RUNNING", "None", "n1", "", "b0002-0000", "mergelab-1", True),
        Task("57", 11, "PENDING", "Resources", "", "", "b0002-0000", "mergelab-1", True),
        Task("58", 0, "COMPLETED", "None", "n2", "", "a comment | of two", "a name with spaces", False),
        Task("59", 0, "PENDING", "Nodes required for job are DOWN, DRAINED", "", "", "", "x", False),
    ]
    assert {"--array", "--states=all", "--name=mergelab-1", f"--user={os.getuid()}"} <= {
        *given.read_text().split("\n")
    }


def test_an_empty_queue_and_one_of_all_names(program: Program) -> None:
    given = program("squeue")
    assert client.queue() == []
    assert "--name" not in given.read_text()


def test_a_users_own_formats_do_not_reach_the_commands(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = program("squeue")
    for name in ("SQUEUE_FORMAT", "SBATCH_PARTITION", "SLURM_JOB_ID", "SLURM_CONF"):
        monkeypatch.setenv(name, "mine")
    client.queue()
    seen = {line.partition("=")[0] for line in given.with_suffix(".environment").read_text().splitlines()}
    assert seen & {"SQUEUE_FORMAT", "SBATCH_PARTITION", "SLURM_JOB_ID", "SLURM_CONF"} == {"SLURM_CONF"}


def test_the_accounting_is_read_task_by_task(program: Program) -> None:
    given = program(
        "sacct",
        "56|CANCELLED by 1000|0:0|None assigned|sbatch --parsable /data/my sweep/slurm/b0001-0000/job.sh\n"
        "57_3|FAILED|137:0|n1|sbatch --parsable /data/sweep/slurm/b0002-0000/job.sh\n"
        "57_[0-7]|PENDING|0:0|None assigned|sbatch --parsable /data/sweep/slurm/b0002-0000/job.sh\n"
        "58|COMPLETED|0:0|n2|\n",
    )
    assert client.accounting(["56", "57", "58"]) == [
        Task("56", 0, "CANCELLED", "", "None assigned", "0:0", "b0001-0000"),
        Task("57", 3, "FAILED", "", "n1", "137:0", "b0002-0000", "", True),
        *[t for t in client.accounting(["57"]) if t.state == "PENDING"],
        Task("58", 0, "COMPLETED", "", "n2", "0:0", ""),
    ]
    assert "57" in given.read_text().split()


def test_what_was_cancelled_while_it_waited_is_every_task_of_its_range(program: Program) -> None:
    program("sacct", "57_[2-4,6%2]|CANCELLED by 0|0:0|None assigned|sbatch /s/slurm/b0002-0000/job.sh\n")
    assert [(t.index, t.state) for t in client.accounting(["57"])] == [(i, "CANCELLED") for i in (2, 3, 4, 6)]


def test_no_accounting_knows_nothing(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    program("sacct", err="Slurm accounting storage is disabled\n", status=1)
    assert client.accounting(["57"]) == client.accounting_by_name("mergelab-1") == []
    monkeypatch.setenv("PATH", "/nowhere")
    assert client.accounting(["57"]) == []


@pytest.mark.parametrize(
    "said", ["sacct: error: slurm_persist_conn_open: No route to host", "sacct: fatal: never heard of it"]
)
def test_any_other_trouble_of_the_accounting_may_pass(program: Program, said: str) -> None:
    program("sacct", err=said, status=1)
    with pytest.raises(SchedulerUnavailable):
        client.accounting(["57"])


def test_any_trouble_of_the_queue_may_pass(program: Program) -> None:
    program("squeue", err="slurm_load_jobs error: Unspecified error\n", status=1)
    with pytest.raises(SchedulerUnavailable):
        client.queue("mergelab-1")


def test_a_job_has_the_number_that_sbatch_says(program: Program, tmp_path: Path) -> None:
    given = program("sbatch", "57;a_cluster\n")
    assert client.submit(tmp_path / "a folder" / "job.sh") == "57"
    assert given.read_text().splitlines() == ["--parsable", str(tmp_path / "a folder" / "job.sh")]
    client.submit(tmp_path / "job.sh", test=True)
    assert "--test-only" in given.read_text().split()


def test_nobody_is_called_to_cancel_nothing(program: Program) -> None:
    given = program("scancel")
    client.cancel([])
    assert not given.exists()
    client.cancel(["57", "58_3"])
    assert given.read_text().split() == ["--quiet", "57", "58_3"]


@pytest.mark.parametrize(("said", "most"), [("MaxArraySize            = 1001\n", 1000), ("nothing\n", 1000),
                                            ("MaxArraySize=4", 3), ("MaxArraySize = 1", 1)])  # fmt: skip
def test_the_largest_array_is_one_less_than_what_bounds_its_numbers(
    program: Program, said: str, most: int
) -> None:
    program("scontrol", f"Configuration data\nMaxJobCount = 7\n{said}")
    assert client.array_limit() == most


def test_a_command_that_never_answers_is_away(
    program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program("squeue")
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr(client, "COMMAND_TIMEOUT_S", 0.3)
    with pytest.raises(SchedulerUnavailable, match=r"no answer for 0\.3 s"):
        client.queue()


def test_a_ctrl_c_in_the_middle_of_a_fork_is_not_lost(program: Program) -> None:
    program("squeue")
    code = """
import os, signal
from mergelab.slurm import client
os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGINT))
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    client.queue()
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.stdout == "interrupted\n", done.stderr
