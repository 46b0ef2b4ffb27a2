"""Batches on a cluster that does what a test wants."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from patience import patience, token  # noqa: F401 (fixtures that every test has)

from mergelab.core.run_dir import write_json
from mergelab.scheduling import batch_dir, job_array
from mergelab.scheduling.job_array import JobArrayExecutor, WorkItem, WorkResult
from mergelab.scheduling.scheduler import (
    ENDED,
    INFRASTRUCTURE_FAILURES,
    JobRequest,
    Scheduler,
    SchedulerLimitReached,
    SchedulerRejected,
    SchedulerUnavailable,
    Task,
)


class FakeCluster(Scheduler):
    """A scheduler that does what a test wants. Tasks are done as soon as they are submitted, unless `fates`
    has another end for an item: a state, `runs` (until `finish`), `forgotten` or `cut off`."""

    name = "slurm"
    title = "Slurm"

    def __init__(self) -> None:
        self.requests: list[JobRequest] = []
        self.submitted: list[tuple[str, list[list[str]]]] = []
        """The job's number and the items of each task."""
        self.fates: dict[str, list[str]] = {}
        self.answers: list[tuple[Exception, bool]] = []
        """What sbatch fails with before it works, and whether the job is there all the same."""
        self.tasks: list[Task] = []
        self.folders: dict[tuple[str, int], tuple[Path, list[WorkItem]]] = {}
        self.cancelled: list[str] = []
        self.questions: list[str] = []
        self.away = 0
        """How often squeue does not answer."""
        self.forgetful = False
        """Whether squeue knows no ended task any more."""
        self.most = 1000
        self.room: int | None = None
        """The most tasks that a user may submit at once."""

    def submit(self, job: JobRequest) -> str:
        self.questions.append("sbatch")
        self.requests.append(job)
        groups = [pickle.loads(p.read_bytes()) for p in _numbered(job.folder)]
        if self.room is not None and len(groups) > self.room:
            raise SchedulerLimitReached("sbatch: AssocMaxSubmitJobLimit")
        if self.answers:
            answer, there = self.answers.pop(0)
            if there:
                self._begin(job, groups)
            raise answer
        return self._begin(job, groups)

    def _begin(self, request: JobRequest, groups: list[list[WorkItem]]) -> str:
        job, folder = str(100 + len(self.submitted)), request.folder
        self.submitted.append((job, [[i.name for i in g] for g in groups]))
        for index, items in enumerate(groups):
            self.folders[job, index] = folder, items
            state = self._state(folder, index, items)
            if state != "forgotten":
                array = request.tasks is not None
                self.tasks.append(Task(job, index, state, "", "n1", "", folder.name, "", array))
        return job

    def _state(self, folder: Path, index: int, items: list[WorkItem]) -> str:
        for item in items:
            fate = self.fates.get(item.name, [])
            end = fate.pop(0) if fate else "COMPLETED"
            if end == "runs":
                return "RUNNING"
            if end in ("PENDING", "forgotten"):
                return end
            batch_dir.started_mark(folder, item.key).touch()
            if end == "cut off":  # with its node, before its script came to its end
                return "FAILED"
            if end != "COMPLETED":
                (folder / f"status.{index}").write_text("1\n")
                return end
            write_json(batch_dir.result_file(folder, item.key), {"value": item.work()})
        return "COMPLETED"

    def finish(self, job: str, index: int = 0) -> None:
        """A task that runs does what it has to, and ends."""
        folder, items = self.folders[job, index]
        state = self._state(folder, index, items)
        self.tasks = [
            Task(job, index, state, "", "n1", "", folder.name) if (t.job, t.index) == (job, index) else t
            for t in self.tasks
        ]

    def queue(self, name: str | None = None) -> list[Task]:
        self.questions.append("squeue")
        if self.away:
            self.away -= 1
            raise SchedulerUnavailable("squeue: Unable to contact slurm controller")
        return [t for t in self.tasks if not (self.forgetful and t.over)]

    def history(self, jobs: Sequence[str]) -> list[Task]:
        return [t for t in self.tasks if t.job in jobs]

    def history_by_name(self, name: str) -> list[Task]:
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
    for name, seconds in (
        ("POLL_RESULTS_S", 0.002),
        ("POLL_QUEUE_S", 0.01),
        ("RESULT_GRACE_S", 0.03),
        ("RETRY_S", 0.02),
        ("QUEUE_MEMORY_S", 0),
    ):
        monkeypatch.setattr(job_array, name, seconds)
    return FakeCluster()


