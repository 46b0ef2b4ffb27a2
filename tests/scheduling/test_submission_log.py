"""What has been submitted, and what of it is still whose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from patience import patience, token  # noqa: F401 (fixtures that every test has)

from mergelab.core.errors import InputError
from mergelab.scheduling import submission_log
from mergelab.scheduling.submission_log import Assignment, SubmissionLog

A, B, C = ("a", 1), ("b", 1), ("c", 1)


def submitted(folder: Path) -> SubmissionLog:
    """Two tasks of a batch that became a job: the first has two items."""
    log = SubmissionLog(folder, "mergelab-1")
    batch = log.record_intent([[A, B], [C]], True, {"a": "0", "b": "1", "c": "2"})
    log.batch_dir(batch).mkdir()
    log.record_submitted(batch, "57")
    return log


def state(log: SubmissionLog) -> Any:
    return (log.name, log.assignments, log.tasks, log.jobs, log.revoked, log.ended, log.submissions,
            log.unconfirmed(), log.live(), log.controllers())  # fmt: skip


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    log = submitted(tmp_path)
    assert log.assignments == {
        A: Assignment("b0001-0000", 0),
        B: Assignment("b0001-0000", 0),
        C: Assignment("b0001-0000", 1),
    }
    assert log.live() == [("b0001-0000", 0), ("b0001-0000", 1)]
    log.record_ended("b0001-0000", 0, "PREEMPTED", "preempted", [B])
    log.record_controller("60", 12)
    again = SubmissionLog(tmp_path, "another name")
    assert state(again) == state(log)
    assert again.name == "mergelab-1"
    assert [(c["job"], c["known"]) for c in again.controllers()] == [("60", 12)]
    assert again.live() == [("b0001-0000", 1)]


@pytest.mark.parametrize(
    ("happens", "left"),
    [
        (lambda b: b.record_ended("b0001-0000", 0, "PREEMPTED", "preempted", [A, B]), {C}),
        (lambda b: b.record_ended("b0001-0000", 0, "FAILED", "failed", [B]), {A, C}),
        (lambda b: b.record_ended("b0001-0000", 0, "FAILED", "failed", []), {A, B, C}),
        (lambda b: b.record_cancelled("b0001-0000"), set()),
        (lambda b: b.record_rejected("b0001-0000", "no"), set()),
    ],
)
def test_what_is_given_free_is_nobodys(
    tmp_path: Path, happens: Callable[[SubmissionLog], None], left: set
) -> None:
    log = submitted(tmp_path)
    happens(log)
    assert {*log.assignments} == {*SubmissionLog(tmp_path, "").assignments} == left


def test_a_later_batch_keeps_what_an_earlier_one_loses(tmp_path: Path) -> None:
    log = submitted(tmp_path)
    log.record_ended("b0001-0000", 0, "PREEMPTED", "preempted", [A, B])
    second = log.record_intent([[A]], True, {})
    log.record_submitted(second, "58")
    log.record_cancelled("b0001-0000")
    assert log.assignments == SubmissionLog(tmp_path, "").assignments == {A: Assignment("b0002-0000", 0)}
    assert log.submissions[A] == 2


@pytest.mark.parametrize("record", ["record_cancelled", "record_rejected"])
def test_tasks_of_a_batch_that_nobody_wants_find_a_mark(tmp_path: Path, record: str) -> None:
    log = submitted(tmp_path)
    getattr(log, record)("b0001-0000", *(["why"] if record == "record_rejected" else []))
    assert (log.batch_dir("b0001-0000") / "void").exists()
    assert log.live() == []


@pytest.mark.parametrize(
    "torn", ['{"event": "ended", "ba', '{"event": "void", "batch": "b0001-0000"}', "\0\0\0\0"]
)
def test_a_torn_last_line_never_was(tmp_path: Path, torn: str) -> None:
    log = submitted(tmp_path)
    path = tmp_path / submission_log.NAME
    whole = path.read_bytes()
    with path.open("a") as f:
        f.write(torn)
    assert submission_log.read(tmp_path) == [json.loads(x) for x in whole.splitlines()]
    again = SubmissionLog(tmp_path, "")
    assert state(again) == state(log)
    assert path.read_bytes() == whole
    again.record_controller("60", 1)
    assert [c["job"] for c in SubmissionLog(tmp_path, "").controllers()] == ["60"]


def test_damage_before_the_last_line_is_told_and_not_mended(tmp_path: Path) -> None:
    submitted(tmp_path)
    path = tmp_path / submission_log.NAME
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")
    before = path.read_bytes()
    with pytest.raises(InputError, match="line 2 is damaged"):
        SubmissionLog(tmp_path, "")
    assert path.read_bytes() == before


def test_an_intention_without_a_number_is_open(tmp_path: Path) -> None:
    log = submitted(tmp_path)
    batch = log.record_intent([[A]], True, {})
    assert (batch, SubmissionLog(tmp_path, "").unconfirmed()) == ("b0002-0000", ["b0002-0000"])
    log.record_submitted(batch, "58")
    assert log.unconfirmed() == SubmissionLog(tmp_path, "").unconfirmed() == []


def test_jobs_are_named_after_their_sweeps_folder(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert submission_log.job_name(tmp_path) == submission_log.job_name(tmp_path / "other" / "..")
    assert submission_log.job_name(tmp_path) != submission_log.job_name(tmp_path / "other")
