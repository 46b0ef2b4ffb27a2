"""A model's folder, put into a repository of the hub as one commit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.core.errors import InputError, StepError
from mergelab.hub import client
from mergelab.hub.repository import TEMPLATES
from mergelab.models.checkpoint import TOKENIZER_FILES

Progress = Callable[[str, int, int], None]
"""Called with what is done, bytes so far, and bytes in all."""

OWN = ("config.json", "generation_config.json", *TOKENIZER_FILES)
WEIGHTS = (".safetensors", ".safetensors.index.json")
"""What a model is made of, by name and by end: where the folder has it not, the repository must not
have it either, or another model would be loaded from there."""

TIMEOUT = 10.0
"""Seconds that the hub may take to say what is there, and who asks."""

AGAIN = "The same command goes on: what has arrived is not sent again."
LOGIN = "Log in with a token that may write: hf auth login, or set HF_TOKEN."


@dataclass(frozen=True)
class Item:
    """A file that goes."""

    name: str
    """In the repository."""
    path: Path
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Target:
    """The repository as it is before."""

    repo: str
    branch: str | None
    """Null: main."""
    there: bool | None = False
    """None where it could not be asked."""
    has_branch: bool = False
    private: bool = False
    head: str | None = None
    """The commit to which ours is added."""
    files: tuple[str, ...] = ()
    """What that commit has."""


def items(folder: Path) -> list[Item]:
    """What goes of a folder: all of it but hidden files and locks."""

    def goes(path: Path) -> bool:
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        return path.is_file() and not hidden and path.suffix != ".lock"

    found = sorted(p for p in folder.rglob("*") if goes(p))
    return [Item(p.relative_to(folder).as_posix(), p, p.stat().st_size) for p in found]


def stale(going: Sequence[Item], target: Target) -> list[str]:
    """Files of another model in the repository, which would be loaded together with this one's."""
    kept = {i.name for i in going}

    def own(name: str) -> bool:
        top = "/" not in name and (name in OWN or name.endswith(WEIGHTS))
        return top or name.startswith(TEMPLATES)

    return [n for n in target.files if own(n) and n not in kept]


def look(repo: str, branch: str | None) -> Target:
    """Ask for the repository as this login sees it. Raises what the hub's client raises, but for what
    is not there."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    def info(revision: str | None) -> Any:
        return HfApi().model_info(repo, revision=revision, timeout=TIMEOUT)

    try:
        main = found = info(None)
    except RepositoryNotFoundError:
        return Target(repo, branch)
    try:
        found = info(branch) if branch else main
        has_branch = True
    except RevisionNotFoundError:
        has_branch = False  # it will begin where main is
    files = tuple(s.rfilename for s in found.siblings or [])
    return Target(repo, branch, True, has_branch, bool(main.private), str(found.sha), files)


def check_login(target: Target) -> None:
    """See that there is a token, that the hub knows it, and that it is not known to be of no use.

    Raises:
        InputError: where it is not so, or where the hub cannot be asked.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise InputError(f"publish.repo: there is no login to the hub\n{LOGIN}")
    try:
        who = client.within(TIMEOUT, HfApi().whoami)
    except Exception as e:
        if not client.is_traffic(e):
            raise
        if client.status(e) == 401:
            raise InputError(f"publish.repo: the hub does not know this login\n{LOGIN}") from e
        raise InputError(f"publish.repo: {client.line(e)}") from e
    name, token = who.get("name"), (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise InputError(f"publish.repo: the token of {name} may only read\n{LOGIN}")
    owners = [str(name), *(str(o.get("name")) for o in who.get("orgs", []))]
    owner = target.repo.partition("/")[0]
    if not target.there and owner not in owners:
        message = f"publish.repo: {name} cannot make {target.repo}, which is not there"
        raise InputError(f"{message}\nOwners that this login has: {', '.join(owners)}")


def upload(going: Sequence[Item], target: Target, *, private: bool, message: str, progress: Progress) -> str:
    """Make what is not there of repository and branch, send the files, and commit them all at once.

    What the hub has already is not sent again. Files of another model are removed by the same commit.

    Args:
        private: of a repository that is made.
        message: of the commit.
    Returns:
        the commit, which is the one before where nothing has changed.
    Raises:
        StepError: when the hub refuses, or the network fails.
    """
    try:
        with client.quiet():
            return _upload(going, target, private, message, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; nothing was committed to {target.repo}\n{AGAIN}") from None
    except Exception as e:
        if not client.is_traffic(e):
            raise
        status = client.status(e)
        if status in (401, 403):
            raise StepError(
                f"{target.repo}: this login may not write there: {client.line(e)}\n{LOGIN}"
            ) from e
        raise StepError(f"{target.repo}: {client.line(e)}\n{AGAIN}") from e


def _upload(going: Sequence[Item], target: Target, private: bool, message: str, progress: Progress) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    repo, branch = target.repo, target.branch
    if not target.there:
        api.create_repo(repo, private=private, exist_ok=True)
    if branch and not target.has_branch:
        api.create_branch(repo, branch=branch, exist_ok=True)
    total, done = sum(i.size for i in going), 0
    operations: list[Any] = []
    for item in going:  # one by one, so that it can be told how far it is
        progress("upload", done, total)
        addition = CommitOperationAdd(path_in_repo=item.name, path_or_fileobj=str(item.path))
        api.preupload_lfs_files(repo, [addition], revision=branch, free_memory=False)
        operations.append(addition)
        done += item.size
    progress("upload", done, total)
    operations += [CommitOperationDelete(path_in_repo=name) for name in stale(going, target)]
    return str(api.create_commit(repo, operations, commit_message=message, revision=branch).oid)
