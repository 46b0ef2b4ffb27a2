"""The names of a job's steps, those of 0.1 included."""

from __future__ import annotations

import pytest

import mergelab as lab
from mergelab.jobs import STEPS, steps_of
from mergelab.jobs.step import wrong_steps


@pytest.mark.parametrize(
    ("steps", "now", "notices"),
    [
        (["inspect"], ["check"], ["step 'inspect' is now 'check'"]),
        (["check"], ["check"], []),
        (["preflight", "merge", "check", "report"], ["preflight", "merge", "verify", "report"],
         ["step 'check' is now 'verify'"]),
        (["inspect", "preflight", "merge", "check"], ["check", "preflight", "merge", "verify"],
         ["step 'inspect' is now 'check'", "step 'check' is now 'verify'"]),
        (["preflight", "merge", "verify", "check"], ["preflight", "merge", "verify", "check"], []),
    ],
    ids=" ".join,
)  # fmt: skip
def test_names_of_the_last_version_work_with_a_notice(
    steps: list[str], now: list[str], notices: list[str]
) -> None:
    run = lab.compose("eval=none", "experts=math_code", f"job.steps=[{','.join(steps)}]")
    assert run.job.steps == steps  # and so its hash is as it was
    assert [s.name for s in steps_of(run)] == now and wrong_steps(steps) is None
    found = [f for f in lab.plan(run).warnings if f.code == "renamed"]
    assert [f.message.partition(";")[0] for f in found] == notices


def test_what_a_step_needs_is_there() -> None:
    for name in STEPS.names():
        needed = STEPS.get(name).needs
        assert needed is None or needed in STEPS, name
