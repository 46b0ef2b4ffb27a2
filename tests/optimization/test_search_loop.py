"""The loop of an evolution and its journal, with workers that answer as a test wants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from searching import MEASURES, Pretended, cut_off, evolved, genomes, scores, setup_of, smooth

from mergelab.core.errors import InputError, StepError
from mergelab.optimization import controller, population_evaluator
from mergelab.optimization.controller import TooManyFailures
from mergelab.optimization.executors.base import EvaluationRequest
from mergelab.optimization.finalize import on_front
from mergelab.optimization.fingerprint import differences
from mergelab.optimization.journal import Journal, read
from mergelab.optimization.search_result import fidelity

# ---------------------------------------------------------------- journal


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("begin", schema=1)
    journal.append("candidate", number=0)
    whole = journal.path.read_bytes()
    for torn in (b'{"event": "candi', b'{"event": "candidate", "number": 1}', b"\n", b"\x00\xff"):
        journal.path.write_bytes(whole + torn)
        assert len(read(journal.path)) == 2
        assert len(Journal(tmp_path).lines) == 2
        assert journal.path.read_bytes() == whole


def test_damage_in_the_middle_is_told_with_its_line_and_nothing_is_lost(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for i in range(3):
        journal.append("begin" if not i else "candidate", schema=1, number=i)
    lines = journal.path.read_bytes().splitlines(keepends=True)
    damaged = lines[0] + b"garbage\n" + lines[2]
    journal.path.write_bytes(damaged)
    with pytest.raises(InputError, match="line 2 is damaged"):
        Journal(tmp_path)
    assert journal.path.read_bytes() == damaged


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"event": "other"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="not a journal of this version"):
        Journal(tmp_path)


def test_differences_name_the_key_and_both_values() -> None:
    found = differences({"a": {"b": 1, "c": [1, 2]}, "d": 0}, {"a": {"b": 2, "c": [1, 2]}})
    assert found == ["a.b: 1 then, 2 now", "d: 0 then, absent now"]


# ---------------------------------------------------------------- the loop


def test_whole_generations_are_measured_in_order_and_never_again(tmp_path: Path) -> None:
    setup = setup_of(budget=14)
    workers = Pretended()
    journal = evolved(tmp_path, setup, workers)
    assert (setup.generations, setup.budget) == (3, 12)
    assert workers.numbers == list(range(12))
    assert [line["generation"] for line in journal.select("candidate")] == [0] * 4 + [1] * 4 + [2] * 4
    assert len(journal.select("preset")) == 1
    again = Pretended()
    before = journal.path.read_bytes()
    evolved(tmp_path, setup, again)
    assert (again.asked, journal.path.read_bytes()) == ([], before)


@pytest.mark.parametrize("last_first", [False, True])
def test_cut_off_anywhere_it_ends_with_the_same_bytes(tmp_path: Path, last_first: bool) -> None:
    setup = setup_of("experts=math_code", "method=task_arithmetic", budget=6, population=3)
    whole = evolved(tmp_path / "whole", setup, Pretended()).path.read_bytes()
    for cut in range(1, 7):
        folder = tmp_path / f"cut{cut}{last_first}"
        with pytest.raises(KeyboardInterrupt):
            evolved(folder, setup, Pretended(cut_off(cut), last_first))
        rest = Pretended(last_first=last_first)
        journal = evolved(folder, setup, rest)
        assert journal.path.read_bytes() == whole
        assert len(rest.asked) == 7 - cut  # and nothing that was finished is done again
        assert sorted(p.name for p in folder.iterdir()) == ["journal.jsonl"]


def test_a_raised_budget_goes_on(tmp_path: Path) -> None:
    evolved(tmp_path, setup_of(budget=8), Pretended())
    more = Pretended()
    journal = evolved(tmp_path, setup_of(budget=16), more)
    assert more.numbers == list(range(8, 16))
    whole = evolved(tmp_path / "whole", setup_of(budget=16), Pretended())
    assert genomes(journal) == genomes(whole)


def test_a_journal_of_other_genomes_is_refused(tmp_path: Path) -> None:
    evolved(tmp_path, setup_of(), Pretended())
    with pytest.raises(InputError, match="candidate 0 in it is not the one that CMA asks for"):
        evolved(tmp_path, setup_of(seed=1), Pretended())


def test_what_fails_once_is_tried_again_and_what_fails_twice_is_told(tmp_path: Path) -> None:
    tries: dict[int, int] = {}

    def answer(order: EvaluationRequest) -> Any:
        tries[order.number] = tries.get(order.number, 0) + 1
        if order.number == 2 and tries[2] == 1:
            return "its process died"
        return "out of memory" if order.number == 5 else smooth(order.run)

    journal = evolved(tmp_path, setup_of(), Pretended(answer))
    lines = {line["number"]: line for line in journal.select("candidate")}
    assert (tries[2], lines[2]["status"]) == (2, "done")
    assert (tries[5], lines[5]["status"], lines[5]["reason"]) == (2, "failed", "out of memory")
    assert lines[5]["fitness"] is None


def test_too_many_failures_end_it_with_the_reasons_and_it_can_go_on(tmp_path: Path) -> None:
    def answer(order: EvaluationRequest) -> Any:
        return "out of memory" if order.number in (4, 5, 6) else smooth(order.run)

    with pytest.raises(TooManyFailures) as e:
        evolved(tmp_path, setup_of(), Pretended(answer))
    assert "generation 1: 3 of 4 candidates failed, more than search.max_failure_rate=0.5" in str(e.value)
    assert "3 times: out of memory" in str(e.value)
    assert "raise search.max_failure_rate" in str(e.value)
    rest = Pretended()
    journal = evolved(tmp_path, setup_of(max_failure_rate=0.75), rest)
    assert rest.numbers == [8, 9, 10, 11]
    assert len(journal.select("candidate")) == 12


def test_a_preset_that_cannot_be_measured_ends_it(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="the composed run itself cannot be measured: no room"):
        evolved(tmp_path, setup_of(), Pretended(lambda order: "no room"))


def test_equal_genomes_are_measured_once(tmp_path: Path) -> None:
    workers = Pretended()
    setup = setup_of(resolution=0.5, space={"experts.math.weight": "interval(0.0, 1.5)"})
    journal = evolved(tmp_path, setup, workers)
    lines = journal.select("candidate")
    repeated = [line for line in lines if line["status"] == "repeated"]
    assert repeated
    by_number = {line["number"]: line for line in lines}
    for line in repeated:
        assert line["genome"] == by_number[line["of"]]["genome"]
        assert line["fitness"] == by_number[line["of"]]["fitness"]
    assert len(workers.numbers) == len(lines) - len(repeated)
    assert len({json.dumps(o) for o in genomes(journal)}) == len(workers.numbers)


def test_a_generation_that_has_not_come_to_an_end_is_not_told(tmp_path: Path) -> None:
    heard = []
    setup = setup_of()
    journal = Journal(tmp_path)
    journal.append("begin", schema=1)
    controller.evolve(setup, journal, Pretended(), lambda event, line: heard.append(event))
    assert heard == ["preset", *(["candidate"] * 4 + ["generation"]) * 3]


# ---------------------------------------------------------------- few prompts first


def test_only_the_promising_are_measured_on_all_prompts(tmp_path: Path) -> None:
    from mergelab.schema import Fidelity

    setup = setup_of(fidelity=Fidelity(share=0.25, promote=0.5))
    workers = Pretended()
    journal = evolved(tmp_path, setup, workers)
    few = [o for o in workers.asked if o.share < 1]
    full = [o for o in workers.asked if o.share == 1 and o.number >= 0]
    assert (len(few), len(full)) == (12, 6)
    lines = journal.select("candidate")
    for generation in range(3):
        mine = [x for x in lines if x["generation"] == generation]
        passed = [x["screen"] for x in mine if x["status"] == "done"]
        rest = [x["screen"] for x in mine if x["status"] == "screened"]
        assert len(passed) == len(rest) == 2
        assert min(passed) >= max(rest)
    told = fidelity(setup, lines)
    assert told["cost"] == pytest.approx(0.25 + 0.5)
    assert told["agreement"] == pytest.approx(1.0)
    whole = journal.path.read_bytes()
    for cut in (2, 5, 7, 14):
        folder = tmp_path / f"cut{cut}"
        with pytest.raises(KeyboardInterrupt):
            evolved(folder, setup, Pretended(cut_off(cut)))
        assert evolved(folder, setup, Pretended()).path.read_bytes() == whole


# ---------------------------------------------------------------- several objectives


def test_the_pareto_front_is_what_nothing_beats(tmp_path: Path) -> None:
    points = [(0.1, 0.9), (0.5, 0.5), (0.9, 0.1), (0.4, 0.4), (0.5, 0.5), (0.9, 0.0)]
    lines = [{"number": i, "scores": scores(*p)} for i, p in enumerate(points)]
    assert [x["number"] for x in on_front(lines, ["math", "code"])] == [0, 1, 2, 4]


def test_several_objectives_are_told_to_the_optimizer(tmp_path: Path) -> None:
    setup = setup_of(objectives=["math", "code"], optimizer="TwoPointsDE")

    def answer(order: EvaluationRequest) -> Any:
        weight = order.run.experts["math"].weight
        assert isinstance(weight, float)
        return scores(weight, 1 - weight)

    journal = evolved(tmp_path, setup, Pretended(answer))
    assert len(on_front(journal.select("candidate"), ["math", "code"])) > 1


def test_fitness_is_weighted_by_share() -> None:
    from dataclasses import replace

    heavy = [replace(MEASURES[0], share=3.0), MEASURES[1]]
    assert population_evaluator.fitness(scores(1.0, 0.0), heavy) == pytest.approx(0.75)
