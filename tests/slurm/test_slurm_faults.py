"""One fault a test, on a real cluster: each search ends as an undisturbed one, nothing is submitted twice,
nothing is left behind. What does not disturb the others is done at the same time (`slurm_together`)."""

from __future__ import annotations

import getpass
import signal
from functools import partial
from pathlib import Path

import pytest
from slurm_search import Lab, Lines, Search
from slurm_together import Ended, after

pytestmark = pytest.mark.slurm
Found = tuple[Search, str]
"""A search, and what it said."""
N = 8
"""The candidates of a search, in two populations."""


def deaf(lab: Lab) -> Found:
    s = lab.search("slurm.time=1", "slurm.warning=10")
    s.fault("candidate2", "deaf 200", "ok")
    return s, s.run()


@after(deaf)
def test_out_of_time_and_deaf_to_the_warning(ended: Ended, undisturbed: Lines) -> None:
    s, out = ended()
    assert "out of time" in out
    assert s.lines() == undisturbed
    job = s.calls("candidate2")[0].split()[0]
    assert "TIMEOUT" in s.cluster.call("sacct", "-X", "-n", "-P", "-j", job, "-o", "State")
    s.nothing_twice()


def told_of_the_time(lab: Lab) -> Found:
    s = lab.search("slurm.time=2", "slurm.warning=60", "candidates_per_task=2")
    s.fault("candidate2", "sleep 200", "ok")
    return s, s.run()


@after(told_of_the_time)
def test_out_of_time_and_told_so_before(ended: Ended, undisturbed: Lines) -> None:
    s, out = ended()
    assert "the task's time limit was near" in (s.folder / "2" / "events.jsonl").read_text()
    assert s.lines() == undisturbed
    assert len(s.calls("candidate3")) == 1, out  # it had not begun, and is submitted again
    s.nothing_twice()


def limited(lab: Lab) -> Found:
    user = getpass.getuser()
    lab.cluster.call("sacctmgr", "-i", "add", "account", "few")
    lab.cluster.call("sacctmgr", "-i", "add", "user", user, "account=few", "MaxSubmitJobs=2")
    s = lab.search("slurm.account=few")
    return s, s.run()


@after(limited)
def test_a_limit_on_submitted_jobs_splits_the_array(ended: Ended, undisturbed: Lines) -> None:
    s, _ = ended()
    assert s.lines() == undisturbed
    assert all(len(batch) <= 2 for batch in s.submitted())
    s.nothing_twice()


def calm(lab: Lab) -> Found:
    s = lab.search()
    return s, s.run()


@after(calm)
def test_undisturbed_each_population_is_one_array(ended: Ended, undisturbed: Lines) -> None:
    s, _ = ended()
    assert s.lines() == undisturbed
    assert s.submitted() == [["preset-1"], [f"candidate{i}" for i in range(4)],
                             [f"candidate{i}" for i in range(4, N)]]  # fmt: skip
    s.nothing_twice()
    arrays = {t["id"].partition("_")[0] for t in s.cluster.tasks(s.name, set()) if "_" in t["id"]}
    assert len(arrays) == 2
    assert all(len(s.calls(f"candidate{i}")) == 1 for i in range(N))


def dies(fault: str, lab: Lab) -> Found:
    disk = lab.folder / "disk"
    disk.mkdir()
    s = lab.search(f"scratch={disk}")
    s.fault("candidate2", fault, "ok")
    return s, s.run()


killed, out_of_memory, raises = (partial(dies, fault) for fault in ("kill", "memory", "raise"))


@pytest.mark.parametrize(
    "told",
    [
        pytest.param("killed by SIGKILL", marks=after(killed), id="kill"),
        pytest.param("out of memory", marks=after(out_of_memory), id="memory"),
        pytest.param("RuntimeError: asked to fail", marks=after(raises), id="raise"),
    ],
)
def test_a_task_that_dies_is_tried_once_more(ended: Ended, undisturbed: Lines, told: str) -> None:
    s, out = ended()
    assert s.lines() == undisturbed
    assert len(s.calls("candidate2")) == 2
    assert told in out + (s.folder / "2" / "events.jsonl").read_text()
    assert s.submitted()[2] == ["candidate2"]  # the others of its array are not done again
    s.nothing_twice()


