"""What work on Slurm is made of, where no Slurm is needed: its words, its scripts, its books, its disks."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from composing import composed

from mergelab import pulse, syncing
from mergelab.errors import InputError, StepError
from mergelab.merging import scratch
from mergelab.preflight import settings
from mergelab.schema import Slurm, Tracking
from mergelab.search import steered
from mergelab.slurm import batches, commands, ledger, script
from mergelab.slurm.batches import Batches, Done, Item
from mergelab.slurm.commands import Away, Limited, Refused, Task
from mergelab.slurm.ledger import Claim, Ledger
from mergelab.workspace import write_json

CONF = Path(__file__).parent.parent / "conf" / "hardware"


def until(holds: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it has not come to that"
        time.sleep(0.02)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """End what waits for ever."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """No test waits for ever."""
    with within(60):
        yield


def bug(why: str) -> Any:
    """What should be, and is not yet."""
    return pytest.mark.xfail(strict=True, reason=why)


# ---------------------------------------------------------------- what Slurm says

FAILED = "sbatch: error: Batch job submission failed: "
POLICY = f"{FAILED}Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (f"{FAILED}Unable to contact slurm controller (connect failure)", Away),
        (f"{FAILED}Socket timed out on send/recv operation", Away),
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", Away),
        ("sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying", Away),
        (f"sbatch: error: AssocMaxSubmitJobLimit\n{POLICY}", Limited),
        (f"sbatch: error: QOSMaxSubmitJobPerUserLimit\n{POLICY}", Limited),
        (f"{FAILED}Invalid job array specification", Limited),
        (f"sbatch: error: QOSMaxWallDurationPerJobLimit\n{POLICY}", Refused),
        (f"sbatch: error: QOSMaxCpuPerJobLimit\n{POLICY}", Refused),
        (
            f"sbatch: error: invalid partition specified: nowhere\n{FAILED}Invalid partition name specified",
            Refused,
        ),
        ("allocation failure: Requested node configuration is not available", Refused),
        ("allocation failure: Invalid account or account/partition combination specified", Refused),
        (f"{FAILED}Requested time limit is invalid (missing or exceeds some limit)", Refused),
        ("sbatch: error: Memory specification can not be satisfied", Refused),
        ("", Refused),
    ],
)
def test_what_slurm_says_is_one_of_three_kinds_of_error(said: str, kind: type[Exception]) -> None:
    assert type(commands.sorted_out("sbatch", said)) is kind


def test_an_error_is_told_in_slurms_own_words_and_each_of_them_once() -> None:
    said = "sbatch: error: no such thing\n\nsbatch: error: no such thing\nallocation failure: too bad\n"
    assert str(commands.sorted_out("sbatch", said)) == "sbatch: no such thing; too bad"
    assert str(commands.sorted_out("sbatch", "")) == "sbatch: failed without a word"


@pytest.mark.parametrize(
    ("state", "code", "words"),
    [
        ("FAILED", "1:0", "failed with exit status 1"),
        ("FAILED", "", "failed"),
        ("FAILED", "0:9", "killed by SIGKILL"),
        ("FAILED", "137:0", "killed by SIGKILL"),
        ("FAILED", "139:0", "killed by SIGSEGV"),
        pytest.param(
            "FAILED", "255:0", "failed with exit status 255",
            marks=bug("commands._signal takes every exit status above 128 for a signal"),
        ),
        ("TIMEOUT", "0:15", "out of time"),
        ("OUT_OF_MEMORY", "0:125", "out of memory"),
        ("CANCELLED", "0:0", "cancelled"),
        ("PREEMPTED", "", "preempted"),
        ("SOMETHING_NEW", "", "something_new"),
    ],
)  # fmt: skip
def test_how_a_task_ended_in_words(state: str, code: str, words: str) -> None:
    assert Task("57", 3, state, exit=code).words() == words


@pytest.mark.parametrize(
    ("state", "reason", "over", "stuck"),
    [
        ("PENDING", "Resources", False, False),
        ("PENDING", "launch failed requeued held", False, True),
        ("RUNNING", "None", False, False),
        ("COMPLETING", "None", False, False),
        ("REQUEUED", "None", False, False),
        ("FAILED", "launch failed requeued held", True, False),
        *((state, "None", True, False) for state in commands.ENDED),
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
        "57_0|RUNNING|None|n1|b0002|mergelab-1\n"
        "57_11|PENDING|Resources||b0002|mergelab-1\n"
        "58|COMPLETED|None|n2|(null)|a name with spaces | and more\n"
        "59|PENDING|Nodes required for job are DOWN, DRAINED||N/A|x\n"
        "60_[3-7]|PENDING|Priority||b0003|x\n",
    )
    assert commands.queue("mergelab-1") == [
        Task("57", 0, "RUNNING", "None", "n1", "", "b0002", "mergelab-1", True),
        Task("57", 11, "PENDING", "Resources", "", "", "b0002", "mergelab-1", True),
        Task("58", 0, "COMPLETED", "None", "n2", "", "", "a name with spaces | and more", False),
        Task("59", 0, "PENDING", "Nodes required for job are DOWN, DRAINED", "", "", "", "x", False),
    ]
    assert {"--array", "--states=all", "--name=mergelab-1", f"--user={os.getuid()}"} <= {
        *given.read_text().split("\n")
    }


def test_an_empty_queue_and_one_of_all_names(program: Program) -> None:
    given = program("squeue")
    assert commands.queue() == []
    assert "--name" not in given.read_text()


def test_a_users_own_formats_do_not_reach_the_commands(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = program("squeue")
    for name in ("SQUEUE_FORMAT", "SBATCH_PARTITION", "SLURM_JOB_ID", "SLURM_CONF"):
        monkeypatch.setenv(name, "mine")
    commands.queue()
    seen = {line.partition("=")[0] for line in given.with_suffix(".environment").read_text().splitlines()}
    assert seen & {"SQUEUE_FORMAT", "SBATCH_PARTITION", "SLURM_JOB_ID", "SLURM_CONF"} == {"SLURM_CONF"}


def test_the_accounting_is_read_task_by_task(program: Program) -> None:
    given = program(
        "sacct",
        "56|CANCELLED by 1000|0:0|None assigned|sbatch --parsable /data/my sweep/slurm/b0001/job.sh\n"
        "57_3|FAILED|137:0|n1|sbatch --parsable /data/sweep/slurm/b0002/job.sh\n"
        "57_[0-7]|PENDING|0:0|None assigned|sbatch --parsable /data/sweep/slurm/b0002/job.sh\n"
        "58|COMPLETED|0:0|n2|\n",
    )
    assert commands.accounted(["56", "57", "58"]) == [
        Task("56", 0, "CANCELLED", "", "None assigned", "0:0", "b0001"),
        Task("57", 3, "FAILED", "", "n1", "137:0", "b0002"),
        *[t for t in commands.accounted(["57"]) if t.state == "PENDING"],
        Task("58", 0, "COMPLETED", "", "n2", "0:0", ""),
    ]
    assert "57" in given.read_text().split()


@bug("commands._sacct takes what waits of an array for its first task")
def test_what_was_cancelled_while_it_waited_is_every_task_of_its_range(program: Program) -> None:
    program("sacct", "57_[2-4,6%2]|CANCELLED by 0|0:0|None assigned|sbatch /s/slurm/b0002/job.sh\n")
    assert [(t.index, t.state) for t in commands.accounted(["57"])] == [
        (i, "CANCELLED") for i in (2, 3, 4, 6)
    ]


def test_no_accounting_knows_nothing(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    program("sacct", err="Slurm accounting storage is disabled\n", status=1)
    assert commands.accounted(["57"]) == commands.accounted_by_name("mergelab-1") == []
    monkeypatch.setenv("PATH", "/nowhere")
    assert commands.accounted(["57"]) == []


@pytest.mark.parametrize(
    "said", ["sacct: error: slurm_persist_conn_open: No route to host", "sacct: fatal: never heard of it"]
)
def test_any_other_trouble_of_the_accounting_may_pass(program: Program, said: str) -> None:
    program("sacct", err=said, status=1)
    with pytest.raises(Away):
        commands.accounted(["57"])


@bug("commands.queue lets a text that nobody has seen yet end the sweep, as Refused")
def test_any_trouble_of_the_queue_may_pass(program: Program) -> None:
    program("squeue", err="slurm_load_jobs error: Unspecified error\n", status=1)
    with pytest.raises(Away):
        commands.queue("mergelab-1")


def test_a_job_has_the_number_that_sbatch_says(program: Program, tmp_path: Path) -> None:
    given = program("sbatch", "57;a_cluster\n")
    assert commands.submit(tmp_path / "a folder" / "job.sh") == "57"
    assert given.read_text().splitlines() == ["--parsable", str(tmp_path / "a folder" / "job.sh")]
    commands.submit(tmp_path / "job.sh", test=True)
    assert "--test-only" in given.read_text().split()


def test_nobody_is_called_to_cancel_nothing(program: Program) -> None:
    given = program("scancel")
    commands.cancel([])
    assert not given.exists()
    commands.cancel(["57", "58_3"])
    assert given.read_text().split() == ["--quiet", "57", "58_3"]


@pytest.mark.parametrize(("said", "most"), [("MaxArraySize            = 1001\n", 1000), ("nothing\n", 1000),
                                            ("MaxArraySize=4", 3), ("MaxArraySize = 1", 1)])  # fmt: skip
def test_the_largest_array_is_one_less_than_what_bounds_its_numbers(
    program: Program, said: str, most: int
) -> None:
    program("scontrol", f"Configuration data\nMaxJobCount = 7\n{said}")
    assert commands.array_limit() == most


def test_a_command_that_never_answers_is_away(
    program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program("squeue")
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr(commands, "PATIENCE", 0.3)
    with pytest.raises(Away, match=r"no answer for 0\.3 s"):
        commands.queue()


# ---------------------------------------------------------------- the script


def asked(folder: Path = Path("/data/slurm/b0001"), **about: Any) -> dict[str, Any]:
    """The options of a task with these settings; what is no setting is an argument of `options`."""
    own = {k: about.pop(k) for k in list(about) if k in Slurm.__dataclass_fields__}
    return script.options(Slurm(**own), name="mergelab-1", folder=folder, cwd=Path("/home/me"), **about)


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
        ({"tasks": 8}, "--output=/data/slurm/b0001/%A_%a.out"),
        ({}, "--output=/data/slurm/b0001/%j.out"),
        ({}, "--comment=b0001"),
        ({}, "--job-name=mergelab-1"),
        ({}, "--chdir=/home/me"),
        ({}, "--requeue"),
        ({"requeue": False}, "--no-requeue"),
        ({"ranks": 4}, "--ntasks-per-node=4"),
        ({"options": {"exclude": "n13", "mail_type": "END"}}, "--mail-type=END"),
        ({"options": {"gres": "gpu:h100:1"}, "gpus": 2}, "--gres=gpu:h100:1"),
        ({"options": {"contiguous": True}}, "--contiguous"),
        ({"options": {"nice": 0}}, "--nice=0"),
    ],
)
def test_each_setting_is_a_line_of_the_script(settings: dict[str, Any], line: str) -> None:
    lines = script.text(asked(**settings), ["true"], status=Path("/data/status")).splitlines()
    assert lines[0] == "#!/bin/bash"
    option = line.partition("=")[0]
    assert [x for x in lines if x.split("=")[0] == f"#SBATCH {option}"] == [f"#SBATCH {line}"]


def test_every_setting_is_looked_at() -> None:
    plain = script.text(asked(tasks=2), ["true"])
    changed = {"partition": "p", "account": "a", "qos": "q", "constraint": "c", "time": "9", "memory": "9GB",
               "cpus": 9, "gpus": 9, "exclusive": True, "parallel": 9, "options": {"nice": 9},
               "warning": 9}  # fmt: skip
    for key, value in changed.items():
        assert script.text(asked(tasks=2, **{key: value}), ["true"]) != plain, key
    elsewhere = {"setup", "gpu_type"}
    assert {*changed, *elsewhere} == {*Slurm.__dataclass_fields__}


@pytest.mark.parametrize("key", ["partition", "account", "qos", "constraint", "time", "mem", "gres",
                                 "exclusive", "array", "no-requeue"])  # fmt: skip
def test_what_is_not_asked_for_is_left_to_the_cluster(key: str) -> None:
    assert key not in asked()


@pytest.mark.parametrize("nothing", [None, False])
def test_an_option_may_be_taken_away(nothing: Any) -> None:
    assert "requeue" not in asked(options={"requeue": nothing})


def test_paths_with_spaces_are_quoted() -> None:
    text = script.text(asked(folder=Path("/my data/b0001")), ["my program", "an argument"],
                       status=Path("/my data/status"))  # fmt: skip
    assert "#SBATCH --output='/my data/b0001/%j.out'" in text
    assert "'my program' 'an argument' &" in text
    assert "'/my data/status'" in text


def test_the_users_lines_come_before_the_command_and_after_what_is_asked() -> None:
    text = script.text(asked(), ["work"], setup=["module load cuda", "source v/bin/activate"],
                       status=Path("/s"))  # fmt: skip
    places = [text.index(x) for x in ("#SBATCH --job-name", "module load cuda", "source v", "work &")]
    assert places == sorted(places)


def test_several_processes_are_started_by_srun() -> None:
    assert "srun" not in script.text(asked(), ["work"])
    assert "srun --ntasks=4 --cpus-per-task=12 --kill-on-bad-exit=0 work &" in script.text(
        asked(ranks=4), ["work"], ranks=4, cpus=12
    )


def started(
    tmp_path: Path, *command: str, setup: Sequence[str] = (), after: str = ""
) -> subprocess.Popen[str]:
    """The script of a command, really run by bash, as task 3 of its array."""
    path = tmp_path / "job.sh"
    path.write_text(
        script.text(asked(tmp_path), command, setup=setup, status=tmp_path / "status", after=after)
    )
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
    process = started(tmp_path, "bash", "-c", command, after="touch afterwards")
    process.communicate(timeout=30)
    assert process.returncode == status
    assert (tmp_path / "status.3").read_text() == f"{status}\n"
    assert (tmp_path / "afterwards").exists()


@bug("script.WORK: after `set -e`, `wait` ends the script")
@pytest.mark.parametrize("line", ["set -e", "set -euo pipefail"])
def test_a_strict_setup_changes_nothing(tmp_path: Path, line: str) -> None:
    process = started(tmp_path, "bash", "-c", "exit 3", setup=[line], after="touch afterwards")
    process.communicate(timeout=30)
    assert process.returncode == 3
    assert (tmp_path / "status.3").exists() and (tmp_path / "afterwards").exists()


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


# ---------------------------------------------------------------- the ledger

A, B, C = ("a", 1), ("b", 1), ("c", 1)


def booked(folder: Path) -> Ledger:
    """Two tasks of a batch that became a job: the first has two items."""
    book = Ledger(folder, "mergelab-1")
    batch = book.intend([[A, B], [C]], True, {"a": "0", "b": "1", "c": "2"})
    book.place(batch).mkdir()
    book.submitted(batch, "57")
    return book


def told(book: Ledger) -> Any:
    return (book.name, book.claims, book.tasks, book.jobs, book.void, book.ended, book.times, book.open(),
            book.live(), book.controllers())  # fmt: skip


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    book = booked(tmp_path)
    assert book.claims == {A: Claim("b0001", 0), B: Claim("b0001", 0), C: Claim("b0001", 1)}
    assert book.live() == [("b0001", 0), ("b0001", 1)]
    book.over("b0001", 0, "PREEMPTED", "preempted", [B])
    book.controller("60", 12)
    again = Ledger(tmp_path, "another name")
    assert told(again) == told(book)
    assert again.name == "mergelab-1"
    assert again.controllers() == [("60", 12)]
    assert again.live() == [("b0001", 1)]


@pytest.mark.parametrize(
    ("happens", "left"),
    [
        (lambda b: b.over("b0001", 0, "PREEMPTED", "preempted", [A, B]), {C}),
        (lambda b: b.over("b0001", 0, "FAILED", "failed", [B]), {A, C}),
        (lambda b: b.over("b0001", 0, "FAILED", "failed", []), {A, B, C}),
        (lambda b: b.cancelled("b0001"), set()),
        (lambda b: b.taken_back("b0001", "no"), set()),
    ],
)
def test_what_is_given_free_is_nobodys(tmp_path: Path, happens: Callable[[Ledger], None], left: set) -> None:
    book = booked(tmp_path)
    happens(book)
    assert {*book.claims} == {*Ledger(tmp_path, "").claims} == left


def test_a_later_batch_keeps_what_an_earlier_one_loses(tmp_path: Path) -> None:
    book = booked(tmp_path)
    book.over("b0001", 0, "PREEMPTED", "preempted", [A, B])
    second = book.intend([[A]], True, {})
    book.submitted(second, "58")
    book.cancelled("b0001")
    assert book.claims == Ledger(tmp_path, "").claims == {A: Claim("b0002", 0)}
    assert book.times[A] == 2


@pytest.mark.parametrize("taken", ["cancelled", "taken_back"])
def test_tasks_of_a_batch_that_nobody_wants_find_a_mark(tmp_path: Path, taken: str) -> None:
    book = booked(tmp_path)
    getattr(book, taken)("b0001", *(["why"] if taken == "taken_back" else []))
    assert (book.place("b0001") / "void").exists()
    assert book.live() == []


@pytest.mark.parametrize(
    "torn", ['{"event": "ended", "ba', '{"event": "void", "batch": "b0001"}', "\0\0\0\0"]
)
def test_a_torn_last_line_never_was(tmp_path: Path, torn: str) -> None:
    book = booked(tmp_path)
    path = tmp_path / ledger.FOLDER / ledger.NAME
    whole = path.read_bytes()
    with path.open("a") as f:
        f.write(torn)
    assert ledger.read(tmp_path) == [json.loads(x) for x in whole.splitlines()]
    again = Ledger(tmp_path, "")
    assert told(again) == told(book)
    assert path.read_bytes() == whole
    again.controller("60", 1)
    assert Ledger(tmp_path, "").controllers() == [("60", 1)]


def test_damage_before_the_last_line_is_told_and_not_mended(tmp_path: Path) -> None:
    booked(tmp_path)
    path = tmp_path / ledger.FOLDER / ledger.NAME
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")
    before = path.read_bytes()
    with pytest.raises(InputError, match="line 2 is damaged"):
        Ledger(tmp_path, "")
    assert path.read_bytes() == before


def test_an_intention_without_a_number_is_open(tmp_path: Path) -> None:
    book = booked(tmp_path)
    batch = book.intend([[A]], True, {})
    assert (batch, Ledger(tmp_path, "").open()) == ("b0002", ["b0002"])
    book.submitted(batch, "58")
    assert book.open() == Ledger(tmp_path, "").open() == []


def test_jobs_are_named_after_their_sweeps_folder(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert ledger.job_name(tmp_path) == ledger.job_name(tmp_path / "other" / "..")
    assert ledger.job_name(tmp_path) != ledger.job_name(tmp_path / "other")


# ---------------------------------------------------------------- batches


class FakeCluster:
    """In the place of Slurm's commands. Tasks are done the moment they are submitted, unless `fates` has
    another end for an item: a state, `runs` (until `finish`), `forgotten` or `cut off`."""

    def __init__(self) -> None:
        self.submitted: list[tuple[str, list[list[str]]]] = []
        """The job's number and the items of each task."""
        self.fates: dict[str, list[str]] = {}
        self.answers: list[tuple[Exception, bool]] = []
        """What sbatch fails with before it works, and whether the job is there all the same."""
        self.tasks: list[Task] = []
        self.places: dict[tuple[str, int], tuple[Path, list[Item]]] = {}
        self.cancelled: list[str] = []
        self.questions: list[str] = []
        self.away = 0
        """How often squeue does not answer."""
        self.forgetful = False
        """Whether squeue knows no ended task any more."""
        self.most = 1000
        self.room: int | None = None
        """The most tasks that a user may submit at once."""

    def submit(self, path: Path, *, test: bool = False) -> str:
        self.questions.append("sbatch")
        groups = [pickle.loads(p.read_bytes()) for p in _numbered(path.parent)]
        if self.room is not None and len(groups) > self.room:
            raise Limited("sbatch: AssocMaxSubmitJobLimit")
        if self.answers:
            answer, there = self.answers.pop(0)
            if there:
                self._begin(path.parent, groups)
            raise answer
        return self._begin(path.parent, groups)

    def _begin(self, place: Path, groups: list[list[Item]]) -> str:
        job = str(100 + len(self.submitted))
        self.submitted.append((job, [[i.name for i in g] for g in groups]))
        array = "--array" in (place / "job.sh").read_text()
        for index, items in enumerate(groups):
            self.places[job, index] = place, items
            state = self._state(place, index, items)
            if state != "forgotten":
                self.tasks.append(Task(job, index, state, "", "n1", "", place.name, "", array))
        return job

    def _state(self, place: Path, index: int, items: list[Item]) -> str:
        for item in items:
            fate = self.fates.get(item.name, [])
            end = fate.pop(0) if fate else "COMPLETED"
            if end == "runs":
                return "RUNNING"
            if end in ("PENDING", "forgotten"):
                return end
            ledger.begun(place, item.key).touch()
            if end == "cut off":  # with its node, before its script came to its end
                return "FAILED"
            if end != "COMPLETED":
                (place / f"status.{index}").write_text("1\n")
                return end
            write_json(ledger.result(place, item.key), {"value": item.work()})
        return "COMPLETED"

    def finish(self, job: str, index: int = 0) -> None:
        """A task that runs does what it has to, and ends."""
        place, items = self.places[job, index]
        state = self._state(place, index, items)
        self.tasks = [
            Task(job, index, state, "", "n1", "", place.name) if (t.job, t.index) == (job, index) else t
            for t in self.tasks
        ]

    def queue(self, name: str | None = None) -> list[Task]:
        self.questions.append("squeue")
        if self.away:
            self.away -= 1
            raise Away("squeue: Unable to contact slurm controller")
        return [t for t in self.tasks if not (self.forgetful and t.over)]

    def accounted(self, jobs: Sequence[str]) -> list[Task]:
        return [t for t in self.tasks if t.job in jobs]

    def accounted_by_name(self, name: str) -> list[Task]:
        self.questions.append("sacct")
        return list(self.tasks)

    def array_limit(self) -> int:
        return self.most

    def cancel(self, tasks: Any) -> None:
        self.cancelled += tasks

    @property
    def items(self) -> list[list[str]]:
        """The items of each job."""
        return [[name for task in groups for name in task] for _, groups in self.submitted]


