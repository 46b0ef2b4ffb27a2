"""The hub's cache on this machine, in the layout of its client.

blobs/ has the contents, snapshots/ a folder of links to them for each commit, and refs/ the last known
commit of each branch and tag.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mergelab.core.run_dir import write_text
from mergelab.hub.repository import File, Repository

BRANCH = "main"
"""The default revision."""


def root() -> Path:
    """The folder of the cache, which HF_HOME or HF_HUB_CACHE sets."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve()


def folder(name: str) -> Path:
    """The folder of one repository in the cache."""
    return root() / f"models--{name.replace('/', '--')}"


def lock(name: str) -> Path:
    """The lock file of a command that fetches a repository."""
    return root() / ".locks" / folder(name).name / "mergelab.lock"


def snapshot(of: Repository) -> Path:
    """The folder that has a commit's files by name."""
    return folder(of.name) / "snapshots" / of.commit


def blob(of: Repository, file: File) -> Path:
    """The path of a file's content."""
    return folder(of.name) / "blobs" / file.digest


def partial(of: Repository, file: File) -> Path:
    """The path of a large file's partial download, which the next command resumes."""
    return folder(of.name) / "blobs" / f"{file.digest}.mergelab.incomplete"


def missing(of: Repository, files: Iterable[File]) -> list[File]:
    """The files that are not in the snapshot with the expected size."""
    return [f for f in files if _size(snapshot(of) / f.name) != f.size]


def downloaded(of: Repository, file: File) -> int:
    """The bytes of a missing file that are already downloaded."""
    if _size(blob(of, file)) == file.size:
        return file.size
    size = _size(partial(of, file)) or 0
    return size if size <= file.size else 0


def discard(of: Repository, file: File) -> None:
    """Remove what is in the cache of a file if it does not have the expected size."""
    for path in (snapshot(of) / file.name, blob(of, file)):
        if _size(path) not in (None, file.size):
            path.unlink()


def record_commit(of: Repository, revision: str | None) -> None:
    """Record the commit of a branch or tag, by which the model is found offline."""
    path = folder(of.name) / "refs" / (revision or BRANCH)
    known = path.read_text(encoding="utf-8") if path.is_file() else None
    if of.commit not in (known, revision):  # a shared cache may be read-only
        write_text(path, of.commit)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
