"""What mergelab knows by name, and how users add to it.

A registry has entries of our own, those of installed packages, and those of Python files in the user's
`--config-dir`:

    my_conf/methods/my_method.py        imported because of --config-dir my_conf
    [project.entry-points."mergelab.methods"]  of an installed package: each names a module to import

A file or module registers its entries while it is imported. A Run carries its `--config-dir` and the
digests of the files there, so that every process that executes it (`use_extensions`) imports the same code.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from threading import RLock
from typing import Generic, Protocol, TypeVar

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


class Composed(Protocol):
    """What a Run was composed from, as far as it matters here."""

    @property
    def config_dir(self) -> str | None:
        """The user's own folder."""

    @property
    def code(self) -> Mapping[str, str]:
        """What `digests` gave for it."""


_used: tuple[Path, Mapping[str, str]] | None = None
"""The user's folder, and the digests that some of its files must have."""
_importing: list[Origin] = []


def use_extensions(composed: Composed | None) -> None:
    """Look for entries in the folder that a run was composed with, in place of any folder before.

    Args:
        composed: None, and one without a folder, change nothing.
    """
    global _used
    if composed is not None and composed.config_dir is not None:
        _used = Path(composed.config_dir), composed.code


def use_config_dir(folder: str | Path) -> None:
    """Look for entries in a user's folder, in place of any folder before."""
    global _used
    _used = Path(folder).expanduser().resolve(), {}


def digests(folder: str | Path) -> dict[str, str]:
    """The digest of each Python file that registries may import from a user's folder, by its path there."""
    root = Path(folder)
    return {f.relative_to(root).as_posix(): _digest(f.read_bytes()) for f in sorted(root.glob("*/*.py"))}


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()


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
        self._ours = [*ours]
        """Those that have not been imported yet."""
        self._entries: dict[str, tuple[T, Origin]] = {}
        self._files: dict[Path, str] = {}
        """What has been imported from users' folders, with the digest of the content."""
        self._installed = False
        self._lock = RLock()

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
            InputError: where a user's file or an installed package fails to import, and where a user's file
                has changed since the run was composed.
        """
        with self._lock, self._registering(OURS):
            while self._ours:
                module, *self._ours = self._ours
                import_module(module)
        self._load_added()

    def added(self, in_folder: bool) -> dict[str, T]:
        """The entries that are not our own, by name; ours are not imported for it.

        Args:
            in_folder: those of the user's folder as well, not only those of installed packages.
        Raises:
            InputError: as `load` does.
        """
        self._load_added()
        files = {str(f) for f in self._files} if not in_folder else set()
        return {
            name: entry
            for name, (entry, origin) in self._entries.items()
            if origin != OURS and origin.label not in files
        }

    def _load_added(self) -> None:
        if not self._installed:
            self._installed = True
            for point in entry_points(group=f"mergelab.{self.kind}"):
                version = point.dist.version if point.dist else ""
                package = f"{point.dist.name if point.dist else point.value} {version}".strip()
                with self._registering(Origin(package, package)), explained(point.value):
                    import_module(point.module)
        folder, composed = _used or (None, {})
        files = sorted((folder / self.kind).glob("*.py")) if folder else []
        for file in self._files.keys() - files:  # of another folder, or removed
            self._remove_all(str(file))
            del self._files[file]
        for file in files:
            self._import_file(file, composed.get(f"{self.kind}/{file.name}"))

    def remove(self, name: str) -> None:
        """Forget an entry."""
        del self._entries[name]

    def _remove_all(self, label: str) -> None:
        """Forget what a file or package has registered."""
        for name in [n for n, (_, origin) in self._entries.items() if origin.label == label]:
            self.remove(name)

    @contextmanager
    def _registering(self, origin: Origin) -> Iterator[None]:
        """While the body runs, entries are registered from there; if it fails, none is."""
        _importing.append(origin)
        try:
            yield
        except BaseException:
            self._remove_all(origin.label)
            raise
        finally:
            _importing.pop()

    def _import_file(self, file: Path, composed: str | None) -> None:
        """Import a file unless it has been imported as it is.

        Args:
            composed: the digest that it had when the run was composed; None: any will do.
        """
        digest = _digest(file.read_bytes())
        if composed not in (None, digest):
            raise InputError(f"{file} has changed since the run was composed\nStart the command again.")
        if self._files.get(file) == digest:
            return
        self._remove_all(str(file))
        name = f"mergelab_{self.kind}_{file.stem}_{_digest(str(file).encode())[:8]}"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        with self._registering(Origin(str(file), digest)), explained(str(file)):
            spec.loader.exec_module(module)
        self._files[file] = digest


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns whatever a user's code raises while it is imported into an InputError that names the line.

    Args:
        what: the file, or what else the message names.
    """
    try:
        yield
    except MergelabError:
        raise
    except Exception as e:
        raise InputError(f"{what}{line_of(e, what)}: {type(e).__name__}: {e}") from e


def line_of(e: BaseException, file: str) -> str:
    """`, line 12`: where in a file an exception was raised; empty where it was elsewhere."""
    if isinstance(e, SyntaxError) and e.filename == file:
        return f", line {e.lineno}"
    lines = [number for name, number in _frames(e) if name == file]
    return f", line {lines[-1]}" if lines else ""


def _frames(e: BaseException) -> list[tuple[str, int]]:
    out = []
    trace = e.__traceback__
    while trace is not None:
        out.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    return out
