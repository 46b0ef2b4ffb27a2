"""Where unfinished work is found again."""

from __future__ import annotations

import json
from pathlib import Path

from mergelab.core.resume_registry import ResumeRegistry


def test_work_is_found_by_its_key_until_it_is_finished(tmp_path: Path) -> None:
    registry, folder = ResumeRegistry("sweeps", tmp_path), tmp_path / "one"
    assert registry.folder("key") is None
    registry.record("key", folder)
    assert ResumeRegistry("sweeps", tmp_path).folder("key") == folder
    assert ResumeRegistry("merges", tmp_path).folder("key") is None
    registry.forget("key", tmp_path / "another")  # that of a later run of the same key stays
    assert registry.folder("key") == folder
    registry.forget("key", folder)
    assert registry.folder("key") is None


def test_entries_of_folders_that_are_gone_are_removed(tmp_path: Path) -> None:
    registry = ResumeRegistry("merges", tmp_path)
    assert list(registry.entries()) == []
    registry.record("gone", tmp_path / "gone", recipe="a")
    registry.record("there", tmp_path, recipe="b")
    assert list(registry.entries()) == [(tmp_path, {"folder": str(tmp_path), "recipe": "b"})]
    assert [p.stem for p in (tmp_path / "merges").iterdir()] == ["there"]


def test_a_damaged_entry_is_none(tmp_path: Path) -> None:
    (tmp_path / "sweeps").mkdir()
    for content in ("{", "[]", json.dumps({"folder": 3})):
        (tmp_path / "sweeps" / "key.json").write_text(content)
        assert ResumeRegistry("sweeps", tmp_path).folder("key") is None
        assert list(ResumeRegistry("sweeps", tmp_path).entries()) == []
