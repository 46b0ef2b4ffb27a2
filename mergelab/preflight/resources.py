"""Resources that a run needs, and those available: bytes to read and write, memory, disk, devices."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergelab.core.findings import Finding, Severity, warning
from mergelab.core.machine import existing_parent
from mergelab.core.sizes import format_size
from mergelab.schema.hardware import DEVICE

START = 1.5e9
"""Bytes that Python, torch and transformers use before any weights are loaded; measured, CPU build."""
GPU_BUFFERS = int(3e9)
"""Bytes of the buffers of a GPU's two workers for a few experts: about 20 buffers of 16.8M entries of
4 bytes."""
PER_GPU = 2
"""Workers of a GPU: while one computes, the other reads and writes."""
MARGIN = 1.001
"""Allowance for headers and partly filled disk blocks."""


@dataclass(frozen=True)
class Estimate:
    """The needs of a run, in bytes."""

    read: int
    """Weights of all inputs."""
    write: int
    """Weights of the merged model."""
    disk: int
    """The peak on the output's disk: weights, the files beside them, merged adapters."""
    disk_there: int
    """The part of it that an interrupted merge of the same recipe has already written."""
    ram: int
    vram: int
    disk_free: int
    ram_free: int | None
    """Of this machine, or what a Slurm task requests; None if unknown."""
    evaluation_ram: int
    exact: bool
    """False if it is based on the architecture's known shapes instead of the files."""

    def json(self) -> dict[str, Any]:
        """The entry of plan.json."""
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
    write: int,
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

    Our own engine has a fixed bound, plus a chunk's buffers for each worker of a GPU. mergekit keeps
    finished tensors until a shard is full, and processes one tensor of every input at a time. Methods on
    task vectors hold about three copies of each (the tensor, its task vector, the masked one).

    Args:
        tensors: Elements of each output tensor.
        inputs: The number of models.
        read: Bytes of all inputs.
        write: Bytes of all written tensors.
        compute_bytes: Bytes of an element in the arithmetic.
        shard: Bytes of the largest weight file.
        device: The device that computes.
        low_memory: Whether mergekit keeps tensors on the device.
        bound: Bytes that our own engine may use, None if mergekit merges.
        evaluates: Whether the merged model is loaded and evaluated.
        output: The folder of the merged model.
        there: Bytes of the output that an interrupted merge has already written.
        beside: Bytes on the output's disk besides its weights.
        exact: Whether the sizes come from the files.
        ram_free: Bytes of memory on the machine that merges, 0 if unknown; None: it is this machine.
    """
    import psutil

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
        disk_free=shutil.disk_usage(existing_parent(output)).free,
        ram_free=psutil.virtual_memory().available if ram_free is None else ram_free or None,
        evaluation_ram=whole,
        exact=exact,
    )


def check(e: Estimate, output: Path, missing_severity: Severity) -> Iterator[Finding]:
    """Check that disk and memory suffice; `missing_severity` is the severity of insufficient disk space."""
    needed = e.disk - e.disk_there
    if needed > e.disk_free:
        yield Finding(
            missing_severity,
            "disk",
            "output",
            f"{output} needs {format_size(needed)}, but only {format_size(e.disk_free)} are free",
            "Free some, or set output=DIR on another disk.",
        )
    if e.ram_free is not None and e.ram > e.ram_free:
        yield warning(
            "memory",
            "hardware",
            f"about {format_size(e.ram)} of memory needed, but only {format_size(e.ram_free)} are available",
            "Lower hardware.shard_size, set eval=none, or use a larger machine.",
        )


def check_device(device: str, devices: int, missing_severity: Severity) -> Iterator[Finding]:
    """Check that torch sees the device, and enough devices from it on.

    Imports torch for any device but the CPU.

    Args:
        device: The value of `hardware.device`.
        devices: The number of devices.
        missing_severity: The severity of a missing device.
    """
    if device == "cpu" or DEVICE.wrong(device):  # the field's own rule reports a wrong value
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
        message = f"'{device}', but there are only {count} devices (cuda:0 to cuda:{count - 1})"
        yield Finding(missing_severity, "device", "hardware.device", message)
    elif int(index or 0) + devices > count:
        message = f"{devices} devices from {device} on, but there are only {count}"
        yield Finding(missing_severity, "device", "hardware.devices", message, "Set 0 to use all of them.")
