"""The README's lines on what is done before and after a merge, typed one after another."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
from conftest import Command

README = Path(__file__).parents[2] / "README.md"


def lines(heading: str) -> list[str]:
    """The commands of a section."""
    text = README.read_text(encoding="utf-8")
    section = re.split(r"^## ", text.partition(f"\n## {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines() if line]


def test_before_and_after_a_merge(mergelab: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    typed = lines("Before and after a merge")
    assert len(typed) > 10
    told = {}
    for line in typed:
        command, *arguments = shlex.split(line.removeprefix("python -m "))
        assert command == "mergelab"
        out = mergelab(*arguments)
        assert out.status == 0, f"{line}\n{out.out}\n{out.err}"
        told[line] = out.out
    assert "distance from the base" in told["python -m mergelab job=check"]
    assert "bits per byte" in told["python -m mergelab job=check check.path=models/mine"]
    assert "nutsu" in next(text for line, text in told.items() if "ぬつ" in line)
    assert sorted(os.listdir("models")) == ["math-lora", "mine"]  # noqa: PTH208
