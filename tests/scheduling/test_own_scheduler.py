"""A user's own scheduler, as docs/howto/add-a-scheduler.md describes it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from blocks import commands, files
from patience import patience  # noqa: F401 (a fixture that every test has)

import mergelab as lab
from mergelab.core import registry
from mergelab.core.errors import InputError
from mergelab.monitor import readers
from mergelab.monitor.collector import Sweep, Watcher
from mergelab.plan_page import run_rows
from mergelab.scheduling import job_array, submission_log
from mergelab.scheduling.job_array import JobArrayExecutor, WorkItem, WorkResult
from mergelab.scheduling.scheduler import Scheduler, scheduler_of
from mergelab.schema import Run

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "add-a-scheduler.md"


@pytest.fixture
def my_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's two files where it says."""
    monkeypatch.setattr(registry, "_used", None)
    monkeypatch.chdir(tmp_path)
    for name, seconds in (("POLL_RESULTS_S", 0.02), ("POLL_QUEUE_S", 0.2), ("RESULT_GRACE_S", 0.1)):
        monkeypatch.setattr(job_array, name, seconds)
    for name, text in files(PAGE).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / "my_conf"


def composed(my_conf: Path, *arguments: str) -> Run:
    return lab.compose("hardware=local", *arguments, config_dir=my_conf)


def local(my_conf: Path) -> Scheduler:
    scheduler = scheduler_of(composed(my_conf))
    assert scheduler is not None
    return scheduler


def items(**work: Callable[[], Any]) -> list[WorkItem]:
    return [WorkItem(name, do, Path.cwd() / name) for name, do in work.items()]


def collected(executor: JobArrayExecutor, work: list[WorkItem]) -> dict[str, WorkResult]:
    return {work[i].name: result for i, result in executor.run(work)}


def test_an_array_is_submitted_once_and_a_lost_task_again(my_conf: Path) -> None:
    mark = Path.cwd() / "first"

    def killed_at_first() -> str:
        if not mark.exists():
            mark.touch()
            os.killpg(0, signal.SIGKILL)  # as if the node had failed
        return "done"

    def fails() -> str:
        raise ValueError("a failure of its own")

    scheduler = local(my_conf)
    work = items(candidate0=partial(str.upper, "a"), candidate1=killed_at_first, candidate2=fails)
    heard: list[str] = []
    executor = JobArrayExecutor(Path("sweep"), "mergelab-1", scheduler, report=heard.append)
    found = collected(executor, work)
    assert (found["candidate0"].value, found["candidate1"].value) == ("A", "done")
    assert found["candidate2"].reason == "ValueError: a failure of its own" and not found["candidate2"].lost
    assert executor.log.submissions == {("candidate0", 1): 1, ("candidate1", 1): 2, ("candidate2", 1): 1}
    assert any("the node failed" in text and "submitted again" in text for text in heard)

    another = JobArrayExecutor(Path("sweep"), "", scheduler)  # after this process has ended
    assert collected(another, work) == found
    assert len(another.log.jobs) == 2
    begin = submission_log.read(Path("sweep/local"))[0]
    assert begin["options"] == {"state": "local-jobs"}


def test_cancelling_ends_the_processes(my_conf: Path) -> None:
    scheduler = local(my_conf)
    executor = JobArrayExecutor(Path("sweep"), "mergelab-1", scheduler)
    assert executor.submit(items(candidate0=partial(__import__("time").sleep, 60)))
    assert [t.state for t in scheduler.queue("mergelab-1")] == ["RUNNING"]
    readers.scheduler_names.cache_clear()
    (row,) = Watcher([Path("sweep")], 1).look().rows  # job=monitor finds it, and asks its queue
    assert isinstance(row, Sweep)
    assert [(t.job, t.state) for t in row.tasks] == [("1_0", "running")]
    assert executor.cancel() == ["1"]
    assert scheduler.queue("another") == []
    readers.scheduler_names.cache_clear()


def test_the_plan_shows_it_and_its_options_are_checked(my_conf: Path) -> None:
    plan, _ = (c[2:] for c in commands(PAGE))
    run = composed(my_conf, *plan[1:])
    assert run.hardware.on_cluster
    assert ["Local task", "state local-jobs"] in run_rows(run, None)
    with pytest.raises(InputError, match=r"hardware\.scheduler\.options: slots is not an option"):
        scheduler_of(composed(my_conf, "+hardware.scheduler.options.slots=2"))
    with pytest.raises(InputError, match=r"hardware\.scheduler\.name: 'pbs' is not a scheduler.* local"):
        scheduler_of(composed(my_conf, "hardware.scheduler.name=pbs"))
    with pytest.raises(InputError, match="hardware: slurm and scheduler both name a cluster"):
        scheduler_of(composed(my_conf, "hardware.slurm={cpus: 1}"))