def _numbered(place: Path) -> list[Path]:
    return sorted(place.glob("task*.pkl"), key=lambda p: int(p.stem.removeprefix("task")))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    fake = FakeCluster()
    for name in ("submit", "queue", "accounted", "accounted_by_name", "array_limit", "cancel"):
        monkeypatch.setattr(commands, name, getattr(fake, name))
    for name, seconds in (
        ("GLANCE", 0.002),
        ("LOOK", 0.01),
        ("SETTLING", 0.03),
        ("AGAIN", 0.02),
        ("RECENT", 0),
    ):
        monkeypatch.setattr(batches, name, seconds)
    return fake


Make = Callable[..., Batches]


@pytest.fixture
def batch(tmp_path: Path) -> Make:
    """`batch(per_task=2)`: what submits to the cluster, in the test's own folder."""
    return partial(Batches, tmp_path / "sweep", "mergelab-1", Slurm())


def work(names: str, folder: Path = Path("/nowhere")) -> list[Item]:
    return [Item(n, partial(str.upper, n), folder / n) for n in names]


def outcomes(of: Batches, names: str, array: bool = True) -> dict[str, Done]:
    return {names[i]: done for i, done in of.run(work(names), array)}


def test_a_population_is_one_array_whose_results_are_collected(cluster: FakeCluster, batch: Make) -> None:
    assert {n: d.value for n, d in outcomes(batch(), "abcd").items()} == dict(
        zip("abcd", "ABCD", strict=True)
    )
    assert cluster.submitted == [("100", [["a"], ["b"], ["c"], ["d"]])]