Make = Callable[..., JobArrayExecutor]


@pytest.fixture
def batch(tmp_path: Path, cluster: FakeCluster) -> Make:
    """`batch(per_task=2)`: what submits to the cluster, in the test's own folder."""
    return partial(JobArrayExecutor, tmp_path / "sweep", "mergelab-1", cluster)


def work(names: str, folder: Path = Path("/nowhere")) -> list[WorkItem]:
    return [WorkItem(n, partial(str.upper, n), folder / n) for n in names]


def outcomes(of: JobArrayExecutor, names: str, array: bool = True) -> dict[str, WorkResult]:
    return {names[i]: done for i, done in of.run(work(names), array)}


def test_a_population_is_one_array_whose_results_are_collected(cluster: FakeCluster, batch: Make) -> None:
    assert {n: d.value for n, d in outcomes(batch(), "abcd").items()} == dict(
        zip("abcd", "ABCD", strict=True)
    )
    assert cluster.submitted == [("100", [["a"], ["b"], ["c"], ["d"]])]


def test_what_is_no_population_is_a_job_each(cluster: FakeCluster, batch: Make) -> None:
    outcomes(batch(), "ab", array=False)
    assert cluster.items == [["a"], ["b"]]


def test_a_task_has_several_items_and_runs_the_worker(cluster: FakeCluster, batch: Make) -> None:
    of = batch(per_task=2, ranks=4)
    assert len(outcomes(of, "abcde")) == 5
    assert cluster.submitted == [("100", [["a", "b"], ["c", "d"], ["e"]])]
    (request,) = cluster.requests
    assert (request.tasks, request.ranks) == (3, 2)  # a process has at least an item
    assert request.command[-2:] == [cluster.worker, str(of.log.batch_dir("b0001-0000"))]


def test_results_come_as_they_come(cluster: FakeCluster, batch: Make) -> None:
    cluster.fates = {n: ["runs"] for n in "abc"}
    of = batch()
    coming = of.run(work("abc"))
    assert of.submit(work("abc"))
    came = []
    for n in "bca":
        cluster.finish("100", "abc".index(n))
        position, result = next(coming)
        came.append((position, result.value))
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
    cluster.answers = [(SchedulerUnavailable("sbatch: Socket timed out"), True)]
    assert len(outcomes(batch(), "ab")) == 2
    assert len(cluster.submitted) == 1
    assert cluster.questions.count("sbatch") == 1
    assert ("sacct" in cluster.questions) is forgetful


def test_a_job_that_never_was_is_submitted_again_once_slurm_has_been_asked(
    cluster: FakeCluster, batch: Make
) -> None:
    cluster.answers = [(SchedulerUnavailable("sbatch: Unable to contact slurm controller"), False)]
    cluster.away = 3
    of = batch()
    assert len(outcomes(of, "ab")) == 2
    assert cluster.questions[:6] == ["sbatch", "squeue", "squeue", "squeue", "squeue", "sacct"]
    assert cluster.questions[6] == "sbatch"
    assert of.log.revoked == {"b0001-0000"}
    assert (of.log.batch_dir("b0001-0000") / "void").exists()


