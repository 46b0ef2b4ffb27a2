"""What the schema declares of its fields, and the walker that checks a run against it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest
from composing import composed

from mergelab.core.findings import Finding
from mergelab.preflight import value_checks
from mergelab.schema import Hardware, Run, Skill, Slurm, validation
from mergelab.schema.fields import Choices, Form, Limits, NoEffect, limited, setting, setting_of
from mergelab.schema.reference import Entry, entries
from mergelab.schema.run import settings_of
from mergelab.schema.validation import Value, check, check_section, values

WHOLE = Run(hardware=Hardware(slurm=Slurm()))
"""A run with every section."""


def declared() -> Iterator[tuple[Value, Any]]:
    """Every value of the schema by default with each of its rules, those of sections by name included."""
    run = replace(WHOLE, model=replace(WHOLE.model, skills={"math": Skill(validation="m")}))
    for v in values(run):
        for rule in setting_of(v.field).rules:
            yield v, rule


RULES = list(declared())


def outside(limits: Limits) -> list[float]:
    """A value beyond each end of an interval, and those that are no number in it."""
    found = [math.nan]
    if not limits.infinite:
        found.append(math.inf)
    if limits.at_least is not None:
        found.append(limits.at_least - 1)
    if limits.above is not None:
        found.append(limits.above)
    if limits.at_most is not None:
        found.append(limits.at_most + 1)
    if limits.below is not None:
        found.append(limits.below)
    return found


def on(v: Value, value: Any) -> list[Finding]:
    """What the walker finds where a field has another value."""
    return list(validation.check_value(replace(v, value=value)))


def test_every_number_has_limits() -> None:
    def numeric(e: Entry) -> bool:
        return e.type.removesuffix(" or null") in ("whole number", "number", "mapping to numbers")

    assert [e.key for e in entries() if numeric(e) and not e.values] == []


def test_the_defaults_are_right() -> None:
    assert list(check(WHOLE, [])) == []


@pytest.mark.parametrize(("v", "rule"), RULES, ids=lambda x: x.key if isinstance(x, Value) else "")
def test_what_a_rule_excludes_is_refused_with_key_and_value(v: Value, rule: Any) -> None:
    wrong: list[Any] = [True, "text", *outside(rule)] if isinstance(rule, Limits) else ["nothing of it"]
    if isinstance(rule, Form) and rule.text == "a text that is not empty":
        wrong = [" "]
    elif isinstance(rule, Form) and "regular" in rule.text:
        wrong = ["[a"]
    elif isinstance(rule, Form) and "branch" in rule.text:
        wrong = ["ab" * 20]
    elif isinstance(rule, Form) and "prompts" in rule.text:
        wrong = [0.0, -1.0, 2.5, math.nan, math.inf]
    for value in wrong:
        given = (
            {"one": value} if isinstance(v.value, dict) else [value] if isinstance(v.value, list) else value
        )
        (found,) = on(v, given)
        assert found.severity == "error" and found.code == rule.code
        assert found.place == (f"{v.key}.one" if isinstance(v.value, dict) else v.key)
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        assert shown in found.message or not shown.strip(), found.message
    assert not v.optional or on(v, None) == []


@pytest.mark.parametrize(("v", "rule"), RULES, ids=lambda x: x.key if isinstance(x, Value) else "")
def test_what_a_rule_includes_is_right(v: Value, rule: Any) -> None:
    right: list[Any] = []
    if isinstance(rule, Limits):
        right = [bound for bound in (rule.at_least, rule.at_most) if bound is not None]
    elif isinstance(rule, Choices):
        right = list(rule.names)
    if not isinstance(v.value, (dict, list)):
        assert [f for value in right for f in on(v, value)] == []


def test_an_infinite_number_of_hours_is_right() -> None:
    assert composed("monitor.hours=inf").monitor.hours == math.inf
    assert list(check(composed("monitor.hours=inf"), [])) == []


# ---------------------------------------------------------------- what has no effect


@pytest.mark.parametrize(
    ("arguments", "code", "place", "condition"),
    [
        (["hardware.detach=true"], "no-effect", "hardware.detach", "without a cluster"),
        (["tracking.sync=true"], "no-effect", "tracking.sync", "without a cluster"),
        (["hardware=slurm", "hardware.workers=2"], "no-effect", "hardware.workers", "candidates_per_task"),
        (["method=ties", "method.path=x"], "no-effect", "method.path", "unless method=mergekit"),
        (["method=moe", "method.path=x"], "no-effect", "method.path", "with method=moe"),
        (["method=moe", "hardware.engine=fast"], "unused", "hardware.engine", "with method=moe"),
        (["method=moe", "experts.math.weight=1"], "unused", "experts.math.weight=1", "with method=moe"),
        (["method=moe", "method.parameters.gate_mode=random", "experts.math.prompts=[a]"], "unused",
         "experts.math.prompts=[a]", "with a random gate"),
        (["method=mergekit", "method.path=x", "experts.math.weight=1"], "no-effect",
         "experts.math.weight=1", "whose file decides it"),
        (["method=mergekit", "method.path=x", "hardware.dtype=float16"], "no-effect",
         "hardware.dtype=float16", "whose file decides it"),
        (["job=generate", "generate.top_p=0.5"], "setting", "generate.top_p", "generate.temperature=0"),
    ],
)  # fmt: skip
def test_a_setting_without_effect_is_refused(
    arguments: list[str], code: str, place: str, condition: str
) -> None:
    (found,) = check(composed(*arguments), arguments)
    assert (found.severity, found.code, found.place) == ("error", code, place)
    assert condition in found.message


@pytest.mark.parametrize(
    "arguments",
    [
        ["method=moe"],
        ["method=mergekit", "method.path=x"],
        ["job=generate", "generate.temperature=1", "generate.top_p=0.5"],
        ["job=generate"],
        ["hardware=slurm", "hardware.detach=true", "tracking.sync=true", "hardware.candidates_per_task=2",
         "hardware.workers=2"],
    ],
)  # fmt: skip
def test_what_was_not_typed_or_has_an_effect_passes(arguments: list[str]) -> None:
    assert list(check(composed(*arguments), arguments)) == []


# ---------------------------------------------------------------- settings of others


@dataclass
class Mine:
    """Settings of a step that somebody wrote."""

    level: int = limited(3, at_least=1, at_most=9)
    """How high."""
    quick: bool = setting(False, no_effect=[NoEffect("on a CPU", lambda run: run.hardware.device == "cpu")])


@dataclass
class MyRun(Run):
    """A run with a section for that step."""

    mine: Mine = field(default_factory=Mine)


def test_settings_of_a_step_of_ones_own_are_checked_like_ours() -> None:
    run = MyRun(mine=Mine(level=10, quick=True))
    assert [(f.place, f.message) for f in check(run, [])] == [
        ("mine.level", "10 is out of range; 1 to 9"),
        ("mine.quick", "it has no effect on a CPU"),
    ]
    assert list(check(run, [], unread=["mine"])) == []
    assert [f.place for f in check_section(Mine(level=0), "mine")] == ["mine.level"]


# ---------------------------------------------------------------- the reference


def test_the_reference_has_every_key_of_a_run() -> None:
    def keys(node: Any, at: str = "") -> Iterator[str]:
        for name, value in node.items():
            yield f"{at}{name}"
            if isinstance(value, dict):
                yield from keys(value, f"{at}{name}.")

    listed = {e.key for e in entries()}
    assert {k for k in keys(settings_of(WHOLE)) if not k.startswith("search.space.")} <= listed


def test_an_entry_of_the_reference_says_all_that_is_known() -> None:
    by_key = {e.key: e for e in entries()}
    assert by_key["hardware.candidates_per_task"] == Entry(
        key="hardware.candidates_per_task", type="whole number", default="1", values="at least 1",
        meaning="Candidates of a search that one Slurm task measures one after another, so that the experts "
        "are read once for all of them. (slurm)",
        no_effect=("without a cluster",),
    )  # fmt: skip
    assert by_key["experts.NAME.weight"].default == "1.0"
    assert by_key["search.controller_job.time"].default == "24:00:00"
    assert by_key["hardware.slurm"].type == "section or null"
    assert {e.type for e in entries()} <= {
        f"{t}{null}" for null in ("", " or null") for t in (
            "section", "whole number", "number", "text", "true or false", "any", "list of texts",
            "mapping to numbers", "mapping to texts", "mapping to anything", "mapping to lists of texts",
        )
    }  # fmt: skip


def test_all_sections_are_walked() -> None:
    assert {f.name for f in fields(Run)} - {"composition"} == {v.key.partition(".")[0] for v in values(WHOLE)}


def test_settings_of_a_step_that_does_not_run_are_refused_once() -> None:
    for arguments in (["generate.top_p=7"], ["job=generate", "fetch.workers=0"]):
        (found,) = value_checks.check(composed(*arguments), arguments, "error")
        assert (found.code, found.place) == ("unused", arguments[-1].partition("=")[0])