def test_what_is_no_population_is_a_job_each(cluster: FakeCluster, batch: Make) -> None:
    outcomes(batch(), "ab", array=False)
    assert cluster.items == [["a"], ["b"]]


def test_a_task_has_several_items_and_their_script_is_kept(cluster: FakeCluster, batch: Make) -> None:
    of = batch(per_task=2, ranks=4)
    assert len(outcomes(of, "abcde")) == 5
    assert cluster.submitted == [("100", [["a", "b"], ["c", "d"], ["e"]])]
    text = (of.ledger.place("b0001") / "job.sh").read_text()
    assert "#SBATCH --array=0-2\n" in text
    assert "#SBATCH --ntasks-per-node=2\n" in text  # a process has at least an item
    assert f"mergelab.slurm.task {shlex.quote(str(of.ledger.place('b0001')))} &" in text


def test_results_come_as_they_come(cluster: FakeCluster, batch: Make) -> None:
    cluster.fates = {n: ["runs"] for n in "abc"}
    of = batch()
    coming = of.run(work("abc"))
    assert of.submit(work("abc"))
    came = []
    for n in "bca":
        cluster.finish("100", "abc".index(n))
        place, done = next(coming)
        came.append((place, done.value))
    assert came == [(1, "B"), (2, "C"), (0, "A")]
    assert list(coming) == []


