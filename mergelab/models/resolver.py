"""Find the models that a configuration names: local paths, the hub's cache, the tiny family."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mergelab.core.findings import Finding, error
from mergelab.models.checkpoint import FETCH

ZOO = "zoo:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

Zoo = Callable[[str], Path]
"""Returns the folder of a role of the tiny family, training it if needed. LookupError for other roles."""


@dataclass(frozen=True)
class Source:
    """One model of a run, and where it was found."""

    name: str
    """`base` or the expert's name."""
    key: str
    """The key that names it."""
    path: str
    """As configured."""
    revision: str | None = None
    folder: Path | None = None
    """Where it is, or None if it is not on this machine."""
    adapter: Path | None = None
    commit: str | None = None
    """The hub's commit, if the folder is a snapshot of one."""
    adapter_revision: str | None = None
    """That of the adapter, which is a repository of its own."""

    @property
    def reference(self) -> str:
        """What mergekit gets: the folder, or the hub id if there is none."""
        if self.folder is None:
            main, plus, extra = self.path.partition("+")
            main = f"{main}@{self.revision}" if self.revision else main
            return main + plus + (f"{extra}@{self.adapter_revision}" if self.adapter_revision else extra)
        return f"{self.folder}+{self.adapter}" if self.adapter else str(self.folder)

    @property
    def label(self) -> str:
        """The name for people: hub id or configured path, with the start of the commit if known."""
        revision = self.commit or self.revision
        return f"{self.path}@{revision[:12]}" if revision else self.path

    @property
    def parts(self) -> list[Source]:
        """The model and its adapter as two sources, because on the hub they are two repositories."""
        main, plus, extra = self.path.partition("+")
        if not plus or os.path.isdir(self.path):  # noqa: PTH112 (never raises)
            return [self]
        adapter = Source(f"{self.name}'s adapter", self.key, extra, self.adapter_revision, self.adapter)
        return [replace(self, path=main, adapter=None, adapter_revision=None), adapter]

    @property
    def on_hub(self) -> bool:
        """Whether it is a repository of the hub, be it on this machine or not."""
        main = self.path.partition("+")[0]
        return not _is_local(main) and HUB_ID.fullmatch(main) is not None

    @property
    def absent(self) -> bool:
        """Whether it is a hub model that is not on this machine."""
        return self.folder is None and self.on_hub

    @property
    def download(self) -> str:
        """The command that fetches a hub model."""
        main = self.path.partition("+")[0]
        return f"hf download {main}" + (f" --revision {self.revision}" if self.revision else "")

    @property
    def repair(self) -> str:
        """The remedy for damaged or missing files."""
        return f"Fetch it again:\n  {self.download} --force-download" if self.commit else FETCH


def locate(name: str, key: str, path: str, revision: str | None, zoo: Zoo) -> tuple[Source, list[Finding]]:
    """Find one model on this machine, without the network.

    Args:
        name: `base` or the expert's name.
        key: The key that names it, for findings.
        path: The configured path, hub id, `zoo:ROLE`, or one of these with `+ADAPTER` or
            `+ADAPTER@REVISION`.
        revision: The revision of a hub id.
        zoo: The tiny family.
    """
    main, plus, extra = path.partition("+")
    if os.path.isdir(path):  # noqa: PTH112 (never raises)
        main, plus, extra = path, "", ""
    folder, commit, findings = _folder(key, main, revision, zoo)
    adapter, adapter_revision = None, None
    if plus:
        if not os.path.isdir(extra):  # noqa: PTH112 (as above)
            extra, _, own = extra.partition("@")
            adapter_revision = own or None
        path = f"{main}+{extra}"
        adapter, snapshot, more = _folder(key, extra, adapter_revision, zoo, "adapter_config.json")
        findings += _idle_revision(key, extra, adapter_revision, adapter, snapshot)
        findings += more
        if adapter is not None:
            findings += _check_adapter(adapter, key)
    for f in (folder, adapter):
        if f is not None and re.search(r"[+@]", str(f)):
            findings.append(
                error(
                    "path",
                    key,
                    f"mergekit reads + and @ in a path as adapter and revision: {f}",
                    "Rename the folder, or link to it under another name.",
                )
            )
    findings += _idle_revision(key, main, revision, folder, commit)
    return Source(name, key, path, revision, folder, adapter, commit, adapter_revision), findings


def _idle_revision(
    key: str, path: str, revision: str | None, folder: Path | None, commit: str | None
) -> list[Finding]:
    """A revision of what has none."""
    if revision is None or commit is not None or (folder is None and not _is_local(path)):
        return []
    message = f"revision '{revision}' has no effect because {path} is not on the hub"
    return [error("no-effect", key, message, "Leave the revision out.")]


def _check_adapter(adapter: Path, key: str) -> list[Finding]:
    if (adapter / "adapter_model.bin").exists() and not (adapter / "adapter_model.safetensors").exists():
        message = f"{adapter} holds only pickled weights (adapter_model.bin), which can run code"
        return [error("pickled-adapter", key, message, "Convert them: load with peft and save_pretrained.")]
    wrong = [
        name for name in ("adapter_config.json", "adapter_model.safetensors") if not (adapter / name).exists()
    ]
    return [error("adapter", key, f"{adapter} has no {name}, so it is not a LoRA") for name in wrong[:1]]


def _is_local(path: str) -> bool:
    """Whether a path means a folder rather than a hub id."""
    return (
        path.startswith((ZOO, "/", "./", "../", "~")) or path.count("/") > 1 or os.path.exists(path)  # noqa: PTH110
    )  # for a name that is too long, os.path.exists returns False where pathlib raises


def _folder(
    key: str, path: str, revision: str | None, zoo: Zoo, file: str = "config.json"
) -> tuple[Path | None, str | None, list[Finding]]:
    if path.startswith(ZOO):
        try:
            return zoo(path.removeprefix(ZOO)), None, []
        except LookupError as e:
            return None, None, [error("role", key, str(e.args[0]))]
    if _is_local(path):
        folder = Path(os.path.expanduser(path)).resolve()  # noqa: PTH111 (pathlib's raises for ~nobody)
        if not os.path.isdir(folder):  # noqa: PTH112 (as above)
            what = "is a file, not a model folder" if os.path.exists(folder) else "does not exist"  # noqa: PTH110
            return None, None, [error("missing", key, f"{folder} {what}")]
        if not os.access(folder, os.R_OK | os.X_OK):
            return None, None, [error("unreadable", key, f"no permission to read {folder}")]
        return folder, None, []
    if not HUB_ID.fullmatch(path):
        return (
            None,
            None,
            [error("path", key, f"'{path}' is neither a folder nor a hub id such as Qwen/Qwen2.5-7B")],
        )
    snapshot = _snapshot(path, revision, file)
    return snapshot, snapshot.name if snapshot else None, []


def _snapshot(repo: str, revision: str | None, file: str) -> Path | None:
    """The folder of a repository in the hub's cache, or None. It has `file`, but may lack others."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo, file, revision=revision)
    except HFValidationError:
        return None  # for example two dots in a row, which no name on the hub has
    return Path(found).parent if isinstance(found, str) else None
