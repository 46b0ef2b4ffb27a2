"""Merge tensor by tensor, straight to disk: read, compute and write at once, in bounded memory.

Inputs are memory-mapped, and the disk is asked for the next ones while the present ones are merged.
Each worker takes a tensor, sends chunk after chunk of it through the method's kernel, and writes
what comes out to its place. A tensor is one worker's, and random masks are counted, not drawn: the
bytes do not depend on the number of workers.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mergelab.core import dtypes
from mergelab.core.hashing import digest, stamp
from mergelab.core.machine import available_processors
from mergelab.core.sizes import format_size
from mergelab.merging import kernels
from mergelab.merging.kernels.buffers import Buffers
from mergelab.merging.kernels.tensor_group import CHUNK, Group
from mergelab.merging.resume import MergeInterrupted
from mergelab.merging.shards import Layout, Writer, allocated, lay_out
from mergelab.merging.torch_threads import threads
from mergelab.methods import registry
from mergelab.preflight.resources import PER_GPU, whole_tensor_bytes
from mergelab.recipes.tensor_plan import OutputTensor, SourceTensor
from mergelab.schema import Hardware

Progress = Callable[[str, int, int], None]
"""(what, bytes done, bytes in all)"""

FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Merge:
    """Everything that decides the bytes of a merge, and how to make them."""

    method: str
    outputs: Sequence[OutputTensor]
    names: Mapping[str, str]
    """The name of each model, by its reference; random masks are keyed by it."""
    seed: int
    rescale: str
    """`l1` or `density`, see `kernels.sparsifiers.sparsifier`."""
    dtype: str
    """Of the arithmetic, as torch calls it."""
    layout: Layout
    device: str

    @property
    def key(self) -> str:
        """Two merges of one key write the same bytes.

        Inputs enter by size and time of change, or as blobs of the hub's cache by their hash: to
        hash 260 GB in order to find out that half of a merge is done would be the wrong price.
        """
        files = sorted({s.header.file for o in self.outputs for s in o.inputs})
        return digest(
            {
                "outputs": [
                    (o.name, o.dtype, o.shape, [(s.header.file, s.tensor) for s in o.inputs],
                     [self.names[s.model] for s in o.experts], dict(o.parameters))
                    for o in self.outputs
                ],
                "method": [self.method, self.seed, self.rescale, self.dtype],
                **({"code": code} if (code := registry.get(self.method).code) else {}),
                "files": [(f, _stamp(Path(f))) for f in files],
                "headers": {f: h.decode("latin-1") for f, h in self.layout.headers.items()},
                "kernels": [kernels.VERSION, torch.__version__, self.device.partition(":")[0]],
            }
        )  # fmt: skip


def _stamp(path: Path) -> Any:
    real = path.resolve()
    return [real.name, *stamp(real)]


def plan(
    method: str,
    outputs: Sequence[OutputTensor],
    names: Mapping[str, str],
    *,
    seed: int,
    rescale: str,
    dtype: str,
    hardware: Hardware,
) -> Merge:
    """The merge that makes these tensors."""
    layout = lay_out(outputs, hardware.shard_bytes)
    return Merge(method, outputs, names, seed, rescale, dtype, layout, hardware.device)


def run(
    merge: Merge, out: Path, *, hardware: Hardware, progress: Progress = lambda what, done, total: None
) -> int:
    """Write the weight files into the folder `out`, starting from what is finished there.

    Args:
        out: a folder; what is in it after an exception is worth keeping if the merge can be resumed.
        hardware: the device or devices, threads and memory.
        progress: called often, with bytes read and written.
    Returns:
        bytes that were there already from an earlier, interrupted merge.
    Raises:
        MergeInterrupted: when the disk is full, with what is needed.
        MergeError: when the method has no answer for a tensor.
    """
    try:
        with Writer(
            out, merge.layout, merge.key, lambda d, t: progress("check what is there", d, t)
        ) as writer:
            there = sum(merge.layout.positions[name].nbytes for name in writer.done)
            _work(merge, writer, hardware, progress)
            writer.complete()
            return there
    except OSError as e:
        if e.errno not in FULL:
            raise
        raise MergeInterrupted(_full(merge, out)) from e


class MergeError(ValueError):
    """A method that has no answer for a tensor, or a tensor that is not there; the message names it."""


def _full(merge: Merge, out: Path) -> str:
    free = shutil.disk_usage(out).free
    missing = max(merge.layout.nbytes - allocated(out) - free, 0)
    return (
        f"no space left on device for {out}: {format_size(missing)} more are needed, "
        f"{format_size(free)} are free\n"
        "Free some and run the same command again: it resumes where it stopped."
    )


def _work(merge: Merge, writer: Writer, hardware: Hardware, progress: Progress) -> None:
    total = sum(o.traffic for o in merge.outputs)
    left = [o for o in merge.outputs if o.name not in writer.done]
    read = total - sum(o.traffic for o in left)
    state = _State(kernels.kernel_of(merge.method), _order(left, merge.layout), total, read, progress)
    each = worker_memory(merge.method, merge.outputs, merge.dtype)
    devices = workers(hardware, each)
    memory = hardware.memory_bytes
    spare = memory // len(devices)
    if hardware.device == "cpu":
        spare -= each
    # One thread for each operation: parallel are the workers.
    with threads(1), Inputs() as inputs, ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(len(devices) + 1))
        stack.callback(state.stop.set)
        futures = [pool.submit(_worker, merge, state, writer, inputs, d, spare) for d in devices]
        futures.append(pool.submit(inputs.read_ahead, state, memory))
        while True:
            done, running = wait(futures, timeout=0.2, return_when=FIRST_EXCEPTION)
            state.tell()
            for f in done:
                f.result()
            if not running:
                break


def workers(hardware: Hardware, each: int) -> list[str]:
    """The device of each worker: as many as there are processors (or `threads`), fewer where the
    memory does not suffice; on GPUs a few for each.

    Args:
        each: bytes of memory that a worker on a CPU needs.
    """
    kind, _, number = hardware.device.partition(":")
    if kind == "cuda":
        first = int(number or 0)
        count = hardware.devices or torch.cuda.device_count() - first
        return [f"cuda:{i}" for i in range(first, first + count) for _ in range(PER_GPU)]
    count = hardware.threads or available_processors()
    return ["cpu"] * max(1, min(count, hardware.memory_bytes // each))


def worker_memory(method: str, outputs: Sequence[OutputTensor], dtype: str) -> int:
    """Bytes that a worker on a CPU needs, at most: the buffers of a chunk, or whole tensors."""
    info, inputs = registry.get(method), max(len(o.inputs) for o in outputs)
    if info.whole_tensors:
        return whole_tensor_bytes(
            max(math.prod(o.shape) for o in outputs), inputs, dtypes.BY_NAME[dtype].nbytes
        )
    return chunk_memory(inputs, dtype, info.traits.buffers)


def chunk_memory(inputs: int, dtype: str, buffers: int) -> int:
    """Bytes of the buffers in which a worker on a CPU goes over chunks, at most.

    Args:
        buffers: besides three for each input.
    """
    return CHUNK["cpu"] * dtypes.BY_NAME[dtype].nbytes * (3 * inputs + buffers)


def _order(outputs: Sequence[OutputTensor], layout: Layout) -> list[OutputTensor]:
    """File by file, in each the large tensors first, so that all workers end together."""
    files = {file: i for i, file in enumerate(layout.headers)}
    return sorted(outputs, key=lambda o: (files[layout.positions[o.name].file], -o.nbytes))


class _State:
    """What the workers of a merge share."""

    def __init__(
        self, kernel: kernels.Kernel, order: list[OutputTensor], total: int, done: int, progress: Progress
    ):
        self.kernel, self.order, self.total, self.done, self.progress = kernel, order, total, done, progress
        self.next = 0
        self.stop = threading.Event()
        self._lock = threading.Lock()

    def take(self) -> OutputTensor | None:
        """The next tensor, None where there is none or the merge has been stopped."""
        with self._lock:
            if self.stop.is_set() or self.next == len(self.order):
                return None
            self.next += 1
            return self.order[self.next - 1]

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.done += nbytes

    def tell(self) -> None:
        self.progress("merge", self.done, self.total)


class Inputs:
    """The weight files that are read, mapped into memory."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Inputs:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def tensor(self, source: SourceTensor) -> torch.Tensor:
        """The tensor in the file's dtype; its pages are read when they are touched."""
        file = source.header.file
        try:
            with self._lock:
                if file not in self._files:
                    self._files[file] = self._stack.enter_context(safe_open(file, framework="pt"))
                tensor: torch.Tensor = self._files[file].get_tensor(source.tensor)
        except SafetensorError as e:
            raise MergeError(
                f"{source.tensor}: {file} has changed since preflight, or is damaged ({e})"
            ) from e
        return tensor

    def read_ahead(self, state: _State, window: int) -> None:
        """Ask the disk for what comes next, up to `window` bytes before it is needed."""
        sizes = [sum(s.header.nbytes for s in o.inputs) for o in state.order]
        for i, output in enumerate(state.order):
            while i > state.next and sum(sizes[state.next : i]) > window:
                if state.stop.wait(0.01):
                    return
            if state.stop.is_set():
                return
            for source in output.inputs:
                will_need(self.tensor(source))


