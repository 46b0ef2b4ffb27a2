"""Folders that appear under their final name once all of them is on the disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mergelab.core.errors import StepError


def sync(partial: Path) -> None:
    """See that all of a folder is on the disk, which takes a while."""
    for path in (*partial.rglob("*"), partial):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def free_name(folder: Path, kind: str) -> Path:
    """A name beside a folder that nothing has yet: `model.kind`, else `model.kind2`."""
    place, n = folder.with_name(f"{folder.name}.{kind}"), 1
    while place.exists():
        n += 1
        place = folder.with_name(f"{folder.name}.{kind}{n}")
    return place


def move(partial: Path, final: Path) -> None:
    """Give a folder its final name, on whatever disk that is.

    Raises:
        StepError: when something has appeared there since preflight looked, or may not be replaced.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        if partial.stat().st_dev != final.parent.stat().st_dev:
            aside = final.with_name(f".{final.name}.partial")
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(partial, aside)
            sync(aside)
            shutil.rmtree(partial)
            partial = aside
        partial.rename(final)  # an empty folder may be there
    except OSError as e:
        raise StepError(f"cannot put the model at {final}: {e.strerror}") from e
