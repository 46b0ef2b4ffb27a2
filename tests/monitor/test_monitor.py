"""job=monitor: what a person can read of runs and sweeps, from folders made by hand."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from mergelab.core.errors import InputError
from mergelab.monitor import readers
from mergelab.monitor import render as monitor
from mergelab.scheduling.scheduler import SchedulerUnavailable, Task
from mergelab.schema import Monitor
from mergelab.slurm import client

GPU = {"index": 0, "used": 34_100_000_000, "total": 80 << 30, "busy": 0.71}
CHOICES = {"job": "merge", "model": "qwen7b", "method": "dare_ties"}


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, *lines: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")


def heartbeat(folder: Path, age: float = 1.0, **told: Any) -> None:
    now = time.time()
    base = {"time": now - age, "started": now - 240, "host": "n13", "pid": 4711, "job": None, "step": "merge",
            "what": "math", "done": 45, "total": 100, "unit": "bytes", "since": now - age - 9,
            "rss": 2_100_000_000}  # fmt: skip
    write(folder / "heartbeat.json", base | told)


def run(folder: Path, status: str = "running", age: float = 0.0, **parts: Any) -> None:
    write(
        folder / "result.json", {"schema": 1, "status": status, "choices": CHOICES, "overrides": [], **parts}
    )
    then = time.time() - age
    os.utime(folder / "result.json", (then, then))


def sweep(folder: Path, candidates: int = 22, **status: Any) -> None:
    lines = [
        {"event": "candidate", "number": i, "generation": i // 8, "genome": {}, "status": "done",
         "fitness": 0.4 + i / 1000}
        for i in range(candidates)
    ]  # fmt: skip
    for i in (3, 5) if candidates > 5 else ():
        lines[i] |= {"status": "failed", "fitness": None, "reason": f"candidate {i} ran out of memory\nless"}
    begin = {"event": "begin", "schema": 1, "id": "ab", "command": "",
             "search": {"name": "cma", "optimizer": "CMA", "population": 8}}  # fmt: skip
    write_lines(folder / "journal.jsonl", begin, {"event": "preset", "fitness": 0.4321}, *lines)
    if status:
        write(folder / "result.json", {"schema": 1, **status})


def submission_log(folder: Path, names: list[str], *more: dict[str, Any]) -> None:
    write_lines(
        folder / "slurm" / "jobs.jsonl",
        {"event": "begin", "name": "mergelab-ab12cd34ef"},
        {
            "event": "submitting",
            "batch": "b0001",
            "array": True,
            "tasks": [[[n, 1]] for n in names],
            "folders": {n: re.sub(r"^[a-z]+(?=[0-9])|-.*", "", n) for n in names},
        },
        {"event": "submitted", "batch": "b0001", "job": "57"},
        *more,
    )


def squeue(monkeypatch: pytest.MonkeyPatch, *tasks: Task) -> list[int]:
    asked: list[int] = []

    def queue(name: str | None = None) -> list[Task]:
        asked.append(1)
        return list(tasks)

    monkeypatch.setattr(client, "missing", lambda: None)
    monkeypatch.setattr(client, "queue", queue)
    return asked


def task(index: int, state: str = "PENDING", reason: str = "Priority", node: str = "") -> Task:
    return Task("57", index, state, reason, node)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What is printed; that nothing was written and every line fits is seen each time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(client, "missing", lambda: "squeue")

    def printed(folder: Path | str | None = None, width: int = 80, **settings: Any) -> str:
        before = files(tmp_path)
        console = Console(file=io.StringIO(), width=width, force_terminal=False)
        monitor.watch(Monitor(folder=str(folder) if folder else None, **settings), console)
        assert files(tmp_path) == before
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        assert all(cell_len(line) <= width for line in text.splitlines())
        return text

    return printed


def line_of(text: str, part: str) -> str:
    """The line that has a part; it has to be there, once."""
    (line,) = [x for x in text.splitlines() if part in x]
    return line


def test_nothing_runs_yet(look: Callable[..., str], tmp_path: Path) -> None:
    assert "nothing runs under outputs/ and multirun/" in look()
    (tmp_path / "empty").mkdir()
    assert "nothing runs under empty/" in look("empty")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folder": "nowhere"}, "monitor.folder: nowhere is not a folder"),
        ({"folder": "file"}, "monitor.folder: file is not a folder"),
        ({"interval": 0.0}, "monitor.interval: 0 is out of range; above 0"),
        ({"hours": -1.0}, "monitor.hours: -1 is out of range; above 0"),
        ({"hours": float("nan")}, "monitor.hours: nan is out of range; above 0"),
    ],
)
def test_wrong_settings(look: Callable[..., str], tmp_path: Path, settings: Any, message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=message):
        look(**settings)


def test_a_run_in_the_middle(look: Callable[..., str], tmp_path: Path) -> None:
    run(tmp_path / "outputs" / "2026-11-26" / "11-50-25")
    heartbeat(tmp_path / "outputs" / "2026-11-26" / "11-50-25", gpus=[GPU])
    text = look()
    head = line_of(text, "outputs/2026-11-26/11-50-25")
    assert "qwen7b · dare_ties" in head
    assert "running" in head
    below = line_of(text, "merge math")
    for part in ("45%", "11 s left", "n13", "2.1 GB", "GPU 0 71% 34.1 GB"):
        assert part in below
    assert "1 running" in text


def test_several_gpus_are_summed(look: Callable[..., str], tmp_path: Path) -> None:
    run(tmp_path / "outputs" / "a")
    heartbeat(tmp_path / "outputs" / "a", gpus=[GPU, GPU | {"index": 1, "busy": 0.51}])
    assert "2 GPUs 61% 68.2 GB" in look()


def test_runs_that_have_ended(look: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "outputs"
    run(out / "good", "done", age=120, fitness={"value": 0.5156, "split": "search"})
    run(out / "bad", "failed", age=60, error={"step": "merge", "reason": "the disk is full\nMake room."})
    run(out / "wrong", "invalid", error={"step": None, "reason": "experts: " + "there are none " * 20})
    run(out / "stopped", "interrupted")
    run(out / "old", "done", age=90_000)
    text = look()
    assert "done" in line_of(text, "outputs/good")
    assert "0.516" in line_of(text, "outputs/good")
    assert "2 min ago" in line_of(text, "outputs/good")
    assert "failed" in line_of(text, "outputs/bad")
    assert line_of(text, "the disk is full").strip() == "merge: the disk is full"
    assert line_of(text, "there are none").endswith("…")
    assert "old" not in text
    assert "0 running, 1 done, 2 failed, 1 interrupted" in text
    assert text.index("outputs/bad") < text.index("outputs/good")
    assert "done" in line_of(look(out / "old"), "outputs/old")
    assert "outputs/old" in look(hours=30.0)
    assert "outputs/old" not in look(out)


def test_no_sign_of_life(look: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "outputs"
    run(out / "far", age=50)
    heartbeat(out / "far", age=40)
    run(out / "silent", age=40)
    run(out / "gone", age=50)
    heartbeat(out / "gone", age=40, host=socket.gethostname(), pid=2**22 + 1)
    run(out / "alive", age=50)
    heartbeat(out / "alive", age=40, host=socket.gethostname(), pid=os.getpid())
    run(out / "looked", age=40)
    write_lines(out / "looked" / "events.jsonl", {"time": time.time() - 40, "event": "step", "state": "done"})
    text = look()
    for name in ("far", "silent", "alive"):
        assert "no sign since 40 s" in line_of(text, f"outputs/{name}")
    assert "lost" in line_of(text, "outputs/gone")
    assert "4194305 is gone" in text
    assert "done" in line_of(text, "outputs/looked")
    assert "0 running, 1 done, 1 lost, 3 no sign" in text


def test_a_sweep_in_the_middle(look: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "multirun" / "2026-11-26" / "11-50-25"
    sweep(folder)
    (folder / "journal.jsonl").open("a").write('{"event": "candidate", "num')
    write_lines(
        folder / "events.jsonl", {"time": time.time() - 900, "event": "generation", "generation": 0, "of": 4}
    )
    heartbeat(folder, done=22, total=32, unit="", step=None, what="candidates")
    text = look()
    head = line_of(text, "multirun/2026-11-26/11-50-25")
    for part in ("cma · CMA", "running", "generation 3 of 4"):
        assert part in head
    bar = line_of(text, "22 of 32")
    assert "━" in bar
    assert "3.51 a minute, 3 min left" in bar  # 14 in 239 seconds: the first 8 are of an earlier process
    found = line_of(text, "best 0.421")
    assert "initial 0.432" in found
    assert "2 failed, the last: candidate 5 ran out of memory" in found
    assert "n13" in line_of(text, "2.1 GB")


def test_a_sweep_that_merges_its_winner(look: Callable[..., str], tmp_path: Path) -> None:
    sweep(tmp_path / "multirun" / "a", 32, status="settling")
    heartbeat(tmp_path / "multirun" / "a")
    text = look()
    assert "running" in line_of(text, "multirun/a")
    assert "32 of 32" in text
    assert "45%" in line_of(text, "merge math")


def test_sweeps_that_have_ended(look: Callable[..., str], tmp_path: Path) -> None:
    winner = {"number": 14, "fitness": 0.5217}
    sweep(tmp_path / "multirun" / "good", 32, status="done", winner=winner, search={"budget": 32})
    sweep(tmp_path / "multirun" / "cut")
    os.utime(tmp_path / "multirun" / "cut" / "journal.jsonl", (time.time() - 60,) * 2)
    text = look()
    assert "done" in line_of(text, "multirun/good")
    assert "32 of 32" in text
    assert "best 0.522" in text
    assert "stopped" in line_of(text, "multirun/cut")


def test_a_sweep_on_slurm(look: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "multirun" / "a"
    sweep(folder)
    heartbeat(folder, done=22, total=64, unit="", step=None)
    submission_log(folder, [*(f"candidate{i}" for i in range(20, 40)), "preset-1"])
    heartbeat(folder / "22", job="57_2", host="n07", step="evaluate", what="gsm8k", unit="", gpus=[GPU])
    heartbeat(folder / "23", job="57_3", host="n08", age=40)
    heartbeat(folder / "24", job="12_0", host="n09")  # of an earlier attempt
    write(folder / "slurm" / "b0001" / "results" / "candidate25.1.json", {})
    theirs = Task("12", 4, "PENDING", "Resources")
    asked = squeue(
        monkeypatch, theirs, *(task(i, "RUNNING", "None", f"n{i:02}") for i in (0, 2, 3, 4, 5)),
        *(task(i) for i in range(6, 20)), task(20, "COMPLETED"),
    )  # fmt: skip
    text = look()
    assert asked == [1]
    for part in ("22 ", "n07", "running", "evaluate", "45%", "11 s left", "2.1 GB", "GPU 0 71% 34.1 GB"):
        assert part in line_of(text, "57_2 ")
    assert "no sign since 40 s" in line_of(text, "57_3 ")
    assert "n04" in line_of(text, "57_4 ")
    assert "%" not in line_of(text, "57_4 ")
    assert "57_0 " not in text  # in the journal
    assert "57_5 " not in text  # its result is there
    assert "pending 3rd (Priority)" in line_of(text, "57_7 ")
    assert "and 7 more pending" in text
    assert "1 running" in text


def test_many_tasks_run(look: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep(tmp_path / "multirun" / "a", 0)
    submission_log(
        tmp_path / "multirun" / "a", [f"screen{i}" for i in range(40)], {"event": "controller", "job": "61"}
    )
    squeue(
        monkeypatch, *(task(i, "RUNNING" if i < 16 else "PENDING") for i in range(40)),
        Task("61", 0, "PENDING", "Resources"),
    )  # fmt: skip
    text = look()
    assert "pending 25th (Resources)" in line_of(text, "multirun/a")
    assert "and 6 more running, 24 pending" in text
    assert "screen 9" in line_of(text, "57_9 ")


@pytest.mark.parametrize("how", ["away", "absent"])
def test_slurm_does_not_answer(
    look: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    folder = tmp_path / "multirun" / "a"
    sweep(folder, 1)
    submission_log(folder, ["candidate1", "candidate2"])
    heartbeat(folder / "1", job="57_0")
    if how == "away":
        squeue(monkeypatch)

        def away(name: str | None = None) -> list[Task]:
            raise SchedulerUnavailable("squeue: no answer for 60 s")

        monkeypatch.setattr(client, "queue", away)
    text = look()
    assert ("Slurm does not answer" if how == "away" else "there is no squeue on this machine") in text
    assert "45%" in line_of(text, "57_0 ")
    assert "submitted" in line_of(text, "57_1 ")


def test_what_has_ended_needs_no_slurm(
    look: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(tmp_path / "multirun" / "a", 2, status="done", winner=None)
    submission_log(tmp_path / "multirun" / "a", ["candidate1", "candidate2"])
    asked = squeue(monkeypatch)
    assert "done" in look()
    assert asked == []


def test_a_grid_on_slurm(look: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = tmp_path / "multirun" / "g"
    run(grid / "0", "done", fitness={"value": 0.5})
    run(grid / "1")
    heartbeat(grid / "1", job="57_1")
    run(grid / "3", age=100)
    heartbeat(grid / "3", age=90, job="57_3")
    over = {"event": "ended", "batch": "b0001", "task": 3, "state": "TIMEOUT", "reason": ""}
    submission_log(grid, [f"run{i}" for i in range(30)], over)
    squeue(monkeypatch, task(1, "RUNNING"), *(task(i) for i in range(4, 30)), task(2))
    text = look()
    assert "done" in line_of(text, "multirun/g/0 ")
    assert "running" in line_of(text, "multirun/g/1 ")
    assert "57_1" in text
    assert "pending 27th (Priority)" in line_of(text, "multirun/g/2 ")
    assert "failed" in line_of(text, "multirun/g/3 ")
    assert "out of time" in text
    assert "and 17 more pending in multirun/g" in text
    assert "1 running, 27 pending, 1 done, 1 failed" in text


def test_what_was_taken_back_or_submitted_again() -> None:
    lines = [
        {"event": "submitting", "batch": "b1", "array": True, "tasks": [[["run0", 1]], [["run1", 1]]]},
        {"event": "submitted", "batch": "b1", "job": "5"},
        {"event": "ended", "batch": "b1", "task": 0, "state": "NODE_FAIL", "reason": ""},
        {"event": "submitting", "batch": "b2", "array": False, "tasks": [[["run0", 2]]]},
        {"event": "submitted", "batch": "b2", "job": "6"},
        {"event": "submitting", "batch": "b3", "array": True, "tasks": [[["run1", 2]]]},
        {"event": "void", "batch": "b3"},
        {"event": "submitting", "batch": "b4", "tasks": 7},
        {"event": "ended", "batch": "b9", "task": 0},
    ]
    assert [(x.task, x.keys, x.ended) for x in readers.items_of(lines)] == [
        ("5_1", (("run1", 1),), ""),
        ("6", (("run0", 2),), ""),
    ]


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"status": "runn', b"[]", b"7", b"\xff\xfe", b'{"choices": 3}']
)
def test_half_written_files(look: Callable[..., str], tmp_path: Path, content: bytes) -> None:
    for names in (["result.json"], ["heartbeat.json"], ["result.json", "heartbeat.json", "events.jsonl"],
                  ["journal.jsonl", "heartbeat.json", "result.json", "slurm/jobs.jsonl"],
                  ["slurm/jobs.jsonl"]):  # fmt: skip
        for name in names:
            path = tmp_path / "outputs" / "-".join(n[0] for n in names) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content + b"\n" * (name.endswith("l") and len(content) > 3))
    assert "running" in look()


def test_values_of_any_kind(look: Callable[..., str], tmp_path: Path) -> None:
    odd: list[Any] = [None, [], {}, "x\x1b[31m\ny" * 40, -1, 1e300, True]
    me = {"time": time.time() - 60, "host": socket.gethostname()}
    for i, value in enumerate(odd):
        folder = tmp_path / "outputs" / str(i)
        keys = (
            "time",
            "started",
            "host",
            "pid",
            "job",
            "step",
            "what",
            "done",
            "total",
            "since",
            "rss",
            "gpus",
        )
        write(folder / "heartbeat.json", dict.fromkeys(keys, value) | {"time": time.time()})
        run(folder, error=value, fitness=value)
        run(tmp_path / "outputs" / f"stale{i}")
        write(tmp_path / "outputs" / f"stale{i}" / "heartbeat.json", me | {"pid": value})
        write(
            tmp_path / "multirun" / str(i) / "heartbeat.json",
            {"time": time.time(), "gpus": [{"used": value}]},
        )
        write_lines(
            tmp_path / "multirun" / str(i) / "journal.jsonl", {"event": "begin", "search": value},
            {"event": "candidate", "number": value, "fitness": value, "status": "failed", "reason": value},
        )  # fmt: skip
    assert "14 running" in look()
    assert "\x1b" not in look()


@pytest.mark.parametrize("width", [20, 41, 200])
def test_any_width(look: Callable[..., str], tmp_path: Path, width: int) -> None:
    folder = tmp_path / "outputs" / ("混合" * 8) / "2026-11-26"
    run(folder)
    heartbeat(folder, gpus=[GPU])
    sweep(tmp_path / "multirun" / "a")
    heartbeat(tmp_path / "multirun" / "a", done=22, total=32, unit="", step=None)
    assert "merge math" in look(width=width)


def test_a_long_path_loses_its_beginning(look: Callable[..., str], tmp_path: Path) -> None:
    run(tmp_path / "outputs" / "experiments_of_last_winter" / "2026-11-26" / "11-50-25", "done")
    assert "…/2026-11-26/11-50-25" in look()


def test_what_is_not_a_run_is_passed_by(look: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "outputs"
    for folder in (".hidden", "wandb", "report", "a/model", "b/c/d/e/f/g/h"):
        run(out / folder)
    run(out / "a", "done")
    text = look()
    assert "0 running, 1 done" in text


def test_it_goes_on_looking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    clock = [0.0]
    monkeypatch.setattr(readers.time, "monotonic", lambda: clock[0])
    out = tmp_path / "outputs"
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += 10
        if len(slept) == 1:
            run(out / "a")
            heartbeat(out / "a")
        elif len(slept) == 2:
            for i in range(40):
                run(out / f"n{i}", "done", age=i)
            run(out / "a", "done", fitness={"value": 0.25})
            (out / "a" / "heartbeat.json").unlink()
        elif len(slept) == 3:
            for p in (*out.rglob("*.json"), *out.glob("*"), out):
                p.rmdir() if p.is_dir() else p.unlink()
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr(monitor.time, "sleep", sleep)
    console = Console(file=io.StringIO(), width=80, height=20, force_terminal=True, color_system=None)
    monitor.watch(Monitor(interval=3.0), console)
    assert slept == [3.0] * 4
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert told.count("nothing runs under outputs/ and multirun/") >= 2
    assert "45%" in told
    assert "fitness 0.250" in told
    assert "and 25 more" in told
    assert "0 running, 41 done" in told