def will_need(tensor: torch.Tensor) -> None:
    """madvise(MADV_WILLNEED) on the pages of a mapped tensor; only a hint, so its result is nothing."""
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is None or not hasattr(mmap, "MADV_WILLNEED") or tensor.numel() == 0:
        return
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.numel() * tensor.element_size() - start
    advise(ctypes.c_void_p(start), ctypes.c_size_t(size), ctypes.c_int(mmap.MADV_WILLNEED))


def _worker(merge: Merge, state: _State, writer: Writer, inputs: Inputs, device: str, spare: int) -> None:
    """Merge tensors until there are none left, or another worker has failed."""
    buffers = Buffers(device)
    try:
        with torch.no_grad():
            while output := state.take():
                _merge_tensor(merge, output, state, writer, inputs, buffers, spare)
    except BaseException:
        state.stop.set()
        raise


def _merge_tensor(
    merge: Merge, o: OutputTensor, state: _State, writer: Writer, inputs: Inputs, buffers: Buffers, spare: int
) -> None:
    move = buffers.device.type != "cpu" and sum(s.header.nbytes for s in o.inputs) <= spare

    def read(source: SourceTensor) -> torch.Tensor:
        tensor = inputs.tensor(source)
        return tensor.to(buffers.device) if move else tensor

    group = Group(
        o.name,
        [read(s) for s in o.experts],
        read(o.base) if o.base else None,
        [merge.names[s.model] for s in o.experts],
        merge.seed,
        getattr(torch, merge.dtype),
        buffers,
        spare,
        base_at=o.base_at,
    )
    dtype = getattr(torch, dtypes.BY_CODE[o.dtype].name)
    share = o.traffic / max(o.nbytes, 1)
    target = writer.tensor(o.name)
    try:
        pieces = kernels.merge(state.kernel, group, {**o.parameters, "rescale_to": merge.rescale})
        for _, piece in pieces:
            if state.stop.is_set():
                return
            data = buffers("out", (piece.numel(),), dtype).copy_(piece).cpu().view(torch.uint8).numpy().data
            target.append(data)
            state.add(int(len(data) * share))
    except ValueError as e:
        raise MergeError(f"{o.name}: {e}") from e
    target.close()