def test_another_process_collects_and_submits_nothing_again(cluster: FakeCluster, batch: Make) -> None:
    cluster.fates = {"b": ["runs"]}
    first = batch().run(work("abc"))
    assert {next(first)[0], next(first)[0]} == {0, 2}
    first.close()
    cluster.finish("100", 1)
    assert {n: d.value for n, d in outcomes(batch(), "abc").items()} == {"a": "A", "b": "B", "c": "C"}
    assert len(cluster.submitted) == 1


def test_another_process_submits_only_what_is_new(cluster: FakeCluster, batch: Make) -> None:
    outcomes(batch(), "ab")
    assert len(outcomes(batch(), "abc")) == 3
    assert cluster.items == [["a", "b"], ["c"]]


def test_submitting_waits_for_nothing(cluster: FakeCluster, batch: Make) -> None:
    cluster.fates = {"a": ["runs"]}
    of = batch()
    assert of.submit(work("ab")) and batch().submit(work("ab"))
    assert len(cluster.submitted) == 1


@pytest.mark.parametrize("forgetful", [False, True])
def test_a_job_that_nobody_heard_of_is_found_by_its_comment(
    cluster: FakeCluster, batch: Make, forgetful: bool
) -> None:
    cluster.forgetful = forgetful
    cluster.answers = [(Away("sbatch: Socket timed out"), True)]
    assert len(outcomes(batch(), "ab")) == 2
    assert len(cluster.submitted) == 1
    assert cluster.questions.count("sbatch") == 1
    assert ("sacct" in cluster.questions) is forgetful


def test_a_job_that_never_was_is_submitted_again_once_slurm_has_been_asked(
    cluster: FakeCluster, batch: Make
) -> None:
    cluster.answers = [(Away("sbatch: Unable to contact slurm controller"), False)]
    cluster.away = 3
    of = batch()
    assert len(outcomes(of, "ab")) == 2
    assert cluster.questions[:6] == ["sbatch", "squeue", "squeue", "squeue", "squeue", "sacct"]
    assert cluster.questions[6] == "sbatch"
    assert of.ledger.void == {"b0001"}
    assert (of.ledger.place("b0001") / "void").exists()


def test_the_accounting_is_not_asked_for_what_squeue_would_know(
    cluster: FakeCluster, batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "RECENT", 60)
    cluster.answers = [(Away("sbatch: Unable to contact slurm controller"), False)]
    assert len(outcomes(batch(), "ab")) == 2
    assert "sacct" not in cluster.questions and len(cluster.submitted) == 1


def test_another_process_looks_up_what_the_killed_one_had_begun(cluster: FakeCluster, batch: Make) -> None:
    cluster.answers = [(Away("killed in the middle of it"), True)]
    assert not batch().submit(work("ab"))
    assert len(outcomes(batch(), "ab")) == 2
    assert len(cluster.submitted) == 1


@bug(
    "ledger.taken_back puts its mark into a folder that a kill right after `intend` has kept from being made"
)
def test_killed_before_the_batch_had_a_folder(cluster: FakeCluster, batch: Make) -> None:
    batch().ledger.intend([[("a", 1)]], True, {})
    assert len(outcomes(batch(), "a")) == 1


