"""What mergelab knows by name, and how users add to it.

A registry has entries of our own, those of installed packages, and those of Python files in the user's
`--config-dir`:

    my_conf/methods/my_method.py        imported because of --config-dir my_conf
    [project.entry-points."mergelab.methods"]  of an installed package: each names a module to import

A file or module registers its entries while it is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Generic, TypeVar

from mergelab.core.errors import InputError, MergelabError, did_you_mean

T = TypeVar("T")


@dataclass(frozen=True)
class Origin:
    """Where an entry comes from."""

    label: str
    """`mergelab`, a file, or a package with its version."""
    digest: str = ""
    """A hash of the file's content, or the package's version: what decides a result together with the
    entry's name. Empty for our own entries, which mergelab's version stands for."""


OURS = Origin("mergelab")

_config_dirs: list[Path] = []
_importing: list[Origin] = []


def add_config_dir(folder: str | Path | None) -> None:
    """Also look for entries in a user's folder; None is ignored."""
    if folder is not None and (resolved := Path(folder).expanduser().resolve()) not in _config_dirs:
        _config_dirs.append(resolved)


class Registry(Generic[T]):
    """Entries of one kind by name.

    Args:
        kind: the folder in a user's --config-dir, and the end of the entry point group: `methods`.
        noun: what messages call an entry: `merge method`.
        ours: the modules of our own that register entries when they are imported.
    """

    def __init__(self, kind: str, noun: str, ours: tuple[str, ...] = ()):
        self.kind = kind
        self.noun = noun
        self._ours = ours
        self._entries: dict[str, tuple[T, Origin]] = {}
        self._files: dict[Path, str] = {}
        """What has been imported from users' folders, with the digest of the content."""
        self._installed = False

    def add(self, name: str, entry: T) -> T:
        """Register an entry, from the module that is being imported.

        Raises:
            InputError: where the name is taken by an entry from elsewhere.
        """
        origin = _importing[-1] if _importing else OURS
        if name in self._entries and self._entries[name][1].label != origin.label:
            other = self._entries[name][1].label
            raise InputError(f"{origin.label}: there is a {self.noun} '{name}' already, in {other}")
        self._entries[name] = entry, origin
        return entry

    def names(self) -> list[str]:
        """All names, our own first."""
        self.load()
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        self.load()
        return name in self._entries

    def get(self, name: str) -> T:
        """The entry of a name.

        Raises:
            LookupError: with a message that says which names there are.
        """
        self.load()
        if name not in self._entries:
            names = self.names()
            message = f"'{name}' is not a {self.noun}.{did_you_mean(name, names)}"
            raise LookupError(f"{message} There are {', '.join(names)}.")
        return self._entries[name][0]

    def origin(self, name: str) -> Origin:
        """Where an entry comes from."""
        self.load()
        return self._entries[name][1]

    def load(self) -> None:
        """Import whatever may register entries and has not been imported yet.

        Raises:
            InputError: where a user's file or an installed package fails to import.
        """
        if not self._installed:
            self._installed = True
            with _origin(OURS):
                for module in self._ours:
                    import_module(module)
            for point in entry_points(group=f"mergelab.{self.kind}"):
                version = point.dist.version if point.dist else ""
                package = f"{point.dist.name if point.dist else point.value} {version}".strip()
                with _origin(Origin(package, package)), _explained(point.value):
                    import_module(point.module)
        for folder in list(_config_dirs):
            for file in sorted((folder / self.kind).glob("*.py")):
                self._import_file(file)

    def _import_file(self, file: Path) -> None:
        content = file.read_bytes()
        digest = sha256(content).hexdigest()
        if self._files.get(file) == digest:
            return
        name = f"mergelab_{self.kind}_{file.stem}_{sha256(str(file).encode()).hexdigest()[:8]}"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        with _origin(Origin(str(file), digest)), _explained(str(file)):
            spec.loader.exec_module(module)
        self._files[file] = digest


@contextmanager
def _origin(origin: Origin) -> Iterator[None]:
    _importing.append(origin)
    try:
        yield
    finally:
        _importing.pop()


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns whatever an import of a user's code raises into an InputError that names the line."""
    try:
        yield
    except MergelabError:
        raise
    except Exception as e:
        lines = [t for t in _frames(e) if t[0] == what]
        at = f", line {lines[-1][1]}" if lines else ""
        raise InputError(f"{what}{at}: {type(e).__name__}: {e}") from e


def _frames(e: BaseException) -> list[tuple[str, int]]:
    out = []
    trace = e.__traceback__
    while trace is not None:
        out.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    return out
