"""The folder of a search: the one that was named, or the one where the same search was begun."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergelab.core import hashing
from mergelab.core.errors import InputError
from mergelab.core.resume_registry import ResumeRegistry
from mergelab.core.run_dir import short_path
from mergelab.optimization import journal
from mergelab.optimization.fingerprint import differences
from mergelab.optimization.journal import Journal
from mergelab.optimization.request import Request, Setup


def find(request: Request, identity: Mapping[str, Any]) -> Path:
    """The folder to work in, which exists afterwards.

    Raises:
        InputError: where the named folder holds another search, or a run.
    """
    key = hashing.digest([identity, str(Path.cwd())])[:32]
    registry = ResumeRegistry("sweeps")
    folder, earlier = request.folder.resolve(), registry.folder(key)
    if not request.folder_named and earlier and (earlier / journal.NAME).exists():
        folder = earlier
    folder.mkdir(parents=True, exist_ok=True)
    if lines := journal.read(folder / journal.NAME):  # another process may be writing it
        changed = differences(lines[0]["identity"], identity)
        if changed:
            shown = "\n".join(changed[:8]) + (f"\nand {len(changed) - 8} more" if len(changed) > 8 else "")
            raise InputError(
                f"{short_path(folder)} holds another sweep\n{shown}\n"
                "Set it back to resume that one, or start a new one elsewhere: hydra.sweep.dir=DIR"
            )
    elif (folder / "result.json").exists():
        raise InputError(
            f"{short_path(folder)} holds a run, not a sweep\nChoose another folder: hydra.sweep.dir=DIR"
        )
    registry.record(key, folder)
    return folder


def open_journal(folder: Path, setup: Setup, identity: Mapping[str, Any], command: str) -> Journal:
    """The journal of the folder, with its first line."""
    opened = Journal(folder)
    if opened.begin is None:
        s = setup.run.search
        opened.append(
            "begin",
            schema=journal.SCHEMA,
            id=hashing.digest(identity)[:16],
            command=command,
            search={"name": s.name, "optimizer": s.optimizer, "population": setup.population,
                    "space": {g.key: g.text for g in setup.genes}},
            identity=identity,
        )  # fmt: skip
    return opened
