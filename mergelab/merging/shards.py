"""The weight files of a merge in progress: where each tensor goes, and which are done.

The layout is known before anything is computed, so every tensor is written directly to its position,
by any worker, in any order. A journal beside the files names the tensors that are finished, each with
a hash of its bytes: after a crash, those whose bytes match are used.

safetensors files: 8 bytes with the length of the header, the header as JSON, the tensors
(https://github.com/huggingface/safetensors#format). The library writes whole files only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import xxhash

from mergelab.core import jsonl_log
from mergelab.core.run_dir import write_json, write_text
from mergelab.recipes.tensor_plan import OutputTensor

JOURNAL = ".journal.jsonl"
LOCK = ".lock"
BLOCK = 1 << 22


@dataclass(frozen=True)
class TensorPosition:
    """Where a tensor is stored."""

    file: str
    offset: int
    """In the file, in bytes."""
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """The weight files of a model."""

    positions: dict[str, TensorPosition]
    headers: dict[str, bytes]
    """The start of each file, by its name, in order."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(p.nbytes for p in self.positions.values())

    def size(self, file: str) -> int:
        """Bytes of a file."""
        return len(self.headers[file]) + sum(p.nbytes for p in self.positions.values() if p.file == file)


def lay_out(outputs: Sequence[OutputTensor], largest: int) -> Layout:
    """Put the tensors into files in their order, a new one where the next would make it larger than
    `largest` bytes of tensors."""
    files: list[list[OutputTensor]] = [[]]
    size = 0
    for o in outputs:
        if files[-1] and size + o.nbytes > largest:
            files.append([])
            size = 0
        files[-1].append(o)
        size += o.nbytes
    positions: dict[str, TensorPosition] = {}
    headers: dict[str, bytes] = {}
    for i, tensors in enumerate(files, start=1):
        file = "model.safetensors" if len(files) == 1 else f"model-{i:05d}-of-{len(files):05d}.safetensors"
        headers[file] = _header(tensors)
        offset = len(headers[file])
        for o in tensors:
            positions[o.name] = TensorPosition(file, offset, o.nbytes)
            offset += o.nbytes
    return Layout(positions, headers)


def _header(tensors: Iterable[OutputTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for o in tensors:
        ends = [offset, offset + o.nbytes]
        entries[o.name] = {"dtype": o.dtype, "shape": list(o.shape), "data_offsets": ends}
        offset += o.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text


def allocated(folder: Path) -> int:
    """Bytes that the weight files in a folder take on the disk; those of a merge in the making have holes."""
    return sum(f.stat().st_blocks * 512 for f in folder.glob("*.safetensors"))


class Writer:
    """The files of a layout in a folder, open for writing; a context manager.

    Args:
        folder: which exists. What an earlier merge of the same key has finished in it stays;
            anything else but the lock is removed.
        key: of the merge: two with one key write the same bytes.
        progress: called with (bytes looked at, bytes in all) while the finished tensors of an
            earlier merge are checked.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        key: str,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.folder, self.layout = folder, layout
        self.done: set[str] = set()
        """Names of the tensors that are finished."""
        self._lock = threading.Lock()
        self._files: dict[str, int] = {}
        try:
            recorded = _recorded(folder / JOURNAL, key)
            if recorded is None:
                self._clear()
            for file, header in layout.headers.items():
                fd = os.open(folder / file, os.O_RDWR | os.O_CREAT, 0o666)
                self._files[file] = fd
                os.ftruncate(fd, layout.size(file))
                _write(fd, header, 0)
            self._check(recorded or {}, progress)
            lines = [{"key": key}, *({"tensor": n, "hash": (recorded or {})[n]} for n in self.done)]
            write_text(folder / JOURNAL, "".join(json.dumps(line) + "\n" for line in lines))
            self._journal: IO[str] = (folder / JOURNAL).open("a", encoding="utf-8")
        except BaseException:
            self._close()
            raise

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def _check(self, recorded: dict[str, str], progress: Callable[[int, int], None]) -> None:
        """Adopt the tensors whose bytes match the journal."""
        hashes = {name: h for name, h in recorded.items() if name in self.layout.positions}
        total, seen = sum(self.layout.positions[name].nbytes for name in hashes), 0
        for name, expected in hashes.items():
            position = self.layout.positions[name]
            digest = xxhash.xxh3_128()
            for at in range(0, position.nbytes, BLOCK):
                size = min(BLOCK, position.nbytes - at)
                digest.update(os.pread(self._files[position.file], size, position.offset + at))
                seen += size
                progress(seen, total)
            if digest.hexdigest() == expected:
                self.done.add(name)

    def tensor(self, name: str) -> TensorWriter:
        """Write one tensor, from its first byte to its last."""
        return TensorWriter(self, name)

    def finish(self, name: str, digest: str) -> None:
        """Record a tensor that is written."""
        with self._lock:
            self._journal.write(json.dumps({"tensor": name, "hash": digest}) + "\n")
            self._journal.flush()
            self.done.add(name)

    def write(self, position: TensorPosition, at: int, data: memoryview) -> None:
        """Write bytes of a tensor; for several threads at once."""
        _write(self._files[position.file], data, position.offset + at)

    def complete(self) -> None:
        """All tensors are written: put the index of several files beside them. The journal stays
        because the merge can still be interrupted before the model has its name."""
        missing = self.layout.positions.keys() - self.done
        if missing:
            raise AssertionError(f"not written: {sorted(missing)}")
        if len(self.layout.headers) > 1:
            files = {name: position.file for name, position in self.layout.positions.items()}
            index = {"metadata": {"total_size": self.layout.nbytes}, "weight_map": files}
            write_json(self.folder / "model.safetensors.index.json", index)

    def _close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files = {}
        with contextlib.suppress(AttributeError):  # it was not open yet
            self._journal.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


class TensorWriter:
    """One tensor of a `Writer`, in pieces, one after the other."""

    def __init__(self, writer: Writer, name: str):
        self._writer, self._name = writer, name
        self._position = writer.layout.positions[name]
        self._at = 0
        self._digest = xxhash.xxh3_128()

    def append(self, data: memoryview) -> None:
        """Write the next bytes."""
        self._writer.write(self._position, self._at, data)
        self._digest.update(data)
        self._at += len(data)

    def close(self) -> None:
        """Record the tensor as finished."""
        if self._at != self._position.nbytes:
            raise AssertionError(f"{self._name}: {self._at} of {self._position.nbytes} bytes")
        self._writer.finish(self._name, self._digest.hexdigest())


def _write(fd: int, data: bytes | memoryview, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        n = os.pwrite(fd, rest, offset)
        rest, offset = rest[n:], offset + n


def _recorded(journal: Path, key: str) -> dict[str, str] | None:
    """The hash of each finished tensor, or None where there is no merge of this key."""
    lines = jsonl_log.read(journal)
    if not lines or lines[0].get("key") != key:
        return None
    return {line["tensor"]: line["hash"] for line in lines[1:] if "tensor" in line}
