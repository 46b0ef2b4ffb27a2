"""publish: put a finished model, once it has passed its check, into a repository of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergelab import context
from mergelab.core.errors import InputError, StepError
from mergelab.core.findings import Finding, error
from mergelab.core.run_dir import RunDir, find_model, finished_model, read_memo
from mergelab.core.sizes import format_size
from mergelab.hub import client
from mergelab.hub.upload import Item, Target, check_login, items, look, stale, upload
from mergelab.jobs import Step, register
from mergelab.report import terminal
from mergelab.schema import Run

CARD = "README.md"
SHOWN = ("library_name", "license", "base_model", "tags", "language")
"""Keys of a card's front matter that are shown."""


def findings(run: Run) -> Iterator[Finding]:
    """What is wrong with the settings, and with what they name."""
    yield from _repo_problems(run.publish.repo)
    if run.publish.path is None:
        yield error(
            "setting", "publish.path", "it is not set; name a model's folder, or that of the run that made it"
        )
        return
    try:
        folder = find_model(run.publish.path)
    except LookupError as e:
        yield error("setting", "publish.path", str(e.args[0]))
        return
    yield from _run_problems(Path(run.publish.path).expanduser(), folder)
    yield from _card_problems(folder / CARD)


def _repo_problems(repo: str | None) -> Iterator[Finding]:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is public

    key = "publish.repo"
    if repo is None:
        yield error("setting", key, "it is not set; say where it goes, as owner/name")
    elif repo.count("/") != 1:
        yield error("setting", key, f"'{repo}' is not written as owner/name")
    else:
        try:
            validate_repo_id(repo)
        except HFValidationError as e:
            yield error("setting", key, str(e))


def _run_problems(named: Path, folder: Path) -> Iterator[Finding]:
    """A run that has not finished is not what its model was meant to be."""
    if named.resolve() == folder:
        return
    made = read_memo(named / "result.json")
    if made.get("status", "done") != "done":
        failed = made.get("error") or {}
        where = f" at {failed['step']}" if failed.get("step") else ""
        message = f"{named} holds a run that is {made['status']}{where}; finish it, or name {folder} itself"
        yield error("setting", "publish.path", message)


def _card_problems(path: Path) -> Iterator[Finding]:
    if not path.is_file():
        message = f"{path.parent} has no card, {CARD}; write what it was made from, how, and its licence"
        yield error("setting", "publish.path", message)
        return
    try:
        _card(path)
    except ValueError as e:
        reason = " ".join(str(e).split())
        yield error("setting", "publish.path", f"the front matter of {path} cannot be read: {reason}")


def _card(path: Path) -> dict[str, Any]:
    """The front matter of a model card. Raises ValueError where it is not sound."""
    import yaml
    from huggingface_hub import ModelCard

    try:
        with client.quiet():
            return dict(ModelCard.load(path).data.to_dict())
    except yaml.YAMLError as e:
        raise ValueError(str(e)) from e


def execute(run: Run, run_dir: RunDir) -> str:
    """Show what would go, check the model, and send it.

    Raises:
        InputErrors: for what can be known before the check.
        StepError: when the model is not sound, or the hub refuses.
    """
    # Nothing is measured, so whatever the composition would measure need not be there.
    context.check_settings(replace(run, eval=replace(run.eval, kind="none", tasks=[], text=None)), run_dir)
    settings = run.publish
    folder = finished_model(str(settings.path), "publish.path")
    going = items(folder)
    target, unasked = _target(run)
    if not settings.dry_run:
        if unasked:
            raise InputError(f"publish.repo: the hub did not say whether {target.repo} exists: {unasked}")
        check_login(target)
    show(run, going, target, unasked, _card(folder / CARD))
    if target.exists and not target.private and settings.private:
        terminal.finding(
            "warning", f"{target.repo} is there and public: whoever likes can read what goes there"
        )
    size = sum(i.size for i in going)
    if settings.dry_run:
        return f"{len(going)} files, {format_size(size)}; nothing was sent"
    run = context.on_this_machine(run)
    report = context.verify_model(folder, run, {})
    run_dir.record({"check": report.json(), "model": str(folder)})
    if not report.sound:
        raise StepError(f"{folder} {report.verdict(' and was not sent')}")
    message = settings.message or f"{folder.name}, by mergelab"
    with terminal.progress(nbytes=True) as progress:
        commit = upload(going, target, private=settings.private, message=message, progress=progress)
    url = _url(target)
    told = {"repo": target.repo, "revision": settings.revision, "commit": commit, "url": url}
    run_dir.record({"published": {**told, "files": len(going), "bytes": size}})
    terminal.command(url)
    if commit == target.head:
        return f"{target.repo} has this very model already, at {commit[:12]}"
    return f"{len(going)} files, {format_size(size)}, to {target.repo} at {commit[:12]}"


def _target(run: Run) -> tuple[Target, str]:
    """The repository as it is, and why it could not be asked, if so."""
    repo, branch = str(run.publish.repo), run.publish.revision
    try:
        return look(repo, branch), ""
    except Exception as e:
        if not client.is_external(e):
            raise
        return Target(repo, branch, None), client.line(e)


def _url(target: Target) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{target.repo}" + (f"/tree/{target.branch}" if target.branch else "")


def show(run: Run, going: list[Item], target: Target, unasked: str, card: dict[str, Any]) -> None:
    """The files, where they go, and what the card says."""
    rows = [[i.name, format_size(i.size)] for i in going]
    rows.append(["in all", format_size(sum(i.size for i in going))])
    terminal.table("files", ["", ""], rows, texts=1)
    terminal.gap()
    terminal.table("to", ["", ""], [["repository", _url(target)], *_state(run, going, target, unasked)])
    terminal.gap()
    said = [[k, ", ".join(v) if isinstance(v, list) else str(v)] for k in SHOWN if (v := card.get(k))]
    if not card.get("license"):
        said.append(["license", "none named"])
    terminal.table(f"card ({CARD})", ["", ""], said)
    terminal.gap()


def _state(run: Run, going: list[Item], target: Target, unasked: str) -> Iterator[list[str]]:
    if target.exists is None:
        yield ["", f"whether it is there could not be asked: {unasked}"]
    elif not target.exists:
        yield ["", f"not there, or not to be seen; it would be made {_visible(run.publish.private)}"]
    else:
        yield ["", f"is there, {_visible(target.private)}, at {str(target.head)[:12]}"]
    if target.branch and not target.has_branch and target.exists is not None:
        yield ["branch", f"{target.branch}, which would be made"]
    if gone := stale(going, target):
        yield ["removed", f"{', '.join(gone)}: of another model"]


def _visible(private: bool) -> str:
    return "private" if private else "public"


STEP = register(
    Step(
        "publish",
        execute,
        settings="publish",
        findings=findings,
        recorded=False,
        on_login_node=True,
        online=True,
    )
)