def test_a_job_that_turns_up_after_it_was_given_up_is_cancelled(cluster: FakeCluster, batch: Make) -> None:
    cluster.fates = {"a": ["runs"]}
    of = batch()
    of.ledger.place(of.ledger.intend([[("a", 1)]], True, {})).mkdir()
    of.ledger.taken_back("b0001", "Slurm does not know it")
    cluster.tasks = [Task("99", 0, "PENDING", note="b0001")]
    of.submit(work("a"))
    of.submit(work("a"))
    assert cluster.cancelled == ["99"]


@pytest.mark.parametrize(("most", "sizes"), [(1000, [8]), (3, [3, 3, 2]), (1, [1] * 8)])
def test_an_array_is_no_larger_than_the_cluster_takes(
    cluster: FakeCluster, batch: Make, most: int, sizes: list[int]
) -> None:
    cluster.most = most
    assert len(outcomes(batch(), "abcdefgh")) == 8
    assert [len(items) for items in cluster.items] == sizes


def test_an_array_is_halved_until_it_is_taken(cluster: FakeCluster, batch: Make) -> None:
    cluster.room = 3
    assert len(outcomes(batch(), "abcdefgh")) == 8
    assert [len(items) for items in cluster.items] == [2, 2, 2, 2]
    assert sorted(n for items in cluster.items for n in items) == list("abcdefgh")


def test_what_does_not_fit_now_is_asked_for_again(cluster: FakeCluster, batch: Make) -> None:
    cluster.answers = [(Limited("sbatch: AssocMaxSubmitJobLimit"), False)] * 3
    of, shown = batch(), []
    of.show = shown.append
    assert len(outcomes(of, "a")) == 1
    assert cluster.questions.count("sbatch") == 4
    assert any("AssocMaxSubmitJobLimit" in text for text in shown)
    assert shown[-1] == ""


@bug("batches._submit forgets a trouble only after an array, never after single jobs")
def test_a_trouble_that_is_over_is_not_shown_any_more(cluster: FakeCluster, batch: Make) -> None:
    cluster.fates = {"a": ["runs"]}
    cluster.answers = [(Limited("sbatch: AssocMaxSubmitJobLimit"), False)]
    of, shown = batch(), []
    coming = of.run(work("a"), array=False)

    def show(text: str) -> None:
        shown.append(text)
        if "1 running" in text:
            cluster.finish("100")

    of.show = show
    list(coming)
    assert "AssocMaxSubmitJobLimit" not in next(t for t in shown if "1 running" in t)


def test_what_slurm_will_never_take_is_raised(cluster: FakeCluster, batch: Make) -> None:
    cluster.answers = [(Refused("sbatch: Invalid partition name specified"), False)]
    of = batch()
    with pytest.raises(Refused, match="Invalid partition"):
        outcomes(of, "a")
    assert of.ledger.open() == [] and of.ledger.claims == {}
    assert len(outcomes(batch(), "a")) == 1  # when it has been put right


@pytest.mark.parametrize("state", sorted(batches.INNOCENT))
def test_work_that_lost_its_node_is_submitted_again(cluster: FakeCluster, batch: Make, state: str) -> None:
    cluster.fates = {"b": [state]}
    heard: list[str] = []
    found = outcomes(batch(tell=heard.append), "abc")
    assert all(d.reason is None for d in found.values())
    assert cluster.items == [["a", "b", "c"], ["b"]]
    assert any(commands.ENDED[state] in h and "submitted again" in h for h in heard)


def test_a_task_whose_script_did_not_come_to_its_end_is_submitted_again(
    cluster: FakeCluster, batch: Make
) -> None:
    cluster.fates = {"b": ["cut off"]}
    assert outcomes(batch(), "ab")["b"].value == "B"
    assert cluster.items == [["a", "b"], ["b"]]


@pytest.mark.parametrize("state", ["FAILED", "TIMEOUT", "OUT_OF_MEMORY", "CANCELLED"])
def test_work_that_ends_its_task_is_lost_with_the_reason(
    cluster: FakeCluster, batch: Make, state: str
) -> None:
    cluster.fates = {"b": [state]}
    found = outcomes(batch(), "abc")
    assert found["b"].lost and found["b"].value is None
    assert found["b"].reason is not None
    status = " with exit status 1" if state == "FAILED" else ""
    assert found["b"].reason.startswith(f"{commands.ENDED[state]}{status} (n1, Slurm task 100_1)")
    assert found["a"].value == "A" and len(cluster.submitted) == 1


def test_what_squeue_has_forgotten_the_accounting_still_knows(cluster: FakeCluster, batch: Make) -> None:
    cluster.fates, cluster.forgetful = {"a": ["TIMEOUT"]}, True
    assert str(outcomes(batch(), "a")["a"].reason).startswith("out of time (n1")
    assert len(cluster.submitted) == 1


def test_a_lost_task_is_told_with_its_exit_status_and_last_words(cluster: FakeCluster, batch: Make) -> None:
    cluster.fates = {"a": ["runs"]}
    of = batch()
    of.submit(work("a"))
    place = of.ledger.place("b0001")
    (place / "100_0.out").write_text("not this\n")
    (place / "100_0.err").write_text("one\n\ntwo\nthree\n  Killed \n")
    cluster.fates = {"a": ["FAILED"]}
    cluster.finish("100")
    (place / "status.0").write_text("137\n")
    reason = outcomes(of, "a")["a"].reason
    assert reason == ("killed by SIGKILL (n1, Slurm task 100_0); its last words: "
                      "two | three | Killed")  # fmt: skip


@pytest.mark.parametrize(
    "word",
    [
        "Exceeded job memory limit",
        "slurmstepd: error: Detected 1 oom_kill event",
        "torch: CUDA out of memory.",
    ],
)
def test_a_lack_of_memory_is_known_by_the_last_words(cluster: FakeCluster, batch: Make, word: str) -> None:
    cluster.fates = {"a": ["runs", "FAILED"]}
    of = batch()
    of.submit(work("a"))
    (of.ledger.place("b0001") / "100_0.err").write_text(f"{word}\n")
    cluster.finish("100")
    assert str(outcomes(of, "a")["a"].reason).startswith("out of memory (n1")


def test_only_the_item_in_work_is_lost_and_its_neighbours_are_submitted_again(
    cluster: FakeCluster, batch: Make
) -> None:
    cluster.fates = {"b": ["FAILED"]}
    found = outcomes(batch(per_task=4), "abcd")
    assert [n for n, d in found.items() if d.lost] == ["b"]
    assert cluster.items == [["a", "b", "c", "d"], ["c", "d"]]


def test_a_task_that_slurm_has_forgotten_is_submitted_again_but_not_for_ever(
    cluster: FakeCluster, batch: Make
) -> None:
    cluster.fates = {"a": ["forgotten"] * 2, "b": ["forgotten"] * 100}
    found = outcomes(batch(), "ab")
    assert found["a"].value == "A"
    assert found["b"].lost and "Slurm no longer knows it" in str(found["b"].reason)
    assert [n for items in cluster.items for n in items].count("b") == batches.MOST


def test_what_is_preempted_for_ever_is_given_up(cluster: FakeCluster, batch: Make) -> None:
    cluster.fates = {"a": ["PREEMPTED"] * 100}
    assert outcomes(batch(), "a")["a"].lost
    assert len(cluster.submitted) == batches.MOST


