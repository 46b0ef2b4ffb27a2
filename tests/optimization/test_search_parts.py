"""What an evolution is made of: its space, its optimizer, its words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from composing import composed
from searching import scores, setup_of

from mergelab import search_history
from mergelab.core.errors import InputError
from mergelab.methods import registry
from mergelab.optimization import optimizer, search_space, space_grammar
from mergelab.optimization.candidate_evaluator import Outcome
from mergelab.optimization.verdict import verdict

# ---------------------------------------------------------------- space


def keys(method: str, ranges: dict[str, Any], *overrides: str) -> list[str]:
    run = composed(f"method={method}", "experts=math_code", *overrides)
    return [g.key for g in search_space.genes(ranges, run, registry.get(method).used)]


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
    with pytest.raises(InputError, match=r"search\.space\.experts\.math\.density: method=linear does not"):
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
    changed = search_space.apply(run, {f"experts.math.{key}": value})
    assert changed.experts["math"].weight == applied
    assert run.experts["math"].weight == 0.5


def test_a_genome_as_arguments_composes_to_the_same_run() -> None:
    run = composed("experts=math_code", "experts.code.density=[0.3,0.7]")
    genome = {"experts.math.weight.mlp.0": 0.25, "experts.math.weight.mlp.1": 0.75,
              "experts.code.density.1": 0.9, "method.parameters.lambda": 1.2}  # fmt: skip
    changed = search_space.apply(run, genome)
    typed = search_space.overrides(changed, genome)
    again = composed("experts=math_code", *typed)
    assert (again.experts, again.method.parameters) == (changed.experts, changed.method.parameters)


def test_a_search_starts_where_the_composed_run_is_and_says_where_it_cannot() -> None:
    run = composed("experts=math_code", "experts.math.weight=[0.2,0.6]", "experts.code.weight=1.7")
    gene = space_grammar.read("experts.math.weight", "interval(0,1)")
    assert search_space.start(run, gene) == pytest.approx(0.4)
    outside = space_grammar.read("experts.code.weight", "interval(0,1)")
    with pytest.raises(InputError, match=r"the search starts at 1\.7, outside interval\(0,1\)"):
        search_space.start(run, outside)
    with pytest.raises(InputError, match=r"there is no key 'sience'.*There are math, code"):
        search_space.start(run, space_grammar.read("experts.sience.weight", "interval(0,1)"))


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("interval(1,0)", "the lower bound comes first"),
        ("tag(log, interval(0,1))", "its lower bound has to be above 0"),
        ("0.5", "is not a range"),
        ("interval(0", "is not a range"),
        ({"lower": 0}, "needs the numbers lower and upper"),
        ({"lower": 0, "upper": 1, "step": 2}, "no 'step'"),
    ],
)
def test_what_is_no_range_is_refused(text: Any, wrong: str) -> None:
    with pytest.raises(InputError, match=r"search\.space\.k: ") as e:
        space_grammar.read("k", text)
    assert wrong in str(e.value)


def test_values_are_rounded_inside_of_their_range() -> None:
    gene = space_grammar.read("k", "interval(0.0, 1.0)")
    assert [gene.rounded(v, 0.01) for v in (0.123, 0.999, 1.2)] == [0.12, 1.0, 1.0]
    assert space_grammar.read("k", "int(interval(1, 5))").rounded(2.6, 0.01) == 3
    assert space_grammar.read("k", "tag(log, interval(1e-6, 1.0))").rounded(0.000123456, 0.01) == 0.0001235
    assert space_grammar.read("k", "choice(a, b)").rounded("b", 0.01) == "b"


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


@pytest.mark.parametrize("name", ["LHSSearch", "ScrHammersleySearch"])
def test_an_optimizer_that_depends_on_the_budget_gets_whole_populations(name: str) -> None:
    def asked(budget: int) -> list[Any]:
        setup = setup_of(optimizer=name, budget=budget)
        return optimizer.Optimizer(setup.run.search, setup.genes, setup.starts, 4).ask()

    assert asked(16) == asked(19) != asked(24)


def test_cma_starts_around_the_preset_and_steps_by_sigma() -> None:
    setup = setup_of()
    made = optimizer.Optimizer(setup.run.search, setup.genes, setup.starts, 200)
    population = made.ask()
    key = "experts.math.weight"
    values = [g[key] for g in population]
    assert abs(sum(values) / 200 - setup.starts[key]) < 0.05
    spread = (sum((v - setup.starts[key]) ** 2 for v in values) / 200) ** 0.5
    assert spread == pytest.approx(0.2 * 1.5, rel=0.25)  # sigma of the range


def test_one_dimension_is_enough() -> None:
    run = composed("search=cma_lambda", "experts=math_code")
    gene = space_grammar.read("method.parameters.lambda", "interval(0.2, 2)")
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


# ---------------------------------------------------------------- plain words


def table(winner: float, preset: float, parent: float) -> dict[str, Any]:
    rows: Sequence[tuple[str, float]] = (("winner", winner), ("preset", preset), ("math", parent))
    return {name: {"validation": scores(value, value)} for name, value in rows}


@pytest.mark.parametrize(
    ("winner", "preset", "parent", "said"),
    [
        (0.9, 0.7, 0.5, "more than noise. It beats every parent."),
        (0.705, 0.7, 0.5, "it may be noise"),
        (0.6, 0.7, 0.5, "use the initial point"),
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
    from mergelab.optimization.candidate_evaluator import finite, run_guarded

    outcome = run_guarded(lambda: finite(scores(float("nan"), 0.5)), None)
    assert outcome == Outcome(reason="math is nan: the model gives no usable numbers")


def test_a_candidate_has_a_time_limit() -> None:
    import time

    from mergelab.optimization.candidate_evaluator import run_guarded

    outcome = run_guarded(lambda: time.sleep(30), 0.2)  # type: ignore[arg-type,return-value]
    assert outcome == Outcome(reason="out of time, 0.2 s")


# ---------------------------------------------------------------- history


def test_statistics_of_generations() -> None:
    outcomes = [
        (0, 0.4, "done"),
        (0, None, "failed"),
        (1, 0.2, "done"),
        (1, 0.4, "repeated"),
        (2, None, "failed"),
    ]
    assert search_history.generations(outcomes) == [
        search_history.Generation(0, 0.4, 0.4, 0.4, failed=1, repeated=0),
        search_history.Generation(1, 0.4, pytest.approx(0.3), 0.4, failed=0, repeated=1),  # type: ignore[arg-type]
        search_history.Generation(2, None, None, 0.4, failed=1, repeated=0),
    ]


def test_rank_correlation() -> None:
    assert search_history.rank_correlation([1, 2, 3], [0.1, 0.2, 9]) == pytest.approx(1)
    assert search_history.rank_correlation([1, 1, 1], [0.1, 0.2, 9]) is None


# ---------------------------------------------------------------- which search it is


def test_a_search_of_an_earlier_version_has_the_same_identity(
    family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from mergelab.core import hashing
    from mergelab.optimization import fingerprint

    monkeypatch.setattr(fingerprint, "version", lambda package: "1")
    monkeypatch.setattr(fingerprint, "__version__", "1")
    source = SimpleNamespace(name="base", commit="c0ffee", folder=None)
    plan = SimpleNamespace(sources=[source])
    identity = fingerprint.identify(setup_of("eval.limit=8"), plan)  # type: ignore[arg-type]
    assert hashing.digest(identity) == "73b25cfa4409694abea3479cf5f6be66888e11f5fb2827847326a0d6a2b154df"
