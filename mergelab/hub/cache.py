"""The hub's cache on this machine, laid out as its client lays it out: contents in blobs/, one folder of
links to them for each commit in snapshots/, and in refs/ the commit that a branch or tag last came to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mergelab.core.run_dir import write_text
from mergelab.hub.repository import File, Repository

BRANCH = "main"
"""What a revision that is not named means."""


def root() -> Path:
    """The folder of the cache; HF_HOME or HF_HUB_CACHE place it."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve()


def folder(name: str) -> Path:
    """The folder of one repository in it."""
    return root() / f"models--{name.replace('/', '--')}"


def lock(name: str) -> Path:
    """A file that is locked by the command which fetches a repository."""
    return root() / ".locks" / folder(name).name / "mergelab.lock"


def snapshot(of: Repository) -> Path:
    """The folder in which a repository's files appear by their names."""
    return folder(of.name) / "snapshots" / of.commit


def blob(of: Repository, file: File) -> Path:
    """Where the content of a file lies."""
    return folder(of.name) / "blobs" / file.digest


def begun(of: Repository, file: File) -> Path:
    """Where a download of a large file is begun, and found again by the next command."""
    return folder(of.name) / "blobs" / f"{file.digest}.mergelab.incomplete"


def missing(of: Repository, files: Iterable[File]) -> list[File]:
    """The files that are not in the snapshot with the size that they should have."""
    return [f for f in files if _size(snapshot(of) / f.name) != f.size]


def there(of: Repository, file: File) -> int:
    """Bytes of a missing file that need not be downloaded any more."""
    if _size(blob(of, file)) == file.size:
        return file.size
    have = _size(begun(of, file)) or 0
    return have if have <= file.size else 0


def discard(of: Repository, file: File) -> None:
    """Take away what is there of a file where it has not the size that it should have."""
    for path in (snapshot(of) / file.name, blob(of, file)):
        if _size(path) not in (None, file.size):
            path.unlink()


def note(of: Repository, revision: str | None) -> None:
    """Remember which commit a branch or tag has come to: by it the model is found offline."""
    path = folder(of.name) / "refs" / (revision or BRANCH)
    known = path.read_text(encoding="utf-8") if path.is_file() else None
    if of.commit not in (known, revision):  # a shared cache may be there to be read only
        write_text(path, of.commit)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
