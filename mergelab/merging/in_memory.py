"""Merge candidate after candidate into one live model: no disk, no reload.

The inputs stay in memory, and each candidate is made by the engine's own kernels, straight into the
parameters of a model that can be measured at once. It has the bits that the same recipe has when it
is merged to disk and loaded. What the candidates of a population share is computed once.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from mergelab.core import dtypes
from mergelab.core.errors import StepError, typed_line
from mergelab.core.library_output import silence_libraries
from mergelab.core.model_class import model_class
from mergelab.merging import kernels, model_files, streaming_engine
from mergelab.merging.kernels.buffers import Buffers
from mergelab.merging.kernels.tensor_group import Group
from mergelab.merging.torch_threads import threads
from mergelab.models import blueprint, checkpoint, ties
from mergelab.models.blueprint import Blueprint
from mergelab.models.quantization import leftovers_ignored
from mergelab.recipes.tensor_plan import OutputTensor, SourceTensor
from mergelab.schema import Hardware

RESERVE = 0.2
"""Share of the memory that is free which stays free: for the evaluation's activations."""

COMPILED_FROM = 10_000_000
"""Parameters of a model from which on merging it is worth the seconds that compiling loops takes."""


class Resident:
    """A live model, and the inputs from which it is made again and again.

    Args:
        config_source: the folder of the model whose configuration and tokenizer the merged one has.
        template: the chat template that the tokenizer gets; None keeps the config_source's.
        outputs: the tensors of the first candidate; the others have the same ones, with other
            parameters.
        names: the name of each model, by its reference; random masks are keyed by it.
        hardware: the device, and the threads that merge.
    Raises:
        StepError: where the live model does not consist of these tensors, or cannot be loaded.
    """

    def __init__(
        self,
        config_source: Path,
        outputs: Sequence[OutputTensor],
        names: Mapping[str, str],
        *,
        hardware: Hardware,
        template: str | None = None,
    ):
        self.hardware, self.names = hardware, dict(names)
        self.model, self.tokenizer = _live(config_source, outputs, template, hardware.device)
        self._targets = _targets(self.model, outputs, blueprint.of(checkpoint.weights(config_source)))
        self._inputs = streaming_engine.Inputs()
        sources = {(s.header.file, s.tensor): s for o in outputs for s in o.inputs}
        room = _room(hardware) - sum(s.header.nbytes for s in sources.values())
        self._held = self._hold(sources, room >= 0)
        alike = hardware.workers if hardware.device == "cpu" else 1
        self._budget = kernels.Budget(max(room, 0) // alike)
        self._shared: dict[str, kernels.Shared] = {}
        size = sum(t.numel() for t in self._targets.values())
        self._compiled = _loops() if size >= COMPILED_FROM else None

    def merge(
        self, method: str, outputs: Sequence[OutputTensor], *, seed: int, rescale: str, dtype: str
    ) -> Any:
        """Make the live model that of these outputs, and return it.

        Args:
            method: its name.
            outputs: every tensor, with what its parameters come to.
            seed: of random masks.
            rescale: `l1` or `density`, see `kernels.sparsifiers.sparsifier`.
            dtype: of the arithmetic, as torch calls it.
        Raises:
            StepError: where the method has no answer for a tensor.
        """
        work = sorted((o for o in outputs if o.name in self._targets), key=lambda o: -o.nbytes)
        queue, kernel = _Queue(work), kernels.kernel_of(method)
        each = streaming_engine.worker_memory(method, work, dtype)
        workers = streaming_engine.workers(self.hardware, each)
        if self.hardware.device != "cpu":
            workers = [self.hardware.device]

        def run(device: str) -> None:
            buffers = Buffers(device)
            with torch.no_grad():
                for output in queue:
                    self._merge_tensor(kernel, output, buffers, seed, rescale, dtype)

        with threads(1):
            if len(workers) == 1:
                run(workers[0])
            else:
                with ThreadPoolExecutor(len(workers)) as pool:
                    for future in [pool.submit(run, device) for device in workers]:
                        future.result()
        return self.model

    def _merge_tensor(
        self, kernel: kernels.Kernel, o: OutputTensor, buffers: Buffers, seed: int, rescale: str, dtype: str
    ) -> None:
        group = Group(
            o.name,
            [self._read(s) for s in o.experts],
            self._read(o.base) if o.base else None,
            [self.names[s.model] for s in o.experts],
            seed,
            getattr(torch, dtype),
            buffers,
            shared=self._shared.setdefault(o.name, kernels.Shared(self._budget)),
            compiled=self._compiled,
            base_at=o.base_at,
        )
        parameters = {**o.parameters, "rescale_to": rescale}
        try:
            kernels.merge_into(
                self._targets[o.name],
                kernel,
                group,
                parameters,
                # Rounded twice where the model's own dtype is another, as it is when loaded from disk.
                getattr(torch, dtypes.BY_CODE[o.dtype].name),
            )
        except ValueError as e:
            raise StepError(f"the merge failed at {o.name}: {e}") from e

    def _read(self, source: SourceTensor) -> Tensor:
        return self._held[source.header.file, source.tensor].to(self.hardware.device)

    def _hold(
        self, sources: Mapping[tuple[str, str], SourceTensor], fit: bool
    ) -> dict[tuple[str, str], Tensor]:
        """The inputs. On a CPU they are files mapped into memory: all processes of a machine share one
        copy, which stays while there is room and is read again where there is none. A GPU gets them,
        or, where they do not fit, one tensor after another."""
        held = {key: self._inputs.tensor(source) for key, source in sources.items()}
        if self.hardware.device == "cpu":
            for tensor in held.values() if fit else ():
                streaming_engine.will_need(tensor)
        elif fit:
            held = {key: tensor.to(self.hardware.device) for key, tensor in held.items()}
        return held


def _loops() -> Any:
    from mergelab.merging.kernels import numba_kernels  # which imports a compiler

    return numba_kernels


def _room(hardware: Hardware) -> int:
    """Bytes that may be filled with inputs and what is known of them: on a GPU by this process, on a
    machine by all of its processes, which share the inputs."""
    if hardware.device == "cpu":
        return int(psutil.virtual_memory().available * (1 - RESERVE))
    free, _ = torch.cuda.mem_get_info(hardware.device)
    devices = hardware.devices or torch.cuda.device_count()
    return int(free * (1 - RESERVE)) // -(-hardware.workers // devices)


class _Queue:
    """What is left of a sequence, for several threads that draw from it. (A generator must not be
    entered by one thread while another is in it.)"""

    def __init__(self, items: Sequence[OutputTensor]):
        self._lock, self._rest = threading.Lock(), iter(items)

    def __iter__(self) -> Iterator[OutputTensor]:
        return self

    def __next__(self) -> OutputTensor:
        with self._lock:
            return next(self._rest)


def _live(
    config_source: Path, outputs: Sequence[OutputTensor], template: str | None, device: str
) -> tuple[Any, Any]:
    """The model and tokenizer that the config_source's folder would give if it had the merged weights."""
    from transformers import AutoConfig, AutoTokenizer

    sizes: dict[str, int] = {}
    for o in outputs:
        name = dtypes.BY_CODE[o.dtype].name
        sizes[name] = sizes.get(name, 0) + o.nbytes
    only = {"local_files_only": True, "trust_remote_code": False}
    try:
        with silence_libraries(), tempfile.TemporaryDirectory(prefix="mergelab-") as folder:
            for file in ("config.json",):
                (Path(folder) / file).write_bytes((config_source / file).read_bytes())
            model_files.copy_companions(config_source, Path(folder), template)
            has_tokenizer = checkpoint.read(config_source, "").has_tokenizer
            tokenizer = AutoTokenizer.from_pretrained(folder, **only) if has_tokenizer else None
            dtype = getattr(torch, max(sizes, key=lambda d: sizes[d]))
            changes = ties.changes(checkpoint.weights(config_source), [o.name for o in outputs])
            kind = model_class(AutoConfig.from_pretrained(config_source, **only))
            with leftovers_ignored(config_source):
                model = kind.from_pretrained(config_source, dtype=dtype, **changes, **only)
    except Exception as e:  # safetensors and tokenizers raise kinds of their own
        raise StepError(f"{config_source} cannot be loaded: {typed_line(e)}") from e
    for parameter in model.parameters():
        # Of its own: until now it may be a file that is mapped into memory.
        parameter.data = parameter.data.to(device, copy=True)
        parameter.requires_grad_(False)
    return model.to(device).eval(), tokenizer


def _targets(model: Any, outputs: Sequence[OutputTensor], known: Blueprint | None) -> dict[str, Tensor]:
    """Where each output tensor goes, flat. Of tied ones the first alone: they are one piece of memory.

    Args:
        model: the live one.
        outputs: by their names in files.
        known: what the model calls them.
    Raises:
        StepError: where the model and the outputs are not of the same tensors.
    """
    places = {name: p.data for name, p in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(places)
    own = {o.name: known.own(o.name) if known else o.name for o in outputs}
    made = {own[o.name]: o.shape for o in outputs}
    wrong = sorted(n for n, t in places.items() if made.get(n) != tuple(t.shape))
    wrong += sorted(n for n in made if n not in places and n not in tied)
    if wrong:
        some = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise StepError(f"cannot be merged in memory: the loaded model and its files differ in {some}")
    return {name: places[n].view(-1) for name, n in own.items() if n in places}
