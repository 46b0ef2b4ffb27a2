"""What has been submitted, and what of it is still whose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from patience import patience, token  # noqa: F401 (fixtures that every test has)

from mergelab.core.errors import InputError
from mergelab.slurm import submission_log
from mergelab.slurm.submission_log import Assignment, SubmissionLog

A, B, C = ("a", 1), ("b", 1), ("c", 1)


def booked(folder: Path) -> SubmissionLog:
    """Two tasks of a batch that became a job: the first has two items."""
    book = SubmissionLog(folder, "mergelab-1")
    batch = book.record_intent([[A, B], [C]], True, {"a": "0", "b": "1", "c": "2"})
    book.place(batch).mkdir()
    book.submitted(batch, "57")
    return book


def told(book: SubmissionLog) -> Any:
    return (book.name, book.assignments, book.tasks, book.jobs, book.revoked, book.ended, book.times, book.open(),
            book.live(), book.controllers())  # fmt: skip


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    book = booked(tmp_path)
    assert book.assignments == {
        A: Assignment("b0001-0000", 0),
        B: Assignment("b0001-0000", 0),
        C: Assignment("b0001-0000", 1),
    }
    assert book.live() == [("b0001-0000", 0), ("b0001-0000", 1)]
    book.record_ended("b0001-0000", 0, "PREEMPTED", "preempted", [B])
    book.controller("60", 12)
    again = SubmissionLog(tmp_path, "another name")
    assert told(again) == told(book)
    assert again.name == "mergelab-1"
    assert [(c["job"], c["known"]) for c in again.controllers()] == [("60", 12)]
    assert again.live() == [("b0001-0000", 1)]


@pytest.mark.parametrize(
    ("happens", "left"),
    [
        (lambda b: b.record_ended("b0001-0000", 0, "PREEMPTED", "preempted", [A, B]), {C}),
        (lambda b: b.record_ended("b0001-0000", 0, "FAILED", "failed", [B]), {A, C}),
        (lambda b: b.record_ended("b0001-0000", 0, "FAILED", "failed", []), {A, B, C}),
        (lambda b: b.cancelled("b0001-0000"), set()),
        (lambda b: b.record_rejected("b0001-0000", "no"), set()),
    ],
)
def test_what_is_given_free_is_nobodys(
    tmp_path: Path, happens: Callable[[SubmissionLog], None], left: set
) -> None:
    book = booked(tmp_path)
    happens(book)
    assert {*book.assignments} == {*SubmissionLog(tmp_path, "").assignments} == left


def test_a_later_batch_keeps_what_an_earlier_one_loses(tmp_path: Path) -> None:
    book = booked(tmp_path)
    book.record_ended("b0001-0000", 0, "PREEMPTED", "preempted", [A, B])
    second = book.record_intent([[A]], True, {})
    book.submitted(second, "58")
    book.cancelled("b0001-0000")
    assert book.assignments == SubmissionLog(tmp_path, "").assignments == {A: Assignment("b0002-0000", 0)}
    assert book.times[A] == 2


@pytest.mark.parametrize("taken", ["cancelled", "record_rejected"])
def test_tasks_of_a_batch_that_nobody_wants_find_a_mark(tmp_path: Path, taken: str) -> None:
    book = booked(tmp_path)
    getattr(book, taken)("b0001-0000", *(["why"] if taken == "record_rejected" else []))
    assert (book.place("b0001-0000") / "void").exists()
    assert book.live() == []


@pytest.mark.parametrize(
    "torn", ['{"event": "ended", "ba', '{"event": "void", "batch": "b0001-0000"}', "\0\0\0\0"]
)
def test_a_torn_last_line_never_was(tmp_path: Path, torn: str) -> None:
    book = booked(tmp_path)
    path = tmp_path / submission_log.FOLDER / submission_log.NAME
    whole = path.read_bytes()
    with path.open("a") as f:
        f.write(torn)
    assert submission_log.read(tmp_path) == [json.loads(x) for x in whole.splitlines()]
    again = SubmissionLog(tmp_path, "")
    assert told(again) == told(book)
    assert path.read_bytes() == whole
    again.controller("60", 1)
    assert [c["job"] for c in SubmissionLog(tmp_path, "").controllers()] == ["60"]


def test_damage_before_the_last_line_is_told_and_not_mended(tmp_path: Path) -> None:
    booked(tmp_path)
    path = tmp_path / submission_log.FOLDER / submission_log.NAME
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")
    before = path.read_bytes()
    with pytest.raises(InputError, match="line 2 is damaged"):
        SubmissionLog(tmp_path, "")
    assert path.read_bytes() == before


def test_an_intention_without_a_number_is_open(tmp_path: Path) -> None:
    book = booked(tmp_path)
    batch = book.record_intent([[A]], True, {})
    assert (batch, SubmissionLog(tmp_path, "").open()) == ("b0002-0000", ["b0002-0000"])
    book.submitted(batch, "58")
    assert book.open() == SubmissionLog(tmp_path, "").open() == []


def test_jobs_are_named_after_their_sweeps_folder(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert submission_log.job_name(tmp_path) == submission_log.job_name(tmp_path / "other" / "..")
    assert submission_log.job_name(tmp_path) != submission_log.job_name(tmp_path / "other")
