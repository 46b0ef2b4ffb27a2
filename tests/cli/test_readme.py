"""The commands of the README and the pages: all compose, those on what is here are planned, some are run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from blocks import blocks, commands, files
from conftest import Command
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, QuotedString

import mergelab
from mergelab.core.run_dir import hydra_value

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TRANSLATED = [page for page in sorted(DOCS.rglob("*.md")) if not page.name.endswith(".ja.md")]
TYPED = DOCS / "guide" / "check-analyze-generate.md"
"""Its commands are run, one after another."""
PAGES = [ROOT / "README.md", *(p for p in TRANSLATED if commands(p) and p != TYPED)]
DONE: list[list[str]] = []
"""Commands that another page has shown already."""
ENGLISH_ONLY = ("reference", "changelog.md", "contributing.md")

RECIPE = """\
merge_method: linear
models:
  - {model: "zoo:math", parameters: {weight: 0.5}}
  - {model: "zoo:code", parameters: {weight: 0.5}}
"""
MOE = """\
base_model: "zoo:base"
experts:
  - {source_model: "zoo:math", positive_prompts: ["1+1="]}
  - {source_model: "zoo:code", positive_prompts: ["rev(ab)"]}
shared_experts:
  - {source_model: "zoo:base", positive_prompts: ["1+1="]}
"""


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def one_run(arguments: list[str]) -> tuple[list[str], Path | None]:
    """The overrides of one run of a command, the first of each sweep, and its --config-dir."""
    texts, folder = [], None
    given = iter(arguments)
    for text in given:
        if text == "--config-dir":
            folder = Path(next(given))
        elif not text.startswith("-") and not text.startswith("hydra"):
            texts.append(text)
    return [first_of(text) for text in texts], folder


def first_of(text: str) -> str:
    override = OverridesParser.create().parse_override(text)
    if not override.is_sweep_override():
        return text
    key = override.get_key_element()
    if isinstance(value := override.value(), IntervalSweep):
        return f"{key}={value.start}"
    if text.startswith("preset=glob("):
        return "preset=qwen32b_stem_focused_physics_math"
    if override.is_choice_sweep():
        first = next(iter(override.sweep_iterator()))
        return f"{key}={first.text if isinstance(first, QuotedString) else hydra_value(first)}"
    raise AssertionError(f"a sweep that this test does not know: {text}")


@pytest.fixture
def work(family: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages take for granted."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "config_moe.yaml").write_text(MOE, encoding="utf-8")
    (tmp_path / "my.txt").write_text("The first document.\n\nThe second one.\n", encoding="utf-8")
    return tmp_path


def absent(run: mergelab.Run) -> bool:
    """Whether a command names models, tasks or a cluster that the tests do not have."""
    paths = [run.check.path, run.evaluate.path, run.generate.path, run.publish.path]
    paths += [e.path for e in run.experts.values() if e.path and not e.path.startswith("zoo:base+zoo:")]
    return (
        run.model.name != "tiny" or any(paths) or run.eval.kind == "tasks" or run.hardware.slurm is not None
    )


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_of_a_page_composes_and_what_is_here_is_planned(page: Path, work: Path) -> None:
    shown = files(page)
    for name, text in shown.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(text, encoding="utf-8")
    for arguments in commands(page):
        if arguments in DONE:
            continue
        overrides, folder = one_run(arguments)
        run = mergelab.compose(*overrides, config_dir=folder)
        if run.job.steps and not absent(run):
            plan = mergelab.plan(run)
            assert [f.text() for f in plan.errors] == [], arguments
        if folder is None:
            DONE.append(arguments)


def test_both_languages_show_the_same_blocks() -> None:
    pairs = [(ROOT / "README.md", ROOT / "README.ja.md")]
    pairs += [
        (p, p.with_suffix(".ja.md")) for p in TRANSLATED if p.relative_to(DOCS).parts[0] not in ENGLISH_ONLY
    ]
    for english, japanese in pairs:
        assert japanese.exists(), f"{named(english)} is not translated"
        for language in ("bash", "python", "yaml"):
            assert blocks(english, language) == blocks(japanese, language), named(japanese)


def test_before_and_after_a_merge(mergelab: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    typed = commands(TYPED)
    assert len(typed) > 9
    printed = {}
    for arguments in typed:
        out = mergelab(*arguments)
        assert out.status == 0, f"{arguments}\n{out.out}\n{out.err}"
        printed[" ".join(arguments)] = out.out
    assert "distance from the base" in printed["job=check"]
    assert "bits per byte" in printed["job=check check.path=models/mine"]
    assert "nutsu" in next(text for line, text in printed.items() if "ぬつ" in line)
    assert sorted(os.listdir("models")) == ["math-lora", "mine"]  # noqa: PTH208


def test_the_readmes_are_short() -> None:
    for name in ("README.md", "README.ja.md"):
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 200, name
