"""One engine, two ways: our own kernels straight to disk, or mergekit's planner and executor.

Which of them runs is decided by preflight (`preflight.engine_selection`) and stands in the plan.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mergelab.core import dtypes
from mergelab.core.errors import StepError
from mergelab.merging import model_files, streaming_engine
from mergelab.merging.resume import MergeInterrupted
from mergelab.methods import registry
from mergelab.models import checkpoint
from mergelab.recipes import tensor_plan
from mergelab.schema import Run

log = logging.getLogger(__name__)


def prepare(
    run: Run, recipe: Mapping[str, Any], models: Mapping[str, tuple[str, Path]]
) -> streaming_engine.Merge:
    """The merge that our own kernels will do.

    Args:
        recipe: as preflight wrote it.
        models: name and folder of each model, by its reference in the recipe.
    """
    facts = {ref: checkpoint.weights(folder) for ref, (_, folder) in models.items()}
    outputs = tensor_plan.assemble(recipe, facts, registry.get(recipe["merge_method"]))
    return streaming_engine.plan(
        recipe["merge_method"],
        outputs,
        {ref: name for ref, (name, _) in models.items()},
        seed=run.seed,
        rescale=run.method.rescale,
        dtype=arithmetic(recipe, next(iter(facts.values())).dtype),
        hardware=run.hardware,
    )


def merge(
    merge: streaming_engine.Merge,
    recipe: Mapping[str, Any],
    out: Path,
    run: Run,
    config_source: Path,
    progress: streaming_engine.Progress,
) -> int:
    """Write a model folder with our own kernels; resumes an interrupted merge.

    Args:
        config_source: the folder of the model whose config and tokenizer the output gets.
    Returns:
        bytes that were there already.
    Raises:
        StepError: when it fails, with the reason; MergeInterrupted where it can be resumed later.
    """
    try:
        there = streaming_engine.run(merge, out, hardware=run.hardware, progress=progress)
        model_files.write_config(config_source, out, {}, {})
        model_files.copy_generation_config(config_source, out, {})
        model_files.copy_tokenizer(config_source, out, template(recipe))
    except streaming_engine.MergeError as e:
        raise StepError(f"the merge failed at {e}") from e
    except torch.OutOfMemoryError as e:
        remedy = "Lower hardware.memory and run the command again: it resumes where it stopped."
        raise MergeInterrupted(f"the merge failed: {str(e).splitlines()[0]}\n{remedy}") from e
    except OSError as e:
        log.exception("the merge failed")
        raise MergeInterrupted(f"the merge failed: {e.strerror or e}: {e.filename or out}") from e
    return there


def arithmetic(recipe: Mapping[str, Any], files: str | None) -> str:
    """The dtype that our kernels compute a recipe in, as torch calls it; `files` is that of its inputs."""
    computed = tensor_plan.arithmetic(recipe, files)
    return computed if computed in dtypes.COMPUTABLE else dtypes.COMPUTABLE[0]


def template(recipe: Mapping[str, Any]) -> str | None:
    """The chat template that a recipe asks for, as mergekit finds it; None to keep the config_source's."""
    if not recipe.get("chat_template"):
        return None
    from mergelab.merging.mergekit_backend import chat_template, ordered

    return chat_template(ordered(recipe))
