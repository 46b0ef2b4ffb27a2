"""A registry: our own entries, those of installed packages, and those of a user's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergelab.core import registry
from mergelab.core.errors import InputError
from mergelab.core.registry import Registry

KINDS: dict[str, Registry[int]] = {}


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Registry[int]:
    """A registry with an entry of our own, which looks into tmp_path."""
    monkeypatch.setattr(registry, "_config_dirs", [])
    registry.add_config_dir(tmp_path)
    (tmp_path / "numbers").mkdir()
    KINDS["numbers"] = Registry("numbers", "number")
    KINDS["numbers"].add("one", 1)
    return KINDS["numbers"]


HEAD = "import sys\nKINDS = sys.modules['test_registry'].KINDS\n"


def test_a_file_in_the_users_folder_adds_an_entry(numbers: Registry[int], tmp_path: Path) -> None:
    (tmp_path / "numbers" / "mine.py").write_text(HEAD + "KINDS['numbers'].add('two', 2)\n")
    assert numbers.names() == ["one", "two"]
    assert numbers.get("two") == 2
    assert numbers.origin("two").label.endswith("mine.py") and numbers.origin("two").digest
    assert numbers.origin("one").digest == ""


def test_a_changed_file_is_read_again(numbers: Registry[int], tmp_path: Path) -> None:
    file = tmp_path / "numbers" / "mine.py"
    file.write_text(HEAD + "KINDS['numbers'].add('two', 2)\n")
    before = numbers.origin("two").digest
    file.write_text(HEAD + "KINDS['numbers'].add('two', 22)\n")
    assert numbers.get("two") == 22
    assert numbers.origin("two").digest != before


def test_a_name_is_taken_once(numbers: Registry[int], tmp_path: Path) -> None:
    (tmp_path / "numbers" / "mine.py").write_text(HEAD + "KINDS['numbers'].add('one', 3)\n")
    with pytest.raises(InputError, match=r"mine\.py: there is a number 'one' already, in mergelab"):
        numbers.names()


def test_a_file_that_fails_is_named_with_its_line(numbers: Registry[int], tmp_path: Path) -> None:
    (tmp_path / "numbers" / "mine.py").write_text("x = 1\nx.y\n")
    with pytest.raises(InputError, match=r"mine\.py, line 2: AttributeError: 'int'"):
        numbers.names()


def test_an_unknown_name_is_answered_with_the_known_ones(numbers: Registry[int]) -> None:
    with pytest.raises(LookupError, match=r"'onne' is not a number\. Did you mean 'one'\? There are one\."):
        numbers.get("onne")
