"""Compare task vectors in one pass over the files, tensor by tensor, in memory independent of model size.

One chunk of a tensor is in memory per model, in float32. Sums are in float64. The largest entries of a
tensor are found without sorting or holding it: two passes over its chunks count the bits of magnitudes
and give the exact threshold (`kernels.order_statistics`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

import numpy as np
import torch

from mergelab.analysis.parameter_groups import Comparison
from mergelab.analysis.statistics import Statistics
from mergelab.analysis.tensor import Tensors
from mergelab.core.dtypes import is_mergeable
from mergelab.core.errors import StepError
from mergelab.merging import streaming_engine
from mergelab.merging.torch_threads import threads
from mergelab.methods import Traits
from mergelab.models import architecture
from mergelab.models.checkpoint import ModelMetadata
from mergelab.recipes.tensor_plan import SourceTensor
from mergelab.schema import Hardware

Progress = Callable[[str, int, int], None]
"""(what, bytes done, total bytes)"""


def compare(
    base: ModelMetadata,
    experts: Mapping[str, ModelMetadata],
    *,
    hardware: Hardware,
    top: float | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Comparison:
    """Compare every task vector with every other, and with the base.

    Args:
        base: The metadata of the base.
        experts: The metadata of at least one expert, by name.
        hardware: The number of threads and the memory of their buffers. Its device is not used, because
            reading takes most of the time.
        top: The share of a tensor's entries that counts as its largest, at least one entry. If given,
            signs and largest entries are counted as well. Entries equal to the threshold are included,
            zeros never are.
        progress: Called with the bytes read, from this thread.

    Raises:
        StepError: Entries are NaN or infinite, or files have changed since their headers were read.
    """
    models = (*experts.values(), base)
    names, cut, left_out = _shared(base, list(experts.values()))
    sizes = {n: sum(m.tensors[n].nbytes for m in models) for n in names}
    entries = {n: min(m.tensors[n].numel for m in models) for n in names}

    def work(name: str) -> Statistics:
        *own, b = [SourceTensor(str(m.folder), name, m.tensors[name]) for m in models]
        with torch.no_grad():
            found = Tensors(b, own, entries[name]).sums(top)
        if not np.isfinite(found.dots).all():
            wrong = int(np.argmin(np.isfinite(found.dots.diagonal())))
            model, facts = [("base", base), *experts.items()][wrong]
            file = facts.tensors[name].file
            raise StepError(f"{name} of {model} has entries that are NaN or infinite: {file} is damaged")
        return found

    each = streaming_engine.chunk_memory(len(models), "float32", Traits.buffers)
    workers = len(streaming_engine.workers(replace(hardware, device="cpu"), each))
    out: dict[str, Statistics] = {}
    done, total = 0, sum(sizes.values())
    progress("compare", 0, total)
    with threads(1), ThreadPoolExecutor(workers) as pool:
        # Large tensors first, so that all workers finish at about the same time.
        waiting = {pool.submit(work, n): n for n in sorted(names, key=lambda n: -sizes[n])}
        try:
            for future in as_completed(waiting):
                name = waiting[future]
                out[name] = future.result()
                done += sizes[name]
                progress("compare", done, total)
        except streaming_engine.MergeError as e:
            raise StepError(str(e)) from e
        finally:
            for future in waiting:
                future.cancel()
    return Comparison(tuple(experts), top, {n: out[n] for n in names}, cut, left_out)


def _shared(
    base: ModelMetadata, experts: Sequence[ModelMetadata]
) -> tuple[list[str], dict[str, tuple[int, int]], tuple[str, ...]]:
    """Divide the tensors by how they can be compared.

    Returns:
        The tensors that can be compared, in the base's order; those of them that differ in rows (see
        `Comparison.cut`); and those that cannot be compared.
    """
    names, cut, left_out = [], {}, []
    head_is_embedding = architecture.tied(base.text_config)
    for name in dict.fromkeys(n for m in (base, *experts) for n in m.tensors):
        if name == "lm_head.weight" and head_is_embedding:
            continue  # a file that has it nevertheless repeats the embeddings
        headers = [m.tensors[name] for m in (base, *experts) if name in m.tensors]
        if not all(is_mergeable(h.dtype) for h in headers):
            continue  # not weights, but positions or masks
        if len(headers) <= len(experts) or len({h.shape[1:] for h in headers}) > 1:
            left_out.append(name)
            continue
        names.append(name)
        if len({h.shape for h in headers}) > 1:
            rows = [h.shape[0] for h in headers]
            cut[name] = (min(rows), max(rows))
    return names, cut, tuple(left_out)
