"""One fault a test, on a real cluster: each search ends as an undisturbed one, nothing is submitted twice,
nothing is left behind."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from patience import until
from slurm_cluster import Cluster
from slurm_search import Search, interrupt, port, started

pytestmark = pytest.mark.slurm
Searching = Callable[..., Search]
Lines = list[dict[str, Any]]


def test_undisturbed_each_population_is_one_array(searching: Searching, undisturbed: Lines) -> None:
    s = searching()
    s.run()
    assert s.lines() == undisturbed
    assert s.submitted() == [["preset-1"], [f"candidate{i}" for i in range(4)],
                             [f"candidate{i}" for i in range(4, 8)]]  # fmt: skip
    s.nothing_twice()
    arrays = {t["id"].partition("_")[0] for t in s.cluster.tasks(s.name, set()) if "_" in t["id"]}
    assert len(arrays) == 2
    assert all(len(s.calls(f"candidate{i}")) == 1 for i in range(8))


@pytest.mark.parametrize(
    ("fault", "told"),
    [("kill", "killed by SIGKILL"), ("memory", "out of memory"), ("raise", "")],
)
def test_a_task_that_dies_is_tried_once_more(
    searching: Searching, undisturbed: Lines, fault: str, told: str
) -> None:
    s = searching()
    s.fault("candidate2", fault, "ok")
    out = s.run()
    assert s.lines() == undisturbed
    assert len(s.calls("candidate2")) == 2
    assert told in out
    assert s.submitted()[2] == ["candidate2"]  # the others of its array are not done again
    s.nothing_twice()


def test_a_candidate_that_always_dies_is_told_as_a_failure(searching: Searching) -> None:
    s = searching()
    s.fault("candidate1", "kill")
    s.run()
    failed = s.lines()[1]
    assert (failed["status"], failed["fitness"]) == ("failed", None)
    assert "SIGKILL" in failed["reason"] and "Slurm task" in failed["reason"]
    assert len(s.calls("candidate1")) == 2
    assert [x["status"] for x in s.lines()].count("done") == 7
    s.nothing_twice()


def test_a_cancelled_task(searching: Searching, undisturbed: Lines) -> None:
    s = searching()
    s.fault("candidate2", "sleep 60", "ok")
    process = s.start()
    job, _, _ = s.measured("candidate2")
    s.cluster.call("scancel", job)
    assert "cancelled" in s.end(process)
    assert s.lines() == undisturbed
    s.nothing_twice()


def test_out_of_time_and_deaf_to_the_warning(searching: Searching, undisturbed: Lines) -> None:
    s = searching("slurm.time=1", "slurm.warning=10")
    s.fault("candidate2", "deaf 200", "ok")
    process = s.start()
    job, _, _ = s.measured("candidate2")
    assert "out of time" in s.end(process)
    assert s.lines() == undisturbed
    assert "TIMEOUT" in s.cluster.call("sacct", "-X", "-n", "-P", "-j", job, "-o", "State")
    s.nothing_twice()


def test_out_of_time_and_told_so_before(searching: Searching, undisturbed: Lines) -> None:
    s = searching("slurm.time=2", "slurm.warning=90", "candidates_per_task=2")
    s.fault("candidate2", "sleep 200", "ok")
    out = s.run()
    assert "Slurm's time limit was near" in (s.folder / "2" / "events.jsonl").read_text()
    assert s.lines() == undisturbed
    assert len(s.calls("candidate3")) == 1, out  # it had not begun, and is submitted again
    s.nothing_twice()


def test_a_requeued_task(searching: Searching, undisturbed: Lines) -> None:
    s = searching("candidates_per_task=2")
    s.fault("candidate1", "sleep 60", "ok")
    process = s.start()
    job, _, _ = s.measured("candidate1")
    s.cluster.call("scontrol", "requeue", job)
    s.end(process)
    assert s.lines() == undisturbed
    assert len(s.calls("candidate0")) == 1  # what the task had done before is not done again
    assert len(s.submitted()) == 3
    s.nothing_twice()


def test_a_preempted_task(searching: Searching, undisturbed: Lines) -> None:
    s = searching()
    s.fault("candidate2", "sleep 60", "ok")
    process = s.start()
    _, _, node = s.measured("candidate2")
    script = "#!/bin/bash\nsleep 1\n"
    path = s.folder / "urgent.sh"
    path.write_text(script)
    s.cluster.call("sbatch", "-p", "urgent", "--exclusive", "-w", node, "-o", "/dev/null", str(path))
    s.end(process)
    assert s.lines() == undisturbed
    assert len(s.calls("candidate2")) == 2
    s.nothing_twice()


def test_a_lost_node(searching: Searching, undisturbed: Lines) -> None:
    s = searching()
    s.fault("candidate2", "sleep 100", "ok")
    process = s.start()
    _, _, node = s.measured("candidate2")
    s.cluster.kill(f"slurmd-{node}")
    s.end(process)
    assert s.lines() == undisturbed
    assert s.calls("candidate2")[-1].split()[2] != node
    s.nothing_twice()


@pytest.mark.parametrize("when", ["submit", "run", "collect"])
def test_slurmctld_away(searching: Searching, undisturbed: Lines, when: str) -> None:
    s = searching()
    s.fault("candidate2", f"sleep {12 if when == 'run' else 4}")
    s.fault("candidate3", "kill", "ok")
    if when == "submit":  # of the first population
        s.fault("preset-1", "sleep 3")
    process = s.start()
    s.measured("preset-1" if when == "submit" else "candidate2")
    if when == "collect":  # the tasks end without it
        s.measured("candidate3")
        time.sleep(2)
    if when == "run":  # a crash; what it knew is on its disk after five seconds
        time.sleep(6)
    (s.cluster.kill if when == "run" else s.cluster.stop)("slurmctld")
    time.sleep(12)
    s.cluster.start("slurmctld")
    s.end(process)
    assert s.lines() == undisturbed
    s.nothing_twice()


def test_a_limit_on_submitted_jobs_splits_the_array(searching: Searching, undisturbed: Lines) -> None:
    s = searching()
    s.cluster.call("sacctmgr", "-i", "modify", "user", "where", "name=root", "set", "MaxSubmitJobs=2")
    try:
        s.run()
    finally:
        s.cluster.call("sacctmgr", "-i", "modify", "user", "where", "name=root", "set", "MaxSubmitJobs=-1")
    assert s.lines() == undisturbed
    assert all(len(batch) <= 2 for batch in s.submitted())
    s.nothing_twice()


def test_the_clusters_largest_array_splits_a_population(
    searching: Searching, undisturbed: Lines, tmp_path_factory: pytest.TempPathFactory
) -> None:
    small = started(tmp_path_factory.mktemp("small"), port=port() + 100, nodes=2, accounting=False, array=4)
    try:
        s = searching(on=small)
        s.run()
        assert s.lines() == undisturbed
        assert [len(batch) for batch in s.submitted()] == [1, 3, 1, 3, 1]
    finally:
        small._tool("wipe")


def test_without_accounting_a_killed_task_is_noticed(
    searching: Searching, undisturbed: Lines, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plain = started(tmp_path_factory.mktemp("plain"), port=port() + 100, nodes=2, accounting=False)
    try:
        s = searching(on=plain)
        s.fault("candidate2", "kill", "ok")
        assert "candidate2: killed by SIGKILL" in s.run()
        assert s.lines() == undisturbed
    finally:
        plain._tool("wipe")


@pytest.mark.parametrize("where", ["intended", "submitted"])
def test_killed_around_sbatch(searching: Searching, undisturbed: Lines, where: str) -> None:
    s = searching()
    s.run(status=-signal.SIGKILL, STOP_AT=where)
    s.run()
    assert s.lines() == undisturbed
    assert all(len(s.calls(f"candidate{i}")) == 1 for i in range(8))
    s.nothing_twice()


def test_killed_with_tasks_running_which_are_adopted(searching: Searching, undisturbed: Lines) -> None:
    s = searching()
    s.fault("candidate2", "sleep 8")
    process = s.start()
    s.measured("candidate2")
    interrupt(process)
    s.run()
    assert s.lines() == undisturbed
    assert len(s.calls("candidate2")) == 1
    assert len(s.submitted()) == 3
    s.nothing_twice()


def test_killed_and_all_finished_meanwhile(searching: Searching, undisturbed: Lines) -> None:
    s = searching()
    process = s.start(PACE=2)
    s.measured("candidate3")
    interrupt(process)
    until(lambda: not s.cluster.call("squeue", "-h", f"--name={s.name}"), "all tasks have ended", 120)
    s.run()
    assert s.lines() == undisturbed
    assert all(len(s.calls(f"candidate{i}")) == 1 for i in range(8))
    s.nothing_twice()


def test_one_rank_of_several_dies(searching: Searching, undisturbed: Lines) -> None:
    s = searching("workers=2", "candidates_per_task=4")
    s.fault("candidate1", "kill", "ok")
    s.run()
    assert s.lines() == undisturbed
    assert {s.calls(f"candidate{i}")[0].split()[1] for i in range(4)} == {"0", "1"}
    assert len(s.calls("candidate1")) == 2
    assert all(len(s.calls(f"candidate{i}")) == 1 for i in (0, 2, 3))
    s.nothing_twice()


def test_ctrl_c_cancels_and_says_so(searching: Searching, undisturbed: Lines) -> None:
    s = searching()
    s.fault("candidate2", "sleep 100", "ok")
    process = s.start()
    s.measured("candidate2")
    process.send_signal(signal.SIGINT)
    out = s.end(process, status=130)
    assert "cancelled Slurm job" in out
    until(lambda: not s.cluster.call("squeue", "-h", f"--name={s.name}"), "nothing is left", 120)
    s.run()
    assert s.lines() == undisturbed
    s.nothing_twice()


def test_a_closed_terminal_leaves_the_tasks(searching: Searching, undisturbed: Lines) -> None:
    s = searching()
    s.fault("candidate2", "sleep 6")
    process = s.start()
    s.measured("candidate2")
    interrupt(process, signal.SIGHUP)
    assert s.cluster.call("squeue", "-h", f"--name={s.name}")
    s.run()
    assert s.lines() == undisturbed
    assert len(s.calls("candidate2")) == 1
    s.nothing_twice()


def test_scratch_is_empty_after_a_kill(searching: Searching, undisturbed: Lines, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    s = searching(f"scratch={disk}")
    s.fault("candidate2", "kill", "ok")
    s.run()
    assert s.lines() == undisturbed
    left = [p for p in disk.rglob("*") if p.name != "mergelab-models"]
    assert left == []


def test_what_is_found_beside_a_candidates_log(searching: Searching, cluster: Cluster) -> None:
    s = searching()
    s.fault("candidate2", "kill", "ok")
    s.run()
    folder = s.folder / "2"
    assert len(list(folder.glob("slurm-*.out"))) == len(list(folder.glob("slurm-*.err"))) == 2
    assert all(p.exists() for p in folder.glob("slurm-*"))  # the links lead somewhere
    assert "Killed" in "".join(p.read_text() for p in folder.glob("slurm-*.err"))
    assert (folder / "mergelab.log").exists()
