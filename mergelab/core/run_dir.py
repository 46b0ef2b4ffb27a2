"""A run's folder: what is in it, and how its files are written atomically."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.core.errors import InputError

RESULT_SCHEMA = 1
"""Version of result.json; docs/reference/result.md documents it. Raised when a key changes its meaning."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically: to a temporary file first, which is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        Path(aside).chmod(0o666 & ~umask())
        Path(aside).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(aside).unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of `text` as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`write_text` of `value` as indented JSON. JSON knows no NaN: it becomes the text "nan"."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_memo(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file that can be made anew: empty where there is none, or where it is damaged."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def short_path(path: Path) -> str:
    """A path as a user in this directory would type it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def finished_model(path: str, key: str) -> Path:
    """`find_model` of the value of `key`.

    Raises:
        InputError: where there is none.
    """
    try:
        return find_model(path)
    except LookupError as e:
        raise InputError(f"{key}: {e.args[0]}") from None


def find_model(path: str) -> Path:
    """The folder of a finished model that a path names, by itself or by the run that made it.

    Raises:
        LookupError: where there is none, with the reason.
    """
    folder = Path(os.path.expanduser(path)).resolve()  # noqa: PTH111 (pathlib's raises for ~nobody)
    if not folder.is_dir():
        raise LookupError(f"{folder} is not a folder")
    if (folder / "config.json").exists():
        return folder
    made = read_memo(folder / "result.json")
    for inside in (made.get("model"), folder / "model"):
        if inside and (Path(inside) / "config.json").exists():
            return Path(inside)
    status = f"; its run is {made['status']}" if made.get("status") else ""
    raise LookupError(f"{folder} is neither a model's folder nor that of a run that made one{status}")


def hydra_value(text: Path | str) -> str:
    """A path or a text as a value on Hydra's command line."""
    return "'" + str(text).replace("\\'", "\\\\'").replace("'", "\\'") + "'"


def umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def refuse_finished(folder: Path) -> None:
    """Raise InputError if a run has finished in `folder`: its record must not be lost."""
    result = folder / "result.json"
    if result.exists() and read_json(result).get("status") == "done":
        raise InputError(f"{folder} holds a finished run\nChoose another folder: hydra.run.dir=DIR")


def append_event(folder: Path, kind: str, **data: Any) -> None:
    """Append one line to events.jsonl in a run's folder, without fsync because nothing depends on it."""
    line = json.dumps({"time": round(time.time(), 3), "event": kind, **data})
    with (folder / "events.jsonl").open("a", encoding="utf-8") as f:
        f.write(line + "\n")


@dataclass(frozen=True)
class RunDir:
    """The folder of one run, and the names in it."""

    folder: Path
    model: Path
    """Where the merged model appears, once it is whole and has been checked."""
    scratch: Path | None = None
    """A folder of a faster disk in which it is written first."""

    @property
    def recipe(self) -> Path:
        """Plain mergekit YAML."""
        return self.folder / "recipe.yaml"

    @property
    def plan(self) -> Path:
        """What preflight found, and the estimate."""
        return self.folder / "plan.json"

    @property
    def result(self) -> Path:
        """What came out; see docs/reference/result.md."""
        return self.folder / "result.json"

    @property
    def partial(self) -> Path:
        """Where a model is written before it has been checked."""
        return (self.scratch or self.model.parent) / f".{self.model.name}.partial"

    def event(self, kind: str, **data: Any) -> None:
        """Append one line to events.jsonl: what happened, and when (seconds since 1970)."""
        append_event(self.folder, kind, **data)

    def begin(self, parts: Mapping[str, Any]) -> None:
        """Start result.json anew.

        Raises:
            InputError: when it is that of a finished run, which must not be lost.
        """
        refuse_finished(self.folder)
        write_json(self.result, {"schema": RESULT_SCHEMA, "status": "running", **parts})

    def record(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Merge `parts` into result.json and return the whole."""
        result = read_json(self.result)
        result.update(parts)
        write_json(self.result, result)
        return dict(result)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs out of the folder; two that start within a second would share it.

        Raises:
            InputError: when another process works in it.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / ".hydra" / "lock")
        (self.folder / ".hydra").mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise InputError(
                f"another run is working in {self.folder}\n"
                "Wait until it ends, or choose another folder: hydra.run.dir=DIR"
            ) from None
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty folder beside the model's final place; removed again if the body fails."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        try:
            yield self.partial
        except BaseException:
            shutil.rmtree(self.partial, ignore_errors=True)
            raise