@after(killed)
def test_scratch_is_empty_after_a_kill(ended: Ended, undisturbed: Lines) -> None:
    s, _ = ended()
    disk = s.folder.parent / "disk"
    used = {Path(line.split()[3]) for line in s.calls("candidate2")}
    assert len(used) == 2 and all(disk in path.parents for path in used)
    assert s.lines() == undisturbed
    assert list(disk.rglob("*")) == []


@after(killed)
def test_what_is_found_beside_a_candidates_log(ended: Ended) -> None:
    folder = ended()[0].folder / "2"
    assert len(list(folder.glob("slurm-*.out"))) == len(list(folder.glob("slurm-*.err"))) == 2
    assert all(p.exists() for p in folder.glob("slurm-*"))  # the links lead somewhere
    assert "Killed" in "".join(p.read_text() for p in folder.glob("slurm-*.err"))
    assert (folder / "mergelab.log").exists()


def always_dies(lab: Lab) -> Found:
    s = lab.search()
    s.fault("candidate1", "kill")
    return s, s.run()


@after(always_dies)
def test_a_candidate_that_always_dies_is_told_as_a_failure(ended: Ended) -> None:
    s, _ = ended()
    failed = s.lines()[1]
    assert (failed["status"], failed["fitness"]) == ("failed", None)
    assert "SIGKILL" in failed["reason"] and "Slurm task" in failed["reason"]
    assert len(s.calls("candidate1")) == 2
    assert [x["status"] for x in s.lines()].count("done") == N - 1
    s.nothing_twice()


def cancelled(lab: Lab) -> Found:
    s = lab.search()
    s.fault("candidate2", "sleep 200", "ok")
    process = s.start()
    job, _, _ = s.measured("candidate2")
    s.cluster.call("scancel", job)
    return s, s.end(process)


@after(cancelled)
def test_a_cancelled_task(ended: Ended, undisturbed: Lines) -> None:
    s, out = ended()
    assert "cancelled" in out
    assert s.lines() == undisturbed
    s.nothing_twice()


def requeued(lab: Lab) -> Found:
    s = lab.search("candidates_per_task=2")
    s.fault("candidate1", "sleep 200", "ok")
    process = s.start()
    job, _, _ = s.measured("candidate1")
    s.cluster.call("scontrol", "requeue", job)
    return s, s.end(process)


@after(requeued)
def test_a_requeued_task(ended: Ended, undisturbed: Lines) -> None:
    s, _ = ended()
    assert s.lines() == undisturbed
    assert len(s.calls("candidate0")) == 1  # what the task had done before is not done again
    assert len(s.calls("candidate1")) == 2
    assert len(s.submitted()) == 3
    s.nothing_twice()


def preempted(lab: Lab) -> Found:
    s = lab.search("slurm.partition=n5")  # where nobody else is
    s.fault("candidate2", "sleep 200", "ok")
    process = s.start()
    _, _, node = s.measured("candidate2")
    path = lab.folder / "urgent.sh"
    path.write_text("#!/bin/bash\nsleep 1\n")
    s.cluster.call("sbatch", "-p", "urgent", "--exclusive", "-w", node, "-o", "/dev/null", str(path))
    return s, s.end(process)


@after(preempted)
def test_a_preempted_task(ended: Ended, undisturbed: Lines) -> None:
    s, _ = ended()
    assert s.lines() == undisturbed
    assert len(s.calls("candidate2")) == 2
    s.nothing_twice()


def node_lost(lab: Lab) -> tuple[Search, str]:
    s = lab.search("slurm.partition='n6,n7'")  # where nobody else is
    s.fault("candidate2", "sleep 200", "ok")
    process = s.start()
    _, _, node = s.measured("candidate2")
    s.cluster.kill(f"slurmd-{node}")
    s.end(process)
    return s, node


@after(node_lost)
def test_a_lost_node(ended: Ended, undisturbed: Lines) -> None:
    s, node = ended()
    assert s.lines() == undisturbed
    assert s.calls("candidate2")[-1].split()[2] != node
    s.nothing_twice()


def on_a_small_cluster(lab: Lab) -> Found:
    s = lab.search(on=lab.labs.small)
    return s, s.run()


