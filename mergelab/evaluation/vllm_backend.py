"""A model in vLLM, through lm_eval's own adapter. Import it late."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mergelab.core.errors import StepError, summary
from mergelab.evaluation.isolation import silence_lm_eval
from mergelab.schema import Hardware


@contextmanager
def engine(
    path: Path, hardware: Hardware, *, max_length: int | None, seed: int, trust_remote_code: bool
) -> Iterator[Any]:
    """The model in a folder as a language model of lm_eval, on `hardware.devices` GPUs at once.

    vLLM allocates nine tenths of their memory, and needs it free again for the next model. So there is one
    engine at a time, which is shut down when the body ends. vLLM chooses its batches itself.

    Raises:
        StepError: where vLLM cannot load the model.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its processes print to the terminal
    from lm_eval.models.vllm_causallms import VLLM

    from mergelab.evaluation.lm_eval_adapter import Counting

    class CountingVLLM(Counting, VLLM):  # type: ignore[misc]
        unread = 2  # it has to generate one token, and a window begins with one

    _free()
    try:
        with silence_lm_eval():
            lm = CountingVLLM(
                pretrained=str(path.resolve()),
                dtype="auto",
                tensor_parallel_size=hardware.devices or torch.cuda.device_count(),
                max_model_len=max_length,
                batch_size="auto",
                quantization=None if hardware.quantize == "none" else "bitsandbytes",
                seed=seed,
                trust_remote_code=trust_remote_code,
            )
    except Exception as e:  # of vLLM, and of the processes that it starts
        _free()
        memory = any(words in str(e).lower() for words in ("out of memory", "kv cache", "max_model_len"))
        remedy = "; lower eval.max_length, or raise hardware.devices" if memory else ""
        raise StepError(f"{path} cannot be loaded by vLLM: {summary(e)}{remedy}") from e
    try:
        yield lm
    finally:
        shutdown = getattr(getattr(lm.model.llm_engine, "engine_core", None), "shutdown", None)
        if shutdown is not None:  # the engine is a process of its own
            shutdown()
        lm.model = shutdown = None
        _free()


def _free() -> None:
    """Free unused GPU memory and vLLM's process groups."""
    from vllm.distributed import cleanup_dist_env_and_memory  # type: ignore[import-not-found, unused-ignore]

    cleanup_dist_env_and_memory()
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
