"""What a run needs and what there is: bytes to read and write, memory, disk."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergelab.core.findings import Finding, Severity, warning
from mergelab.core.machine import existing
from mergelab.core.sizes import format_size
from mergelab.schema.hardware import DEVICE

START = 1.5e9
"""Bytes that Python, torch and transformers take before any weight; measured, CPU build."""
GPU_BUFFERS = int(3e9)
"""Bytes of the buffers of a GPU's two workers, with a few experts: 16.8M entries of 4 bytes in each
of about 20 of them."""
PER_GPU = 2
"""Workers of a GPU: while one computes, the other reads and writes."""
MARGIN = 1.001
"""Headers, and blocks of the disk that are not full."""


@dataclass(frozen=True)
class Estimate:
    """What a run needs, in bytes."""

    read: int
    """Weights of all inputs."""
    write: int
    """Weights of the merged model."""
    disk: int
    """Where the output goes, at the peak: weights, the files beside them, adapters merged in."""
    disk_there: int
    """Of it, what an interrupted merge of the same recipe has written already."""
    ram: int
    vram: int
    disk_free: int
    ram_free: int | None
    """Of this machine, or what a Slurm task asks for; None where that is not known."""
    evaluation_ram: int
    exact: bool
    """False where it comes from the architecture's known shapes and not from the files."""

    def json(self) -> dict[str, Any]:
        """As plan.json has it."""
        return asdict(self)


def whole_tensor_bytes(elements: int, inputs: int, size: int) -> int:
    """Bytes that a method on whole tensors holds for one output tensor: about three copies of each input
    (the tensor, its task vector, the masked one), and what comes of them.

    Args:
        elements: of the tensor.
        inputs: how many models take part.
        size: bytes of an element in the arithmetic.
    """
    return elements * size * (3 * inputs + 2)


def estimate(
    tensors: Sequence[int],
    inputs: int,
    read: int,
    *,
    out_bytes: int,
    compute_bytes: int,
    shard: int,
    device: str,
    low_memory: bool,
    bound: int | None,
    by_chunks: bool,
    evaluates: bool,
    output: Path,
    there: int,
    beside: int,
    exact: bool,
    ram_free: int | None = None,
) -> Estimate:
    """Upper estimates, from the elements of each output tensor.

    Our own engine keeps to a bound, and to that of a chunk's buffers for each worker of a GPU.
    mergekit keeps one shard of finished tensors until it is full, and works on one tensor of
    every input at a time; methods on task vectors hold about three copies of each
    (the tensor, its task vector, the masked one).

    Args:
        tensors: elements of each output tensor.
        inputs: models that take part.
        read: bytes of all inputs.
        out_bytes: bytes of an element written.
        compute_bytes: bytes of an element in the arithmetic.
        shard: bytes of the largest weight file.
        bound: bytes that our own engine may hold, None where mergekit's merges.
        by_chunks: whether our engine's kernel works on chunks; else each worker holds whole tensors.
        there: bytes of the output that an interrupted merge has written already.
        beside: bytes on the output's disk besides its weights.
        ram_free: bytes of memory where it will run, 0 if nobody knows; None: it is this machine.
    """
    import psutil

    write = sum(tensors) * out_bytes
    group = whole_tensor_bytes(max(tensors, default=0), inputs, compute_bytes)
    held = min(shard, write)
    on_device = device != "cpu"
    whole = math.ceil(write * 1.2) if evaluates else 0
    if bound is None:
        ram = int(START + held + (0 if on_device and low_memory else group))
        vram = int(group + (held if low_memory else 0))
    else:
        ram = int(START + max(bound, 0 if by_chunks else group))
        vram = bound + (GPU_BUFFERS if by_chunks else PER_GPU * group)
    vram = max(vram, whole) if on_device else 0
    return Estimate(
        read=read,
        write=write,
        disk=math.ceil(write * MARGIN) + beside,
        disk_there=there,
        ram=max(ram, int(START) + (0 if on_device else whole)),
        vram=vram,
        disk_free=shutil.disk_usage(existing(output)).free,
        ram_free=psutil.virtual_memory().available if ram_free is None else ram_free or None,
        evaluation_ram=whole,
        exact=exact,
    )


def check(e: Estimate, output: Path, missing_severity: Severity) -> Iterator[Finding]:
    """Whether the disk and the memory suffice; `missing_severity` is the severity of a disk that does not."""
    needed = e.disk - e.disk_there
    if needed > e.disk_free:
        yield Finding(
            missing_severity,
            "disk",
            "output",
            f"{output} needs {format_size(needed)}, and {format_size(e.disk_free)} are free",
            "Free some, or set output=DIR on another disk.",
        )
    if e.ram_free is not None and e.ram > e.ram_free:
        yield warning(
            "memory",
            "hardware",
            f"about {format_size(e.ram)} of memory needed, {format_size(e.ram_free)} are available",
            "Lower hardware.shard_size, set eval=none, or use a larger machine.",
        )


def check_device(device: str, devices: int, missing_severity: Severity) -> Iterator[Finding]:
    """Whether torch sees the device, and as many from it on (imports torch for anything but the CPU);
    else `missing_severity`."""
    if device == "cpu" or DEVICE.wrong(device):  # the rule of its field reports the latter
        return
    _, _, index = device.partition(":")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        yield Finding(
            missing_severity,
            "device",
            "hardware.device",
            f"'{device}', but torch sees no CUDA device here",
            "Use hardware=cpu, or a machine with a GPU and torch's CUDA build.",
        )
    elif index and int(index) >= count:
        message = f"'{device}', but there are {count} (cuda:0 to cuda:{count - 1})"
        yield Finding(missing_severity, "device", "hardware.device", message)
    elif int(index or 0) + devices > count:
        message = f"{devices} from {device} on, but there are {count}"
        yield Finding(missing_severity, "device", "hardware.devices", message, "Set 0 for all there are.")
