"""The generated reference pages: what they hold, and that the table of findings is complete."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from mergelab.core.finding_codes import CODES
from mergelab.core.findings import MAY_PASS
from mergelab.jobs.step import STEPS
from mergelab.models.compatibility import KINDS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "hooks"))
import reference  # noqa: E402

MODULES = [f for f in sorted((ROOT / "mergelab").rglob("*.py")) if f.name != "finding_codes.py"]
FACTORIES = {"error": 0, "warning": 0, "note": 0, "Finding": 1}
"""What makes a finding, and which of its arguments is the code."""


def codes_and_texts() -> tuple[dict[str, str], set[str]]:
    """The codes given as literals, each with a module, and all string literals."""
    codes: dict[str, str] = {}
    texts: set[str] = set()
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FACTORIES:
                at = FACTORIES[node.func.id]
                if len(node.args) > at + 1 and isinstance(code := node.args[at], ast.Constant):
                    codes[str(code.value)] = file.name
    return codes, texts


def test_every_code_of_a_finding_has_its_row_and_every_row_its_use() -> None:
    codes, texts = codes_and_texts()
    assert {code: file for code, file in codes.items() if code not in CODES} == {}
    assert {code for code in CODES if code not in texts} == set()
    assert set(MAY_PASS) | {code for code, _ in KINDS} <= set(CODES)


@pytest.mark.parametrize("part", reference.PARTS)
def test_a_part_is_generated_without_empty_rows(part: str) -> None:
    text = reference.PARTS[part]()
    assert text.count("|") > 20 or part == "python"
    assert "<!--" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) <= 4, "a cell that breaks its row"


def test_a_page_is_filled_and_an_unknown_part_is_refused() -> None:
    assert "`rope`" in reference.filled("# Findings\n\n<!-- generated: findings -->\n")
    assert reference.filled("nothing to do") == "nothing to do"
    with pytest.raises(KeyError):
        reference.filled("<!-- generated: weather -->")


def test_the_pages_follow_the_sources(tmp_path: Path) -> None:
    method = tmp_path / "conf" / "method"
    method.mkdir(parents=True)
    (method / "mine.yaml").write_text(
        "# Mine: half of each.\n#\n#   theta = a / 2\nname: mine\n", encoding="utf-8"
    )
    (method / "_shared.yaml").write_text("# Not an option.\n", encoding="utf-8")
    text = reference.methods(tmp_path)
    assert "| [`mine`](#mine) | Mine: half of each. |" in text
    assert "theta = a / 2" in text and "shared" not in text


def test_every_key_of_a_run_is_on_the_page_with_its_default() -> None:
    text = reference.config()
    assert "| `hardware.memory` | text | `1GB` |" in text
    assert "| `experts.ROLE.density` | number, list or mapping | `null` |" in text
    assert "| `search.budget` | whole number | `100` |" in text
    assert "## Slurm" in text and "`hardware.slurm.partition`" in text


def test_the_python_page_has_every_function() -> None:
    text = reference.python()
    for name in ("compose", "plan", "run", "merge", "evaluate", "search"):
        assert f"## {name}\n" in text


def test_the_jobs_page_has_every_step_with_what_it_needs() -> None:
    text = reference.jobs()
    for name in STEPS.names():
        assert f"| `{name}` | " in text, name
    row = next(line for line in text.splitlines() if line.startswith("| `verify` |"))
    assert "| `merge` | `check` |" in row


@pytest.mark.parametrize("page", ["architecture.md", "architecture.ja.md"])
def test_the_files_that_the_architecture_names_exist(page: str) -> None:
    text = (ROOT / "docs" / "explain" / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_/]+(?:\.py|/))`", text))
    assert len(named) > 20
    assert {n for n in named if not (ROOT / n).exists() and not (ROOT / "mergelab" / n).exists()} == set()
