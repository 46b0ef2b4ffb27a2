"""A registry: our own entries, those of installed packages, and those of a user's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergelab.core import registry
from mergelab.core.errors import InputError
from mergelab.core.registry import Registry
from mergelab.schema import Composition

KINDS: dict[str, Registry[int]] = {}


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Registry[int]:
    """A registry with an entry of our own, which looks into tmp_path."""
    monkeypatch.setattr(registry, "_used", None)
    registry.use_config_dir(tmp_path)
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


def test_another_folder_takes_the_place_of_the_one_before(numbers: Registry[int], tmp_path: Path) -> None:
    """A name may mean another thing there, and what has been removed is forgotten."""
    other = tmp_path / "other"
    for folder, value in ((tmp_path, 2), (other, 22)):
        (folder / "numbers").mkdir(parents=True, exist_ok=True)
        (folder / "numbers" / "mine.py").write_text(HEAD + f"KINDS['numbers'].add('two', {value})\n")
    assert numbers.get("two") == 2
    registry.use_config_dir(other)
    assert numbers.get("two") == 22
    (other / "numbers" / "mine.py").unlink()
    assert "two" not in numbers


def test_a_run_executes_the_code_that_it_was_composed_with(numbers: Registry[int], tmp_path: Path) -> None:
    file = tmp_path / "numbers" / "mine.py"
    file.write_text(HEAD + "KINDS['numbers'].add('two', 2)\n")
    registry.use_extensions(Composition(config_dir=str(tmp_path), code=registry.digests(tmp_path)))
    assert numbers.get("two") == 2
    registry.use_extensions(Composition())  # without a folder
    assert "two" in numbers
    file.write_text(HEAD + "KINDS['numbers'].add('two', 22)\n")
    with pytest.raises(InputError, match=r"mine\.py has changed since the run was composed"):
        numbers.get("two")


def test_an_installed_package_adds_an_entry(
    numbers: Registry[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dozens.py").write_text(HEAD + "KINDS['numbers'].add('twelve', 12)\n")
    about = tmp_path / "dozens-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: dozens\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text("[mergelab.numbers]\ntwelve = dozens\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert numbers.get("twelve") == 12
    assert numbers.origin("twelve") == registry.Origin("dozens 1.2", "dozens 1.2")
