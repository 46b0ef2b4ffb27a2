"""Whole named experiments: each composes, is sound for its own family, and runs with the tiny one."""

from __future__ import annotations

import csv

import pytest
from composing import composed
from conftest import Command

from mergelab.core.conf_dir import CONF

PRESETS = sorted(p.stem for p in (CONF / "preset").glob("*.yaml"))


def test_the_names_that_people_know() -> None:
    assert {p.removeprefix("qwen32b_") for p in PRESETS} >= {
        "general_purpose_balanced", "stem_focused_physics_math", "high_accuracy_ensemble",
        "progressive_density_merge", "experimental_multi_merge",
    }  # fmt: skip


def test_they_are_what_their_names_say() -> None:
    run = {p.removeprefix("qwen32b_"): composed(f"preset={p}") for p in PRESETS}
    assert len({e.weight for e in run["general_purpose_balanced"].experts.values()}) == 1
    assert set(run["stem_focused_physics_math"].experts) == {"math", "physics"}
    assert all(e.density >= 0.9 for e in run["high_accuracy_ensemble"].experts.values())
    for e in run["progressive_density_merge"].experts.values():
        assert e.density == sorted(e.density) and e.density[0] < e.density[-1]
    assert len(run["experimental_multi_merge"].experts) > len(run["general_purpose_balanced"].experts)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_sound_for_the_family_it_is_named_after(preset: str, mergelab: Command) -> None:
    assert composed(f"preset={preset}").model.name == "qwen32b"
    out = mergelab(f"preset={preset}", "job=plan")
    assert out.status == 0, out.err
    assert "read" in out.out and "merge_method" in out.out


def test_what_is_typed_comes_before_the_preset() -> None:
    preset = "preset=qwen32b_stem_focused_physics_math"
    run = composed(preset, "model=tiny", "method=ties", "experts.math.weight=0.1")
    assert (run.model.name, run.method.name, run.experts["math"].weight) == ("tiny", "ties", 0.1)


def test_all_of_them_at_once_on_the_tiny_family(mergelab: Command) -> None:
    out = mergelab("-m", "preset=glob(qwen32b_*)", "model=tiny", "eval.limit=16", "eval.baselines=false")
    assert out.status == 0, out.err
    rows = list(csv.reader((out.folder / "comparison.csv").open(encoding="utf-8")))
    assert rows[0][:2] == ["run", "preset"]
    assert sorted(r[1] for r in rows[1:]) == PRESETS
    assert "best on" in out.out
    assert len(list(out.folder.glob("*/model/model.safetensors"))) == len(PRESETS)


def test_a_misspelt_preset(mergelab: Command) -> None:
    out = mergelab("preset=qwen32b_high_acuracy_ensemble")
    assert out.status == 2 and "Did you mean 'qwen32b_high_accuracy_ensemble'?" in out.err