def test_the_accounting_is_not_asked_for_what_squeue_would_know(
    cluster: FakeCluster, batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_array, "QUEUE_MEMORY_S", 60)
    cluster.answers = [(SchedulerUnavailable("sbatch: Unable to contact slurm controller"), False)]
    assert len(outcomes(batch(), "ab")) == 2
    assert "sacct" not in cluster.questions and len(cluster.submitted) == 1


def test_another_process_looks_up_what_the_killed_one_had_begun(cluster: FakeCluster, batch: Make) -> None:
    cluster.answers = [(SchedulerUnavailable("killed in the middle of it"), True)]
    assert not batch().submit(work("ab"))
    assert len(outcomes(batch(), "ab")) == 2
    assert len(cluster.submitted) == 1


def test_killed_before_the_batch_had_a_folder(cluster: FakeCluster, batch: Make) -> None:
    batch().log.record_intent([[("a", 1)]], True, {})
    assert len(outcomes(batch(), "a")) == 1


def test_a_job_that_turns_up_after_it_was_given_up_is_cancelled(cluster: FakeCluster, batch: Make) -> None:
    cluster.fates = {"a": ["runs"]}
    of = batch()
    of.log.batch_dir(of.log.record_intent([[("a", 1)]], True, {})).mkdir()
    of.log.record_rejected("b0001-0000", "Slurm does not know it")
    cluster.tasks = [Task("99", 0, "PENDING", comment="b0001-0000")]
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
    cluster.answers = [(SchedulerLimitReached("sbatch: AssocMaxSubmitJobLimit"), False)] * 3
    of, shown = batch(), []
    of.show_status = shown.append
    assert len(outcomes(of, "a")) == 1
    assert cluster.questions.count("sbatch") == 4
    assert any("AssocMaxSubmitJobLimit" in text for text in shown)
    assert shown[-1] == ""


def test_a_trouble_that_is_over_is_not_shown_any_more(cluster: FakeCluster, batch: Make) -> None:
    cluster.fates = {"a": ["runs"]}
    cluster.answers = [(SchedulerLimitReached("sbatch: AssocMaxSubmitJobLimit"), False)]
    of, shown = batch(), []
    coming = of.run(work("a"), array=False)

    def show(text: str) -> None:
        shown.append(text)
        if "1 running" in text:
            cluster.finish("100")

    of.show_status = show
    list(coming)
    assert "AssocMaxSubmitJobLimit" not in next(t for t in shown if "1 running" in t)


def test_what_slurm_will_never_take_is_raised(cluster: FakeCluster, batch: Make) -> None:
    cluster.answers = [(SchedulerRejected("sbatch: Invalid partition name specified"), False)]
    of = batch()
    with pytest.raises(SchedulerRejected, match="Invalid partition"):
        outcomes(of, "a")
    assert of.log.unconfirmed() == [] and of.log.assignments == {}
    assert len(outcomes(batch(), "a")) == 1  # when it has been put right


@pytest.mark.parametrize("state", sorted(INFRASTRUCTURE_FAILURES))
def test_work_that_lost_its_node_is_submitted_again(cluster: FakeCluster, batch: Make, state: str) -> None:
    cluster.fates = {"b": [state]}
    heard: list[str] = []
    found = outcomes(batch(report=heard.append), "abc")
    assert all(d.reason is None for d in found.values())
    assert cluster.items == [["a", "b", "c"], ["b"]]
    assert any(ENDED[state] in h and "submitted again" in h for h in heard)


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
    assert found["b"].reason.startswith(f"{ENDED[state]}{status} (n1, Slurm task 100_1)")
    assert found["a"].value == "A" and len(cluster.submitted) == 1


def test_what_squeue_has_forgotten_the_accounting_still_knows(cluster: FakeCluster, batch: Make) -> None:
    cluster.fates, cluster.forgetful = {"a": ["TIMEOUT"]}, True
    assert str(outcomes(batch(), "a")["a"].reason).startswith("out of time (n1")
    assert len(cluster.submitted) == 1