def test_a_task_that_slurm_cannot_launch_is_taken_away_and_submitted_again(
    cluster: FakeCluster, batch: Make
) -> None:
    cluster.fates = {"a": ["PENDING"]}
    of = batch()
    of.submit(work("a"))
    cluster.tasks = [Task("100", 0, "PENDING", "launch failed requeued held", "", "", "b0001", "", True)]
    assert outcomes(of, "a")["a"].value == "A"
    assert cluster.cancelled == ["100_0"]


def test_a_number_that_slurm_has_given_twice_is_not_taken_for_ours(cluster: FakeCluster, batch: Make) -> None:
    cluster.fates = {"a": ["forgotten"]}
    of = batch()
    of.submit(work("a"))
    cluster.tasks = [Task("100", 0, "RUNNING", note="b0007")]  # of another sweep
    assert outcomes(of, "a")["a"].value == "A"
    assert len(cluster.submitted) == 2


def test_a_slurm_that_is_away_ends_nothing(cluster: FakeCluster, batch: Make) -> None:
    cluster.fates = {"a": ["runs"]}
    of = batch()
    of.submit(work("a"))
    cluster.away, shown = 20, []

    def show(text: str) -> None:
        shown.append(text)
        if "1 running" in text:
            cluster.finish("100")

    of.show = show
    assert outcomes(of, "a")["a"].value == "A"
    assert any("Slurm does not answer" in text and "what runs goes on" in text for text in shown)
    assert len(cluster.submitted) == 1


@bug("batches._look cancels outside of its try, so that an Away of scancel ends the sweep")
def test_a_slurm_that_is_away_when_a_stray_job_is_cancelled_ends_nothing(
    cluster: FakeCluster, batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = batch()
    of.ledger.place(of.ledger.intend([[("z", 1)]], True, {})).mkdir()
    of.ledger.taken_back("b0001", "Slurm does not know it")
    of.submit(work("a"))
    cluster.tasks.append(Task("99", 0, "RUNNING", note="b0001"))

    def away(tasks: Any) -> None:
        raise Away("scancel: Unable to contact slurm controller")

    monkeypatch.setattr(commands, "cancel", away)
    assert of.submit(work("a"))


def test_cancelling_ends_what_is_not_done_and_that_alone(cluster: FakeCluster, batch: Make) -> None:
    of = batch()
    outcomes(of, "a")
    cluster.fates = {"b": ["runs"]}
    of.submit(work("b"))
    assert of.cancel() == cluster.cancelled == ["101"]
    assert of.cancel() == []
    assert outcomes(batch(), "ab")["b"].value == "B"
    assert cluster.items == [["a"], ["b"], ["b"]]


@bug("the ledger's `cancelled` gives free what the batch had finished, too: the next command does it again")
def test_what_a_cancelled_array_had_finished_is_not_done_again(cluster: FakeCluster, batch: Make) -> None:
    cluster.fates = {"b": ["runs"]}
    of = batch()
    of.submit(work("abc"))
    of.cancel()
    assert len(outcomes(batch(), "abc")) == 3
    assert cluster.items == [["a", "b", "c"], ["b"]]


@pytest.mark.parametrize("at", [0, 3])
def test_what_a_task_said_last(tmp_path: Path, at: int) -> None:
    assert batches.last_lines(tmp_path, "57", at) == ""
    (tmp_path / "57.out").write_text("of a plain job\n")
    assert batches.last_lines(tmp_path, "57", at) == "of a plain job"
    (tmp_path / f"57_{at}.err").write_bytes(b"x" * 9000 + b"\n\xff\n" + b"last\n")
    said = batches.last_lines(tmp_path, "57", at)
    assert said.endswith("| last") and len(said) <= 400


# ---------------------------------------------------------------- the nodes' own disks


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "weights").write_bytes(bytes(1000))
    os.utime(folder / "weights", (1_000_000_000, 1_000_000_000))
    return folder


def left_on(disk: Path) -> list[str]:
    return sorted(str(p.relative_to(disk)) for p in disk.rglob("*") if p.name != scratch.MODELS)


def test_a_copy_is_the_model_with_its_times(disk: Path, model: Path) -> None:
    with scratch.opened(str(disk), "57-0"):
        copy = scratch.copy_of(model)
        assert disk in copy.parents and scratch.copy_of(model) == copy
        assert (copy / "weights").read_bytes() == bytes(1000)
        assert (copy / "weights").stat().st_mtime == 1_000_000_000
        assert {p.name for p in copy.iterdir()} == {"config.json", "weights"}
        mine = scratch.folder()
        assert mine is not None and mine.is_dir() and disk in mine.parents
        (mine / "written").touch()
    assert left_on(disk) == []
    assert scratch.folder() is None and scratch.copy_of(model) == model


def test_a_model_that_has_changed_is_another_copy(disk: Path, model: Path) -> None:
    with scratch.opened(str(disk), "57-0"):
        before = scratch.copy_of(model)
        (model / "weights").write_bytes(bytes(1001))
        after = scratch.copy_of(model)
    assert before != after


