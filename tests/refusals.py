"""What must be refused: with what words, and without a trace."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from conftest import Command, Outcome

import mergelab


def told(out: Outcome) -> list[str]:
    """The errors on stderr, each as one line."""
    assert "Traceback" not in out.err
    first, *errors = out.err.split("✗ ")
    assert first == "", f"stderr begins with {first!r}"
    return [" ".join(e.split()) for e in errors]


def refuse(run: Command, arguments: list[str], tmp_path: Path) -> list[str]:
    """Run a command that must be refused without leaving anything; returns what it said."""
    before = contents(tmp_path, but=tmp_path / "run1")
    out = run(*arguments)
    assert out.status == 2, out.out + out.err
    assert contents(tmp_path, but=out.folder) == before
    assert not [p.name for p in out.folder.rglob("*") if p.name == "model" or p.name.endswith(".partial")]
    if (out.folder / "result.json").exists():
        assert out.result["status"] == "invalid"
    return told(out)


def refused(arguments: Sequence[str], tmp_path: Path) -> list[str]:
    """What a command would refuse these arguments with, by the functions underneath, which touch nothing;
    each as one line."""
    nothing = tmp_path / "nothing"
    before = contents(tmp_path, but=nothing)
    try:
        found = [f.text() for f in mergelab.plan(mergelab.compose(*arguments), nothing).errors]
    except mergelab.InputError as e:
        found = [str(e)]
    assert contents(tmp_path, but=nothing) == before and not nothing.exists()
    return [" ".join(text.split()) for text in found]


def contents(folder: Path, *, but: Path) -> dict[str, str]:
    """A digest of every file, and the names of all folders, under `folder`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path != but and but not in path.parents:
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "not a file"
            found[str(path.relative_to(folder))] = digest
    return found
