"""What an evolution is made of: its space, its optimizer, its journal, its loop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from composing import composed
from searching import MEASURES, Pretended, cut_off, evolved, genomes, scores, setup_of, smooth

from mergelab.errors import InputError, StepError
from mergelab.optimization import controller, grammar, optimizer, space
from mergelab.optimization.bench import Outcome
from mergelab.optimization.controller import TooManyFailures, front
from mergelab.optimization.journal import Journal, differences, read
from mergelab.optimization.settle import fidelity, verdict
from mergelab.optimization.workers import Order
from mergelab.preflight import methods

# ---------------------------------------------------------------- space


def keys(method: str, ranges: dict[str, Any], *overrides: str) -> list[str]:
    run = composed(f"method={method}", "experts=math_code", *overrides)
    return [g.key for g in space.genes(ranges, run, methods.takes(methods.declarations()[method]))]


def test_a_star_is_every_expert_and_leaves_out_what_the_method_does_not_take() -> None:
    ranges = {"experts.*.weight": "interval(0,1)", "experts.*.density": "interval(0.1,1)"}
    both = ["experts.math.weight", "experts.code.weight"]
    assert keys("dare_ties", ranges) == [*both, "experts.math.density", "experts.code.density"]
    assert keys("task_arithmetic", ranges) == both


def test_braces_are_every_part() -> None:
    found = keys("ties", {"experts.*.weight.{self_attn,mlp}.{0,1}": "interval(0,1)"})
    assert found[:4] == [f"experts.math.weight.{p}.{i}" for p in ("self_attn", "mlp") for i in (0, 1)]
    assert len(found) == 8


def test_a_named_key_that_the_method_does_not_take_is_an_error() -> None:
    with pytest.raises(InputError, match=r"search\.space\.experts\.math\.density: method=linear takes no"):
        keys("linear", {"experts.math.density": "interval(0,1)"})


@pytest.mark.parametrize(
    ("key", "value", "applied"),
    [
        ("weight", 0.3, 0.3),
        ("weight.0", 0.3, [0.3]),
        ("weight.mlp", 0.3, {"mlp": 0.3, "*": 0.5}),
        ("weight.mlp.1", 0.3, {"mlp": [0.5, 0.3], "*": 0.5}),
    ],
)
def test_parts_of_a_setting_become_gradients_and_filters(key: str, value: float, applied: Any) -> None:
    run = composed("experts=math_code", "experts.math.weight=0.5")
    changed = space.apply(run, {f"experts.math.{key}": value})
    assert changed.experts["math"].weight == applied
    assert run.experts["math"].weight == 0.5


def test_a_genome_as_arguments_composes_to_the_same_run() -> None:
    run = composed("experts=math_code", "experts.code.density=[0.3,0.7]")
    genome = {"experts.math.weight.mlp.0": 0.25, "experts.math.weight.mlp.1": 0.75,
              "experts.code.density.1": 0.9, "method.parameters.lambda": 1.2}  # fmt: skip
    changed = space.apply(run, genome)
    typed = space.overrides(changed, genome)
    again = composed("experts=math_code", *typed)
    assert (again.experts, again.method.parameters) == (changed.experts, changed.method.parameters)


def test_a_search_starts_where_the_composed_run_is_and_says_where_it_cannot() -> None:
    run = composed("experts=math_code", "experts.math.weight=[0.2,0.6]", "experts.code.weight=1.7")
    gene = grammar.read("experts.math.weight", "interval(0,1)")
    assert space.start(run, gene) == pytest.approx(0.4)
    outside = grammar.read("experts.code.weight", "interval(0,1)")
    with pytest.raises(InputError, match=r"the search starts at 1\.7, outside of interval\(0,1\)"):
        space.start(run, outside)
    with pytest.raises(InputError, match=r"there is no key 'sience'.*There are math, code"):
        space.start(run, grammar.read("experts.sience.weight", "interval(0,1)"))


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("interval(1,0)", "the lower end comes first"),
        ("tag(log, interval(0,1))", "has to begin above 0"),
        ("0.5", "is no range"),
        ("interval(0", "is no range"),
        ({"lower": 0}, "needs the numbers lower and upper"),
        ({"lower": 0, "upper": 1, "step": 2}, "no 'step'"),
    ],
)
def test_what_is_no_range_is_refused(text: Any, wrong: str) -> None:
    with pytest.raises(InputError, match=r"search\.space\.k: ") as e:
        grammar.read("k", text)
    assert wrong in str(e.value)


def test_values_are_rounded_inside_of_their_range() -> None:
    gene = grammar.read("k", "interval(0.0, 1.0)")
    assert [gene.rounded(v, 0.01) for v in (0.123, 0.999, 1.2)] == [0.12, 1.0, 1.0]
    assert grammar.read("k", "int(interval(1, 5))").rounded(2.6, 0.01) == 3
    assert grammar.read("k", "tag(log, interval(1e-6, 1.0))").rounded(0.000123456, 0.01) == 0.0001235
    assert grammar.read("k", "choice(a, b)").rounded("b", 0.01) == "b"


# ---------------------------------------------------------------- optimizer


@pytest.mark.parametrize("name", ["CMA", "DiagonalCMA", "TwoPointsDE", "RandomSearch", "PSO", "OnePlusOne"])
def test_the_same_answers_give_the_same_genomes(name: str) -> None:
    setup = setup_of(optimizer=name)

    def asked() -> list[Any]:
        made = optimizer.Optimizer(setup.run.search, setup.genes, setup.starts, 4)
        out = []
        for _ in range(4):
            population = made.ask()
            out += population
            made.tell([[sum(g.values())] for g in population])
        return out

    assert asked() == asked()


def test_cma_starts_around_the_preset_and_steps_by_sigma() -> None:
    setup = setup_of()
    made = optimizer.Optimizer(setup.run.search, setup.genes, setup.starts, 400)
    population = made.ask()
    key = "experts.math.weight"
    values = [g[key] for g in population]
    assert abs(sum(values) / 400 - setup.starts[key]) < 0.05
    spread = (sum((v - setup.starts[key]) ** 2 for v in values) / 400) ** 0.5
    assert spread == pytest.approx(0.2 * 1.5, rel=0.25)  # sigma of the range


def test_one_dimension_is_enough() -> None:
    run = composed("search=cma_lambda", "experts=math_code")
    gene = grammar.read("method.parameters.lambda", "interval(0.2, 2)")
    made = optimizer.Optimizer(run.search, [gene], {gene.key: 1.0}, 8)
    for _ in range(12):
        population = made.ask()
        made.tell([[-((g[gene.key] - 1.5) ** 2)] for g in population])
    assert population[0][gene.key] == pytest.approx(1.5, abs=0.1)


def test_cma_climbs_in_a_space_of_more_dimensions() -> None:
    setup = setup_of()
    made = optimizer.Optimizer(setup.run.search, setup.genes, setup.starts, 10)

    def value(g: Any) -> float:
        return -sum((v - 0.7) ** 2 for v in g.values())

    best = []
    for _ in range(15):
        population = made.ask()
        made.tell([[value(g)] for g in population])
        best.append(max(map(value, population)))
    assert best[-1] > best[0] / 4


def test_an_unknown_optimizer_is_refused_with_a_near_one() -> None:
    with pytest.raises(InputError, match=r"no 'TwoPointDE'.*TwoPointsDE"):
        optimizer.check(setup_of(optimizer="TwoPointDE").run.search)


# ---------------------------------------------------------------- journal


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("begin", schema=1)
    journal.write("candidate", number=0)
    whole = journal.path.read_bytes()
    for torn in (b'{"event": "candi', b'{"event": "candidate", "number": 1}', b"\n", b"\x00\xff"):
        journal.path.write_bytes(whole + torn)
        assert len(read(journal.path)) == 2
        assert len(Journal(tmp_path).lines) == 2
        assert journal.path.read_bytes() == whole


def test_damage_in_the_middle_is_told_with_its_line_and_nothing_is_lost(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for i in range(3):
        journal.write("begin" if not i else "candidate", schema=1, number=i)
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
    assert [line["generation"] for line in journal.of("candidate")] == [0] * 4 + [1] * 4 + [2] * 4
    assert len(journal.of("preset")) == 1
    again = Pretended()
    before = journal.path.read_bytes()
    evolved(tmp_path, setup, again)
    assert (again.asked, journal.path.read_bytes()) == ([], before)


@pytest.mark.parametrize("last_first", [False, True])
def test_cut_off_anywhere_it_ends_with_the_same_bytes(tmp_path: Path, last_first: bool) -> None:
    setup = setup_of()
    whole = evolved(tmp_path / "whole", setup, Pretended()).path.read_bytes()
    for cut in range(1, 13):
        folder = tmp_path / f"cut{cut}{last_first}"
        with pytest.raises(KeyboardInterrupt):
            evolved(folder, setup, Pretended(cut_off(cut), last_first))
        rest = Pretended(last_first=last_first)
        journal = evolved(folder, setup, rest)
        assert journal.path.read_bytes() == whole
        assert len(rest.asked) == 13 - cut  # and nothing that was finished is done again
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
    with pytest.raises(InputError, match="candidate 0 there is not the one that CMA asks for"):
        evolved(tmp_path, setup_of(seed=1), Pretended())


def test_what_fails_once_is_tried_again_and_what_fails_twice_is_told(tmp_path: Path) -> None:
    tries: dict[int, int] = {}

    def answer(order: Order) -> Any:
        tries[order.number] = tries.get(order.number, 0) + 1
        if order.number == 2 and tries[2] == 1:
            return "its process died"
        return "out of memory" if order.number == 5 else smooth(order.run)

    journal = evolved(tmp_path, setup_of(), Pretended(answer))
    lines = {line["number"]: line for line in journal.of("candidate")}
    assert (tries[2], lines[2]["status"]) == (2, "done")
    assert (tries[5], lines[5]["status"], lines[5]["reason"]) == (2, "failed", "out of memory")
    assert lines[5]["fitness"] is None


def test_too_many_failures_end_it_with_the_reasons_and_it_can_go_on(tmp_path: Path) -> None:
    def answer(order: Order) -> Any:
        return "out of memory" if order.number in (4, 5, 6) else smooth(order.run)

    with pytest.raises(TooManyFailures) as e:
        evolved(tmp_path, setup_of(), Pretended(answer))
    assert "generation 1: 3 of 4 candidates failed, more than search.max_failure_rate=0.5" in str(e.value)
    assert "3 times: out of memory" in str(e.value)
    assert "raise search.max_failure_rate" in str(e.value)
    rest = Pretended()
    journal = evolved(tmp_path, setup_of(max_failure_rate=0.75), rest)
    assert rest.numbers == [8, 9, 10, 11]
    assert len(journal.of("candidate")) == 12


def test_a_preset_that_cannot_be_measured_ends_it(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="the composed run itself cannot be measured: no room"):
        evolved(tmp_path, setup_of(), Pretended(lambda order: "no room"))


def test_equal_genomes_are_measured_once(tmp_path: Path) -> None:
    workers = Pretended()
    setup = setup_of(resolution=0.5, space={"experts.math.weight": "interval(0.0, 1.5)"})
    journal = evolved(tmp_path, setup, workers)
    lines = journal.of("candidate")
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
    journal.write("begin", schema=1)
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
    lines = journal.of("candidate")
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
    assert [x["number"] for x in front(lines, ["math", "code"])] == [0, 1, 2, 4]


def test_several_objectives_are_told_to_the_optimizer(tmp_path: Path) -> None:
    setup = setup_of(objectives=["math", "code"], optimizer="TwoPointsDE")

    def answer(order: Order) -> Any:
        weight = order.run.experts["math"].weight
        assert isinstance(weight, float)
        return scores(weight, 1 - weight)

    journal = evolved(tmp_path, setup, Pretended(answer))
    assert len(front(journal.of("candidate"), ["math", "code"])) > 1


def test_fitness_is_weighted_by_share() -> None:
    from dataclasses import replace

    heavy = [replace(MEASURES[0], share=3.0), MEASURES[1]]
    assert controller.fitness(scores(1.0, 0.0), heavy) == pytest.approx(0.75)


# ---------------------------------------------------------------- plain words


def table(winner: float, preset: float, parent: float) -> dict[str, Any]:
    rows: Sequence[tuple[str, float]] = (("winner", winner), ("preset", preset), ("math", parent))
    return {name: {"validation": scores(value, value)} for name, value in rows}


@pytest.mark.parametrize(
    ("winner", "preset", "parent", "said"),
    [
        (0.9, 0.7, 0.5, "more than noise. It beats every parent."),
        (0.705, 0.7, 0.5, "it may be noise"),
        (0.6, 0.7, 0.5, "take the preset"),
        (0.9, 0.7, 0.95, "more than noise. Not better than math."),
    ],
)
def test_the_verdict_says_whether_the_gain_is_noise(
    winner: float, preset: float, parent: float, said: str
) -> None:
    text, gain = verdict(table(winner, preset, parent), {}, moved=True, same=False)
    assert said in text
    assert gain is not None
    assert gain["value"] == pytest.approx(winner - preset)
    assert gain["stderr"] == pytest.approx(0.01)
    assert "too good" in verdict(table(winner, preset, parent), {}, moved=True, same=True)[0]


def test_an_outcome_that_is_no_number_is_a_failure() -> None:
    from mergelab.optimization.bench import attempt, finite

    outcome = attempt(lambda: finite(scores(float("nan"), 0.5)), None)
    assert outcome == Outcome(reason="math is nan: the model gives no usable numbers")


def test_a_candidate_has_a_time_limit() -> None:
    import time

    from mergelab.optimization.bench import attempt

    start = time.monotonic()
    outcome = attempt(lambda: time.sleep(30), 0.2)  # type: ignore[arg-type,return-value]
    assert outcome.reason == "out of time, 0.2 s"
    assert time.monotonic() - start < 20