def test_a_lost_task_is_told_with_its_exit_status_and_last_words(cluster: FakeCluster, batch: Make) -> None:
    cluster.fates = {"a": ["runs"]}
    of = batch()
    of.submit(work("a"))
    place = of.log.batch_dir("b0001-0000")
    (place / "100_0.out").write_text("not this\n")
    (place / "100_0.err").write_text("one\n\ntwo\nthree\n  Killed \n")
    cluster.fates = {"a": ["FAILED"]}
    cluster.finish("100")
    (place / "status.0").write_text("137\n")
    reason = outcomes(of, "a")["a"].reason
    assert reason == ("killed by SIGKILL (n1, Slurm task 100); its last output: "
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
    (of.log.batch_dir("b0001-0000") / "100_0.err").write_text(f"{word}\n")
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
    assert [n for items in cluster.items for n in items].count("b") == job_array.MAX_RESUBMISSIONS


def test_what_is_preempted_for_ever_is_given_up(cluster: FakeCluster, batch: Make) -> None:
    cluster.fates = {"a": ["PREEMPTED"] * 100}
    assert outcomes(batch(), "a")["a"].lost
    assert len(cluster.submitted) == job_array.MAX_RESUBMISSIONS


def test_a_task_that_slurm_cannot_launch_is_taken_away_and_submitted_again(
    cluster: FakeCluster, batch: Make
) -> None:
    cluster.fates = {"a": ["PENDING"]}
    of = batch()
    of.submit(work("a"))
    cluster.tasks = [Task("100", 0, "PENDING", "launch failed requeued held", "", "", "b0001-0000", "", True)]
    assert outcomes(of, "a")["a"].value == "A"
    assert cluster.cancelled == ["100_0"]


def test_a_number_that_slurm_has_given_twice_is_not_taken_for_ours(cluster: FakeCluster, batch: Make) -> None:
    cluster.fates = {"a": ["forgotten"]}
    of = batch()
    of.submit(work("a"))
    cluster.tasks = [Task("100", 0, "RUNNING", comment="b0007-0000")]  # of another sweep
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

    of.show_status = show
    assert outcomes(of, "a")["a"].value == "A"
    assert any("Slurm does not answer" in text and "running tasks are not affected" in text for text in shown)
    assert len(cluster.submitted) == 1


def test_a_slurm_that_is_away_when_a_stray_job_is_cancelled_ends_nothing(
    cluster: FakeCluster, batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = batch()
    of.log.batch_dir(of.log.record_intent([[("z", 1)]], True, {})).mkdir()
    of.log.record_rejected("b0001-0000", "Slurm does not know it")
    of.submit(work("a"))
    cluster.tasks.append(Task("99", 0, "RUNNING", comment="b0001-0000"))

    def away(tasks: Any) -> None:
        raise SchedulerUnavailable("scancel: Unable to contact slurm controller")

    monkeypatch.setattr(cluster, "cancel", away)
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


def test_what_a_cancelled_array_had_finished_is_not_done_again(cluster: FakeCluster, batch: Make) -> None:
    cluster.fates = {"b": ["runs"]}
    of = batch()
    of.submit(work("abc"))
    of.cancel()
    assert len(outcomes(batch(), "abc")) == 3
    assert cluster.items == [["a", "b", "c"], ["b"]]


@pytest.mark.parametrize("at", [0, 3])
def test_what_a_task_said_last(tmp_path: Path, at: int) -> None:
    assert batch_dir.last_lines(tmp_path, "57", at) == ""
    (tmp_path / "57.out").write_text("of a plain job\n")
    assert batch_dir.last_lines(tmp_path, "57", at) == "of a plain job"
    (tmp_path / f"57_{at}.err").write_bytes(b"x" * 9000 + b"\n\xff\n" + b"last\n")
    said = batch_dir.last_lines(tmp_path, "57", at)
    assert said.endswith("| last") and len(said) <= 400