@after(on_a_small_cluster)
def test_the_clusters_largest_array_splits_a_population(ended: Ended, undisturbed: Lines) -> None:
    s, _ = ended()
    assert s.lines() == undisturbed
    assert [len(batch) for batch in s.submitted()] == [1, 3, 1, 3, 1]


def killed_without_accounting(lab: Lab) -> Found:
    s = lab.search(on=lab.labs.small)
    s.fault("candidate2", "kill", "ok")
    return s, s.run()


@after(killed_without_accounting)
def test_without_accounting_a_killed_task_is_noticed(ended: Ended, undisturbed: Lines) -> None:
    s, out = ended()
    assert "candidate2: killed by SIGKILL" in out
    assert s.lines() == undisturbed


def killed_at(where: str, lab: Lab) -> Found:
    s = lab.search()
    s.run(status=-signal.SIGKILL, STOP_AT=where)
    return s, s.run()


@pytest.mark.parametrize(
    (),
    [pytest.param(marks=after(partial(killed_at, at)), id=at) for at in ("intended", "submitted")],
)
def test_killed_around_sbatch(ended: Ended, undisturbed: Lines) -> None:
    s, _ = ended()
    assert s.lines() == undisturbed
    assert all(len(s.calls(f"candidate{i}")) == 1 for i in range(N))
    s.nothing_twice()


def adopted(lab: Lab) -> Found:
    s = lab.search()
    s.fault("candidate2", "sleep 15")
    process = s.start()
    s.measured("candidate2")
    process.interrupt()
    return s, s.run()


@after(adopted)
def test_killed_with_tasks_running_which_are_adopted(ended: Ended, undisturbed: Lines) -> None:
    s, _ = ended()
    assert s.lines() == undisturbed
    assert len(s.calls("candidate2")) == 1
    assert len(s.submitted()) == 3
    s.nothing_twice()


def finished_meanwhile(lab: Lab) -> Found:
    s = lab.search()
    process = s.start(PACE=4)
    s.measured("candidate3")
    process.interrupt()
    s.cluster.emptied(s.name)
    return s, s.run()


@after(finished_meanwhile)
def test_killed_and_all_finished_meanwhile(ended: Ended, undisturbed: Lines) -> None:
    s, _ = ended()
    assert s.lines() == undisturbed
    assert all(len(s.calls(f"candidate{i}")) == 1 for i in range(N))
    s.nothing_twice()


def rank_dies(lab: Lab) -> Found:
    s = lab.search("workers=2", "candidates_per_task=4")
    s.fault("candidate1", "kill", "ok")
    return s, s.run()


@after(rank_dies)
def test_one_rank_of_several_dies(ended: Ended, undisturbed: Lines) -> None:
    s, _ = ended()
    assert s.lines() == undisturbed
    assert {s.calls(f"candidate{i}")[0].split()[1] for i in range(4)} == {"0", "1"}
    assert len(s.calls("candidate1")) == 2
    assert all(len(s.calls(f"candidate{i}")) == 1 for i in (0, 2, 3))
    s.nothing_twice()


def ctrl_c(lab: Lab) -> Found:
    s = lab.search()
    s.fault("candidate2", "sleep 200", "ok")
    process = s.start()
    s.measured("candidate2")
    assert process.interrupt(signal.SIGINT) == 130
    s.cluster.emptied(s.name)
    s.run()
    return s, process.out.read_text()


@after(ctrl_c)
def test_ctrl_c_cancels_and_says_so(ended: Ended, undisturbed: Lines) -> None:
    s, out = ended()
    assert "cancelled Slurm job" in out
    assert s.lines() == undisturbed
    s.nothing_twice()


def terminal_closed(lab: Lab) -> tuple[Search, str]:
    s = lab.search()
    s.fault("candidate2", "sleep 15")
    process = s.start()
    s.measured("candidate2")
    process.interrupt(signal.SIGHUP)
    left = s.cluster.call("squeue", "-h", f"--name={s.name}")
    s.run()
    return s, left


@after(terminal_closed)
def test_a_closed_terminal_leaves_the_tasks(ended: Ended, undisturbed: Lines) -> None:
    s, left = ended()
    assert left
    assert s.lines() == undisturbed
    assert len(s.calls("candidate2")) == 1
    s.nothing_twice()
