"""Where unfinished work lies, so that the same command resumes it.

The folder of a run is new each time. What was interrupted is therefore found by a key, a hash of everything
that decides the work's result: `KIND/KEY.json` in mergelab's cache names the folder. The kinds are `sweeps`
(searches), `clusters` (the runs of a command on a cluster) and `merges`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mergelab.core.cache_dir import home
from mergelab.core.run_dir import read_memo, write_json


class ResumeRegistry:
    """The unfinished work of one kind.

    Args:
        kind: of work; the name of a folder in the cache.
        cache: the cache's folder; None: mergelab's.
    """

    def __init__(self, kind: str, cache: Path | None = None):
        self._folder = (cache or home()) / kind

    def folder(self, key: str) -> Path | None:
        """The folder in which the work of a key was begun; None where it was not."""
        folder = read_memo(self._entry(key)).get("folder")
        return Path(folder) if isinstance(folder, str) else None

    def record(self, key: str, folder: Path, **more: Any) -> None:
        """The work of a key is now in this folder.

        Args:
            key: of the work.
            folder: where it is.
            more: values to be found again by `entries`.
        """
        write_json(self._entry(key), {"folder": str(folder), **more})

    def forget(self, key: str, folder: Path | None = None) -> None:
        """The work of a key is finished.

        Args:
            key: of the work.
            folder: only if this is the folder in which it is recorded.
        """
        if folder is None or self.folder(key) == folder:
            self._entry(key).unlink(missing_ok=True)

    def entries(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Each folder that still exists, with what is recorded of it; entries of others are removed."""
        for entry in self._folder.glob("*.json"):
            with contextlib.suppress(OSError):
                content = read_memo(entry)
                folder = content.get("folder")
                if isinstance(folder, str) and Path(folder).exists():
                    yield Path(folder), content
                elif content:
                    entry.unlink(missing_ok=True)

    def _entry(self, key: str) -> Path:
        return self._folder / f"{key}.json"