def test_a_links_target_is_copied(disk: Path, model: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"  # as the hub's cache has them
    snapshot.mkdir()
    (snapshot / "weights").symlink_to(model / "weights")
    with scratch.opened(str(disk), "57-0"):
        assert not (scratch.copy_of(snapshot) / "weights").is_symlink()


@pytest.mark.parametrize("nowhere", [None, ""])
def test_without_a_folder_everything_stays_where_it_is(model: Path, nowhere: str | None) -> None:
    with scratch.opened(nowhere, "57-0"):
        assert scratch.copy_of(model) == model and scratch.folder() is None


USER = """
import sys, time
from pathlib import Path
from mergelab.merging import scratch
disk, model, go, name = sys.argv[1:]
with scratch.opened(disk, name):
    print(scratch.copy_of(Path(model)), flush=True)
    (scratch.folder() / "written").touch()
    while not Path(go).exists():
        time.sleep(0.02)
"""


@pytest.fixture
def user(disk: Path, model: Path, tmp_path: Path) -> Iterator[Callable[[str], tuple[Any, Path, Path]]]:
    """`user("58-0")`: another process that uses the disk; its copy, and the file that ends it."""
    processes = []

    def start(name: str) -> tuple[Any, Path, Path]:
        go = tmp_path / f"go-{name}"
        process = subprocess.Popen(
            [sys.executable, "-c", USER, str(disk), str(model), str(go), name],
            text=True, stdout=subprocess.PIPE,
        )  # fmt: skip
        processes.append(process)
        assert process.stdout is not None
        copy = Path(process.stdout.readline().strip())
        until((disk / f"{scratch.TASK}{name}" / "written").exists)
        return process, copy, go

    yield start
    for process in processes:
        process.kill()
        process.communicate()


User = Callable[[str], tuple[Any, Path, Path]]


@bug("scratch.copy_of asks for the whole lock: it waits until all other users of the copy have gone")
def test_two_users_share_a_copy_and_the_last_one_out_removes_it(disk: Path, model: Path, user: User) -> None:
    process, theirs, go = user("58-0")
    with within(5), scratch.opened(str(disk), "57-0"):
        copy = scratch.copy_of(model)
        assert copy == theirs
        go.touch()
        assert process.wait(30) == 0
        assert (copy / "weights").exists()  # they are gone, we are not
        assert not (disk / f"{scratch.TASK}58-0").exists()
    assert left_on(disk) == []


@bug("the same")
def test_the_first_one_out_leaves_the_copy(disk: Path, model: Path, user: User) -> None:
    process, theirs, go = user("58-0")
    with within(5), scratch.opened(str(disk), "57-0"):
        scratch.copy_of(model)
    assert (theirs / "weights").exists() and (disk / f"{scratch.TASK}58-0" / "written").exists()
    go.touch()
    assert process.wait(30) == 0
    assert left_on(disk) == []


@pytest.mark.parametrize("by", ["the next task", "the batch script"])
def test_what_a_killed_process_leaves_is_removed(disk: Path, user: User, by: str) -> None:
    process, theirs, _ = user("58-0")
    process.kill()
    process.wait(30)
    assert (theirs / "weights").exists() and (disk / f"{scratch.TASK}58-0").exists()
    if by == "the next task":
        with scratch.opened(str(disk), "59-0"):
            assert left_on(disk) == [f"{scratch.TASK}59-0", f"{scratch.TASK}59-0{scratch.LOCK}"]
    else:
        subprocess.run([sys.executable, "-m", "mergelab.merging.scratch", str(disk)], check=True)
    assert left_on(disk) == []


def test_half_a_copy_is_no_copy_and_is_tidied_away(
    disk: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(source: Path, to: Path) -> None:
        Path(to).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copy2", broken)
    with pytest.raises(KeyboardInterrupt), scratch.opened(str(disk), "57-0"):
        scratch.copy_of(model)
    assert not [p for p in (disk / scratch.MODELS).iterdir() if p.suffix == ""]


def test_somebody_elses_files_are_left_alone(disk: Path, model: Path) -> None:
    (disk / "thesis.tex").write_text("all my work")
    (disk / "mergelab-thesis").mkdir()
    with scratch.opened(str(disk), "57-0"):
        scratch.copy_of(model)
    assert left_on(disk) == ["mergelab-thesis", "thesis.tex"]


def test_variables_of_the_node_are_filled_in(
    disk: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODES_OWN_DISK", str(disk))
    with scratch.opened("$NODES_OWN_DISK", "57-0"):
        assert disk in scratch.copy_of(model).parents


@pytest.mark.parametrize("name", ["nowhere", "model/weights"])
def test_a_folder_that_is_none_is_named(tmp_path: Path, model: Path, name: str) -> None:
    with (
        pytest.raises(InputError, match=rf"hardware\.scratch: {tmp_path / name} is no folder"),
        scratch.opened(str(tmp_path / name), "57-0"),
    ):
        raise AssertionError


def full(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(scratch.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def test_too_little_room_is_told_before_anything_is_copied(
    disk: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full(monkeypatch, 1001)
    with (
        scratch.opened(str(disk), "57-0"),
        pytest.raises(StepError, match=r"hardware\.scratch: a copy needs 1\.0 kB, and"),
    ):
        scratch.copy_of(model)
    assert not list(disk.rglob("weights"))


def test_just_enough_room_is_enough(disk: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(monkeypatch, 1002)
    with scratch.opened(str(disk), "57-0"):
        assert scratch.copy_of(model) != model


AGAIN = """
import shutil, signal, sys
from pathlib import Path
from types import SimpleNamespace
from mergelab.errors import StepError
from mergelab.merging import scratch
shutil.disk_usage = lambda path: SimpleNamespace(free=0)
with scratch.opened(sys.argv[1], "57-0"):
    for _ in range(2):
        signal.alarm(3)
        try:
            scratch.copy_of(Path(sys.argv[2]))
        except StepError:
            print("no room", flush=True)
"""


@bug("scratch.copy_of keeps the lock of a copy that failed: the next candidate of the task waits for ever")
def test_too_little_room_is_told_to_the_next_candidate_of_the_task_too(disk: Path, model: Path) -> None:
    command = [sys.executable, "-c", AGAIN, str(disk), str(model)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert (done.stdout, done.returncode) == ("no room\n" * 2, 0)


OTHER = """
import os, sys
from pathlib import Path
from mergelab.merging import scratch
os.setgid(65534), os.setuid(65534)
with scratch.opened(sys.argv[1], "58-0"):
    print(scratch.copy_of(Path(sys.argv[2])))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs to become somebody else")
@bug("scratch: lock files of mode 0600 and one mergelab-models for all users of the node")
def test_two_users_of_the_node_do_not_get_into_each_others_way() -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's own folders are closed to others
        top, disk, model = Path(name), Path(name) / "disk", Path(name) / "model"
        top.chmod(0o755)
        model.mkdir()
        (model / "weights").touch()
        disk.mkdir()
        disk.chmod(0o1777)
        with scratch.opened(str(disk), "57-0"):
            scratch.copy_of(model)
            subprocess.run([sys.executable, "-c", OTHER, str(disk), str(model)], check=True,
                           stderr=subprocess.DEVNULL)  # fmt: skip


# ---------------------------------------------------------------- records for W&B


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
    syncing.gather(sweep)
    syncing.gather(sweep)
    assert [p.name for p in syncing.left(sweep)] == ["offline-run-2026-0", "offline-run-2026-1"]
    assert (sweep / "wandb" / "offline-run-2026-1" / "run-1.wandb").exists()
    assert not list(sweep.glob("[01]/wandb/*"))


def test_a_record_that_is_there_already_is_not_overwritten(sweep: Path) -> None:
    there = sweep / "wandb" / "offline-run-2026-0"
    there.mkdir(parents=True)
    (there / "run-0.wandb").write_text("earlier")
    syncing.gather(sweep)
    assert (there / "run-0.wandb").read_text() == "earlier"
    assert (sweep / "0" / "wandb" / "offline-run-2026-0" / "run-0.wandb").exists()


def test_what_is_uploaded_is_not_left(sweep: Path) -> None:
    syncing.gather(sweep)
    (sweep / "wandb" / "offline-run-2026-0" / "run-0.wandb.synced").touch()
    assert [p.name for p in syncing.left(sweep)] == ["offline-run-2026-1"]


def test_without_records_nothing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syncing, "upload", lambda records: pytest.fail("nothing is there to upload"))
    syncing.gather(tmp_path)
    syncing.finish(tmp_path, Tracking(sync=True))
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_the_command_that_uploads_is_printed(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syncing, "upload", lambda records: pytest.fail("nobody has asked for it"))
    syncing.gather(sweep)
    syncing.finish(sweep, Tracking())
    assert said(capsys) == "W&B: 2 runs offline; wandb sync s/wandb/offline-run-* uploads them"


@bug("syncing.finish: the command is printed without quotes, and broken at the width of the terminal")
def test_the_command_that_uploads_can_be_typed_as_it_is(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sweep.rename(
        sweep.with_name("a sweep with a name that is long " + "enough " * 10 + "to be broken")
    )
    syncing.gather(folder)
    syncing.finish(folder, Tracking())
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

    monkeypatch.setattr(syncing, "upload", upload)
    syncing.gather(sweep)
    syncing.finish(sweep, Tracking(sync=True))
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
        pytest.param("Syncing: https://w/error_analysis ... done.", 0, "",
                     marks=bug("syncing.upload takes `error` in a name for a failure")),
    ],
)  # fmt: skip
def test_what_wandb_says_of_an_upload(
    monkeypatch: pytest.MonkeyPatch, out: str, status: int, why: str
) -> None:
    def run(command: list[str], **how: Any) -> Any:
        assert command[1:] == ["-m", "wandb", "sync", "/s/wandb/offline-run-1"]
        assert how["env"]["WANDB_MODE"] == "online"
        return SimpleNamespace(stdout=out, stderr="", returncode=status)

    monkeypatch.setattr(syncing.subprocess, "run", run)
    assert syncing.upload([Path("/s/wandb/offline-run-1")]) == why


# ---------------------------------------------------------------- a sweep that a job steers


def test_the_controller_runs_the_same_command_in_the_same_folder() -> None:
    typed = ["-m", "search=cma", "hydra.sweep.dir=elsewhere", "experts=math_code"]
    found = steered.command(typed, Path("/my data/sweep"))
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
    assert getattr(steered.settings(run), key) == value


@pytest.mark.parametrize(
    ("controller", "inside", "wanted"), [("job", False, True), ("job", True, False), ("here", False, False)]
)
def test_a_job_steers_where_it_is_asked_for_and_is_not_the_job_itself(
    monkeypatch: pytest.MonkeyPatch, controller: str, inside: bool, wanted: bool
) -> None:
    monkeypatch.delenv(steered.INSIDE, raising=False)
    if inside:
        monkeypatch.setenv(steered.INSIDE, "1")
    run = composed("hardware=slurm", f"search.controller={controller}")
    assert steered.wanted(run) is wanted


# ---------------------------------------------------------------- signs of life


@pytest.fixture
def beat(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], dict[str, Any]]:
    """The pulse in a folder, a beat after this."""
    monkeypatch.setattr(pulse, "INTERVAL", 0.01)
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID", "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)

    def read(folder: Path) -> dict[str, Any]:
        path = folder / pulse.NAME
        for _ in range(2):  # the first may have been on its way
            path.unlink(missing_ok=True)
            until(path.exists)
        return dict(json.loads(path.read_text()))

    return read


Beat = Callable[[Path], dict[str, Any]]


def test_a_pulse_says_what_is_done_and_goes_away(tmp_path: Path, beat: Beat) -> None:
    with pulse.beating(tmp_path):
        found = beat(tmp_path)
        assert found["pid"] == os.getpid() and found["rss"] > 0 and found["job"] is None
        assert abs(found["time"] - time.time()) < 30 and "gpus" not in found
        pulse.step("merge")
        pulse.note("tensors", 3, 7, unit="bytes")
        found = beat(tmp_path)
        about = ("step", "what", "done", "total", "unit")
        assert [found[k] for k in about] == ["merge", "tensors", 3, 7, "bytes"]
        pulse.step("evaluate")
        assert beat(tmp_path)["what"] is None
    assert list(tmp_path.iterdir()) == []


def test_the_time_of_a_piece_of_work_is_that_of_its_beginning(tmp_path: Path, beat: Beat) -> None:
    with pulse.beating(tmp_path):
        pulse.note("tensors", 0, 7)
        since = beat(tmp_path)["since"]
        pulse.note("tensors", 5, 7)
        assert beat(tmp_path)["since"] == since
        pulse.note("prompts", 0, 9)
        assert beat(tmp_path)["since"] > since


@pytest.mark.parametrize("raised", [None, ValueError, KeyboardInterrupt])
def test_a_pulse_goes_away_however_the_run_ends(
    tmp_path: Path, beat: Beat, raised: type[BaseException] | None
) -> None:
    try:
        with pulse.beating(tmp_path):
            beat(tmp_path)
            if raised:
                raise raised
    except (ValueError, KeyboardInterrupt):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_run_within_another_is_part_of_its_pulse(tmp_path: Path, beat: Beat) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    with pulse.beating(tmp_path):
        began = beat(tmp_path)["started"]
        with pulse.beating(inner):
            pulse.note("tensors", 3, 7)
            assert beat(tmp_path)["what"] == "tensors"
            assert list(inner.iterdir()) == []
        found = beat(tmp_path)
        assert (found["what"], found["started"]) == ("tensors", began)
    with pulse.beating(inner):
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
    with pulse.beating(tmp_path):
        found = beat(tmp_path)
    assert (found["job"], found["host"]) == (job, "n13")


def test_a_folder_that_cannot_be_written_to_ends_no_run(tmp_path: Path) -> None:
    with pulse.beating(tmp_path / "nowhere"):
        pulse.note("tensors", 1, 2)
    assert not (tmp_path / "nowhere").exists()


# ---------------------------------------------------------------- before anything is submitted


@pytest.mark.parametrize(
    ("overrides", "code", "key", "message"),
    [
        (["slurm.cpus=0"], "setting", "slurm.cpus", "0 is out of range; at least 1"),
        (["slurm.gpus=-1"], "setting", "slurm.gpus", "-1 is out of range; at least 0"),
        (["slurm.warning=-1"], "setting", "slurm.warning", "-1 is out of range; at least 0"),
        (["slurm.parallel=0"], "setting", "slurm.parallel", "0 is out of range; at least 1"),
        (["candidates_per_task=0"], "setting", "candidates_per_task", "0 is out of range; at least 1"),
        (["device=cuda"], "setting", "slurm.gpus", "0, but hardware.device=cuda needs one"),
        (["slurm.gpus=2"], "no-effect", "slurm.gpus", "2, but hardware.device=cpu uses none"),
        (["slurm.memory=plenty"], "type", "slurm.memory", "'plenty' is no size"),
        (["slurm.time=tomorrow"], "type", "slurm.time", "'tomorrow' is no time as Slurm writes it"),
        (["slurm.time=1:2:3:4"], "type", "slurm.time", "'1:2:3:4' is no time as Slurm writes it"),
    ],
)
def test_a_wrong_setting_of_the_cluster_is_found(
    overrides: list[str], code: str, key: str, message: str
) -> None:
    run = composed("hardware=slurm", *(f"hardware.{o}" for o in overrides))
    (found,) = settings.check(run, [], "error")
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
    assert list(settings.check(composed("hardware=slurm", *marked), [], "error")) == []


@pytest.mark.parametrize("setting", ["candidates_per_task=2", "detach=true", "scratch=/tmp"])
def test_a_setting_of_a_cluster_without_one_has_no_effect(setting: str) -> None:
    run = composed("hardware=cpu", f"hardware.{setting}")
    (found,) = settings.check(run, [], "error")
    assert (found.code, found.place) == ("no-effect", f"hardware.{setting.partition('=')[0]}")
    assert found.remedy == "Set hardware=slurm."


@bug("preflight: these are ours, by which a job is found again, and a user's take their place")
@pytest.mark.parametrize("option", ["comment", "job_name", "array", "output", "ntasks", "signal"])
def test_an_option_that_would_lose_the_job_is_an_error(option: str) -> None:
    run = composed("hardware=slurm", f"+hardware.slurm.options.{option}=mine")
    assert any(option in f.place for f in settings.check(run, [], "error"))


@pytest.mark.parametrize("name", sorted(p.stem for p in CONF.glob("slurm*.yaml")))
def test_every_cluster_that_is_shipped_composes_and_is_sound(name: str) -> None:
    run = composed(f"hardware={name}")
    assert run.hardware.slurm is not None
    assert list(settings.check(run, [], "error")) == []
    assert (run.hardware.device == "cpu") is (run.hardware.slurm.gpus == 0)
