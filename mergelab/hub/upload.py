"""Upload of a model folder to a repository on the hub, as one commit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.core.errors import InputError, Interrupted, StepError
from mergelab.core.model_folder import CONFIGS, MODULES
from mergelab.hub import client
from mergelab.models import tokenizers

Progress = Callable[[str, int, int], None]
"""Called with the activity, the bytes so far, and the total."""

OWN = (*CONFIGS, MODULES, "chat_template.json")
ENDS = (".safetensors", ".safetensors.index.json", "processor_config.json")
"""A model's files besides its tokenizer's, by name and by suffix. A repository must not keep any that the
folder lacks, because parts of another model would then be loaded."""

TIMEOUT = 10.0
"""Seconds that the hub may take to answer."""

AGAIN = "Run the same command again: what has arrived is not sent again."
LOGIN = "Log in with a token that has write access: hf auth login, or set HF_TOKEN."


@dataclass(frozen=True)
class Item:
    """A file to upload."""

    name: str
    """Its path in the repository."""
    path: Path
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Target:
    """The repository before the upload."""

    repo: str
    branch: str | None
    """None: main."""
    exists: bool | None = False
    """None if the hub did not answer."""
    has_branch: bool = False
    private: bool = False
    head: str | None = None
    """The parent of the new commit."""
    files: tuple[str, ...] = ()
    """The files of that commit."""


def items(folder: Path) -> list[Item]:
    """The files of a folder to upload: all except hidden files and locks."""

    def selected(path: Path) -> bool:
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        return path.is_file() and not hidden and path.suffix != ".lock"

    found = sorted(p for p in folder.rglob("*") if selected(p))
    return [Item(p.relative_to(folder).as_posix(), p, p.stat().st_size) for p in found]


def stale(uploads: Sequence[Item], target: Target) -> list[str]:
    """Files of another model in the repository that would be loaded together with this one's."""
    kept = {i.name for i in uploads}

    def own(name: str) -> bool:
        return bool(tokenizers.FILES.fullmatch(name)) or (
            "/" not in name and (name in OWN or name.endswith(ENDS))
        )

    return [n for n in target.files if own(n) and n not in kept]


def look(repo: str, branch: str | None) -> Target:
    """Ask the hub for the repository as this login sees it.

    A missing repository or branch is a result. Other exceptions of the hub's client pass through.
    """
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
        has_branch = False  # it will start at main
    files = tuple(s.rfilename for s in found.siblings or [])
    return Target(repo, branch, True, has_branch, bool(main.private), str(found.sha), files)


def check_login(target: Target) -> None:
    """Check that there is a token, that the hub accepts it, and that it may write to the repository.

    Raises:
        InputError: One of these does not hold, or the hub cannot be asked.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise InputError(f"publish.repo: you are not logged in to the hub\n{LOGIN}")
    try:
        who = client.within(TIMEOUT, HfApi().whoami)
    except Exception as e:
        if not client.is_external(e):
            raise
        if client.status(e) == 401:
            raise InputError(f"publish.repo: the hub rejects this login\n{LOGIN}") from e
        raise InputError(f"publish.repo: {client.line(e)}") from e
    name, token = who.get("name"), (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise InputError(f"publish.repo: the token of {name} is read-only\n{LOGIN}")
    owners = [str(name), *(str(o.get("name")) for o in who.get("orgs", []))]
    owner = target.repo.partition("/")[0]
    if not target.exists and owner not in owners:
        message = f"publish.repo: {target.repo} does not exist, and {name} cannot create it"
        raise InputError(f"{message}\nThis login may create repositories of: {', '.join(owners)}")


def upload(
    uploads: Sequence[Item], target: Target, *, private: bool, message: str, progress: Progress
) -> str:
    """Create the repository and the branch if needed, send the files, and commit them all at once.

    What the hub already has is not sent again. Files of another model are removed by the same commit.

    Args:
        uploads: The files.
        target: The repository before the upload.
        private: Whether a new repository is private.
        message: The commit message.
        progress: Called with the bytes sent.

    Returns:
        The commit; the previous one if nothing has changed.

    Raises:
        StepError: The hub refuses, or the network fails.
    """
    try:
        with client.quiet():
            return _upload(uploads, target, private, message, progress)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; nothing was committed to {target.repo}\n{AGAIN}") from None
    except Exception as e:
        if not client.is_external(e):
            raise
        status = client.status(e)
        if status in (401, 403):
            raise StepError(
                f"{target.repo}: this login has no write access: {client.line(e)}\n{LOGIN}"
            ) from e
        raise StepError(f"{target.repo}: {client.line(e)}\n{AGAIN}") from e


def _upload(uploads: Sequence[Item], target: Target, private: bool, message: str, progress: Progress) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    repo, branch = target.repo, target.branch
    if not target.exists:
        api.create_repo(repo, private=private, exist_ok=True)
    if branch and not target.has_branch:
        api.create_branch(repo, branch=branch, exist_ok=True)
    total, done = sum(i.size for i in uploads), 0
    operations: list[Any] = []
    for item in uploads:  # one by one, so that progress can be reported
        progress("upload", done, total)
        addition = CommitOperationAdd(path_in_repo=item.name, path_or_fileobj=str(item.path))
        api.preupload_lfs_files(repo, [addition], revision=branch, free_memory=False)
        operations.append(addition)
        done += item.size
    progress("upload", done, total)
    operations += [CommitOperationDelete(path_in_repo=name) for name in stale(uploads, target)]
    return str(api.create_commit(repo, operations, commit_message=message, revision=branch).oid)
