"""Compare task vectors in one pass over the files, tensor by tensor, in memory that no model's size moves.

Of a tensor, a chunk of each model is in memory at a time, in float32; what is added up is added up in
float64. The largest entries of a tensor are found without sorting or holding it: two ways over its
chunks count the bits of magnitudes and give the exact smallest of them (`kernels.order_statistics`).
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
"""(what, bytes done, bytes in all)"""


def compare(
    base: ModelMetadata,
    experts: Mapping[str, ModelMetadata],
    *,
    hardware: Hardware,
    top: float | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Comparison:
    """Every task vector beside every other, and beside the base.

    Args:
        base: its headers, and where its files lie.
        experts: the same of at least one expert, by name.
        hardware: the threads, and the memory that their buffers may have; its device is not used because
            most of the time is spent reading.
        top: the share of a tensor's entries that counts as its largest, at least one entry; with it signs
            and largest entries are counted as well. Entries that tie with the smallest of the largest
            belong to them, and zeros never do.
        progress: hears of the bytes that have been read, from this thread.
    Raises:
        StepError: for entries that are NaN or infinite, and for files that have changed meanwhile.
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
            who, facts = [("base", base), *experts.items()][wrong]
            file = facts.tensors[name].file
            raise StepError(f"{name} of {who} has entries that are NaN or infinite: {file} is damaged")
        return found

    each = streaming_engine.chunk_memory(len(models), "float32", Traits.buffers)
    workers = len(streaming_engine.workers(replace(hardware, device="cpu"), each))
    out: dict[str, Statistics] = {}
    done, total = 0, sum(sizes.values())
    progress("compare", 0, total)
    with threads(1), ThreadPoolExecutor(workers) as pool:
        # The large ones first, so that all workers end together.
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
    """The tensors that can be compared, in the base's order, those of them that differ in rows (see
    `Comparison.cut`), and those that cannot."""
    names, cut, left_out = [], {}, []
    head_is_embedding = architecture.tied(base.text_config)
    for name in dict.fromkeys(n for m in (base, *experts) for n in m.tensors):
        if name == "lm_head.weight" and head_is_embedding:
            continue  # where a file has it all the same, it is the embeddings once more
        headers = [m.tensors[name] for m in (base, *experts) if name in m.tensors]
        if not all(is_mergeable(h.dtype) for h in headers):
            continue  # no weights: positions, masks
        if len(headers) <= len(experts) or len({h.shape[1:] for h in headers}) > 1:
            left_out.append(name)
            continue
        names.append(name)
        if len({h.shape for h in headers}) > 1:
            rows = [h.shape[0] for h in headers]
            cut[name] = (min(rows), max(rows))
    return names, cut, tuple(left_out)
