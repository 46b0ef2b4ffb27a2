"""Where the runs of a command were begun, so that the same command resumes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mergelab.core import hashing
from mergelab.core.resume_registry import ResumeRegistry
from mergelab.scheduling import submission_log
from mergelab.scheduling.scheduler import Scheduler
from mergelab.schema import Run, identity_of

KIND = "clusters"


def find_or_record_folder(runs: Sequence[Run], scheduler: Scheduler, new: Path, named: bool) -> Path:
    """The folder of these runs: the one that was named, else that of the same command whose runs have not
    been collected yet, else the new one.

    Args:
        runs: as they are composed.
        scheduler: to which they are submitted.
        new: the folder that Hydra would use.
        named: whether the user named it.
    """
    registry, key = ResumeRegistry(KIND), _key(runs)
    earlier = registry.folder(key)
    if not named and earlier and (scheduler.jobs_dir(earlier) / submission_log.NAME).exists():
        return earlier
    registry.record(key, new.resolve())
    return new.resolve()


def forget_collected(runs: Sequence[Run]) -> None:
    """All results have been shown: the same command starts anew."""
    ResumeRegistry(KIND).forget(_key(runs))


def settings_digest(run: Run) -> str:
    """Of the settings by which a run on a cluster is recognised: all but whether the command waits for it."""
    return hashing.digest(_settings(run))


def _settings(run: Run) -> dict[str, object]:
    return identity_of(replace(run, hardware=replace(run.hardware, detach=False)))


def _key(runs: Sequence[Run]) -> str:
    return hashing.digest([[_settings(r) for r in runs], str(Path.cwd())])[:32]
