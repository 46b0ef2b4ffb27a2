"""From what a configuration names to folders on this disk: paths, the hub's cache, the tiny family."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mergelab.preflight.findings import Finding, Severity, error

ZOO = "zoo:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PROBE_SECONDS = 5.0
"""How long the hub may take to say whether a repository is there."""


@dataclass(frozen=True)
class Source:
    """One model that takes part, and where it was found."""

    name: str
    """`base` or the expert's name."""
    place: str
    """The key that names it."""
    path: str
    """As configured."""
    revision: str | None = None
    folder: Path | None = None
    """Where it lies, None if it is not here."""
    adapter: Path | None = None
    commit: str | None = None
    """The hub's commit, where the folder is a snapshot of one."""

    @property
    def reference(self) -> str:
        """What mergekit gets: the folder, or the hub id where there is none."""
        if self.folder is None:
            return f"{self.path}@{self.revision}" if self.revision else self.path
        return f"{self.folder}+{self.adapter}" if self.adapter else str(self.folder)

    @property
    def label(self) -> str:
        """How people know it: hub id or configured path, with the start of the commit where known."""
        at = self.commit or self.revision
        return f"{self.path}@{at[:12]}" if at else self.path


def is_local(path: str) -> bool:
    """Whether a path means a folder, and not a hub id."""
    return Path(path).expanduser().exists() or path.startswith(("/", "./", "../", "~")) or path.count("/") > 1


def locate(
    name: str, place: str, path: str, revision: str | None, zoo: Callable[[str], Path]
) -> tuple[Source, list[Finding]]:
    """Find one model on this machine, without the network.

    Args:
        name: `base` or the expert's name.
        place: the key, for findings.
        path: the configured path, hub id, `zoo:ROLE`, or one of these with `+ADAPTER`.
        revision: of a hub id.
        zoo: the folder of a role of the tiny family; may raise LookupError.
    """
    main, plus, extra = path.partition("+")
    folder, commit, findings = _folder(place, main, revision, zoo)
    adapter = None
    if plus:
        adapter, _, more = _folder(place, extra, None, zoo)
        findings += more
        if adapter is not None and not (adapter / "adapter_config.json").exists():
            findings.append(
                error("adapter", place, f"{adapter} has no adapter_config.json, so it is no LoRA")
            )
    for f in (folder, adapter):
        if f is not None and re.search(r"[+@]", str(f)):
            findings.append(
                error(
                    "path",
                    place,
                    f"mergekit takes + and @ in a path for adapter and revision: {f}",
                    "Rename the folder, or link to it under another name.",
                )
            )
    return Source(name, place, main if not plus else path, revision, folder, adapter, commit), findings


def _folder(
    place: str, path: str, revision: str | None, zoo: Callable[[str], Path]
) -> tuple[Path | None, str | None, list[Finding]]:
    if path.startswith(ZOO):
        try:
            return zoo(path.removeprefix(ZOO)), None, []
        except LookupError as e:
            return None, None, [error("role", place, str(e.args[0]))]
    if is_local(path):
        folder = Path(path).expanduser().resolve()
        if not folder.is_dir():
            what = "is a file, not a model's folder" if folder.exists() else "is not there"
            return None, None, [error("missing", place, f"{folder} {what}")]
        if not os.access(folder, os.R_OK | os.X_OK):
            return None, None, [error("unreadable", place, f"no permission to read {folder}")]
        return folder, None, []
    if not HUB_ID.fullmatch(path):
        return (
            None,
            None,
            [error("path", place, f"'{path}' is neither a folder nor a hub id such as Qwen/Qwen2.5-7B")],
        )
    snapshot = _snapshot(path, revision)
    return snapshot, snapshot.name if snapshot else None, []


def _snapshot(repo: str, revision: str | None) -> Path | None:
    """The folder of a repository in the hub's cache, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def ask_hub(absent: list[Source], severity: Severity) -> list[Finding]:
    """Why models are not here, and how to get them; asks the hub once, for seconds at most.

    Args:
        absent: hub models without a folder.
        severity: error where they are needed now, warning where a plan can do without.
    """
    if not absent:
        return []
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max_workers=8) as pool:
        answers = list(pool.map(_probe, absent))
    alike: dict[tuple[str, str, str], list[Source]] = {}
    for s, answer in zip(absent, answers, strict=True):
        alike.setdefault(answer, []).append(s)
    return [
        Finding(
            severity,
            code,
            ", ".join(s.place for s in those),
            message.format(ids=", ".join(s.path for s in those), are="is" if len(those) == 1 else "are"),
            "\n".join([remedy, *(f"  {_fetch(s)}" for s in those if fetchable)]) if remedy else "",
        )
        for (code, message, remedy), those in alike.items()
        for fetchable in [code in ("not-downloaded", "gated")]
    ]


def _fetch(s: Source) -> str:
    return f"hf download {s.path}" + (f" --revision {s.revision}" if s.revision else "")


def _probe(s: Source) -> tuple[str, str, str]:
    """What the hub says of one repository: a code, the message, the remedy."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    offline = (
        "not-downloaded",
        "not on this machine, and the hub cannot be reached from it",
        "On a machine with internet, then copy its cache here (or share it through HF_HOME):",
    )
    try:
        HfApi().model_info(s.path, revision=s.revision, timeout=PROBE_SECONDS)
        HfApi().auth_check(s.path)
    except GatedRepoError:
        return (
            "gated",
            "{ids} {are} gated, and this login has no access",
            "Accept the licence on its page at the hub, then `hf auth login`, and:",
        )
    except RevisionNotFoundError:
        return ("no-revision", f"{{ids}} has no revision {s.revision}", "Look it up on its page at the hub.")
    except RepositoryNotFoundError:
        return (
            "no-repository",
            "the hub has no {ids}, or keeps it private",
            "Check the name; for a private model: hf auth login",
        )
    except (OfflineModeIsEnabled, HfHubHTTPError, OSError):
        return offline
    except Exception as e:
        # The hub's client lets its HTTP library's own errors through, and they share no base with ours.
        if type(e).__module__.startswith(("httpx", "httpcore", "requests")):
            return offline
        raise
    return ("not-downloaded", "not on this machine yet", "Fetch first:")
