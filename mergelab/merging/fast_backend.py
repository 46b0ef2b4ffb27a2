"""One engine, two ways: our own kernels straight to disk, or mergekit's planner and executor.

Which of them runs is decided by preflight (`preflight.engine_selection`) and stands in the plan.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mergelab.core.errors import StepError, first_line
from mergelab.merging import model_files, prepared_merge, streaming_engine
from mergelab.merging.resume import MergeInterrupted
from mergelab.models import checkpoint, ties
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
    names = {ref: name for ref, (name, _) in models.items()}
    return prepared_merge.prepare(run, recipe, facts, names).to_disk()


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
        written = [o.name for o in merge.outputs]
        model_files.write_config(
            config_source, out, ties.changes(checkpoint.weights(config_source), written), {}
        )
        model_files.copy_generation_config(config_source, out, {})
        model_files.copy_companions(config_source, out, prepared_merge.chat_template(recipe))
    except streaming_engine.MergeError as e:
        raise StepError(f"the merge failed at {e}") from e
    except torch.OutOfMemoryError as e:
        remedy = "Lower hardware.memory and run the command again: it resumes where it stopped."
        raise MergeInterrupted(f"the merge failed: {first_line(e)}\n{remedy}") from e
    except OSError as e:
        log.exception("the merge failed")
        remedy = "The same command resumes it where it stopped."
        raise MergeInterrupted(f"the merge failed: {e.strerror or e}: {e.filename or out}\n{remedy}") from e
    return there
