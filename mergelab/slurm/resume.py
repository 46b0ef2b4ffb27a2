"""Where the runs of a command were begun, so that the same command goes on there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mergelab.core import hashing
from mergelab.core.cache_dir import home
from mergelab.core.run_dir import read_memo, write_json
from mergelab.schema import Run, identity_of
from mergelab.slurm.submission_log import FOLDER, NAME


def place(runs: Sequence[Run], folder: Path, chosen: bool) -> Path:
    """The folder of these runs: the one that was named, else that of the same command whose runs nobody
    has collected yet, else the new one.

    Args:
        runs: as they are composed.
        folder: that Hydra would use.
        chosen: whether it was named.
    """
    memo = _memo(runs)
    earlier = read_memo(memo).get("folder")
    if not chosen and earlier and (Path(earlier) / FOLDER / NAME).exists():
        return Path(earlier)
    write_json(memo, {"folder": str(folder.resolve())})
    return folder.resolve()


def collected(runs: Sequence[Run]) -> None:
    """All have been told to the user: the same command again is a new one."""
    _memo(runs).unlink(missing_ok=True)


def _memo(runs: Sequence[Run]) -> Path:
    same = [identity_of(replace(r, hardware=replace(r.hardware, detach=False))) for r in runs]
    return home() / "clusters" / f"{hashing.digest([same, str(Path.cwd())])[:32]}.json"
