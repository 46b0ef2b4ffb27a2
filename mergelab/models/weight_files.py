"""Which file of a model's folder holds its weights: for mergekit, and for transformers.

Both take the first name of a list, and the lists differ: of a single file and an index, mergekit reads what
the index names, and transformers the single file. Where a folder has both, the model that is measured would
not be the one that was merged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergelab.core.findings import Finding, error
from mergelab.core.run_dir import read_memo
from mergelab.models import pickles

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

MERGED = (INDEX, SINGLE)
LOADED = (SINGLE, INDEX)
"""The names by precedence: what mergekit reads, and what transformers loads."""

MERGED_PICKLED = (pickles.INDEX, pickles.SINGLE)
LOADED_PICKLED = (pickles.SINGLE, pickles.INDEX)
"""The same for pickled weights, which both read only where there are none in safetensors."""

DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Parts of a distributed checkpoint, which transformers prefers to everything else."""


def merged(folder: Path, *, pickled: bool) -> Path | None:
    """The file, or the index of several, that mergekit reads; None if there is none."""
    return _first(folder, (*MERGED, *(MERGED_PICKLED if pickled else ())))


def loaded(folder: Path, config: Mapping[str, Any]) -> Path | None:
    """The file, or the index of several, that transformers loads; None if there is none."""
    named = config.get("transformers_weights")
    if isinstance(named, str):
        return folder / named
    parts = [p for p in sorted(folder.iterdir()) if DISTRIBUTED.fullmatch(p.name)]
    return parts[0] if parts else _first(folder, (*LOADED, *LOADED_PICKLED))


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / n for n in names if (folder / n).exists()), None)


def check(folder: Path, config: Mapping[str, Any], key: str) -> Iterator[Finding]:
    """Check that mergekit and transformers read the same weights.

    Args:
        folder: The model.
        config: The content of its config.json.
        key: The model's key in the configuration.
    """
    ours, theirs = merged(folder, pickled=True), loaded(folder, config)
    if ours is None or theirs is None:
        return
    if ours != theirs and not _is_one(ours, theirs):
        named = "transformers_weights" in config
        why = "names as transformers_weights" if named else "has, too"
        message = (
            f"{folder} has two sets of weights: mergekit merges those of {ours.name}, and transformers loads "
            f"and measures those of {theirs.name}, which {'config.json' if named else 'it'} {why}"
        )
        remedy = f"Move {theirs.name} elsewhere if the weights of {ours.name} are meant, else {ours.name}."
        if named:
            remedy = f"Remove transformers_weights from config.json, or rename {theirs.name} to {SINGLE}."
        yield error("stale-weights", key, message, remedy)
    if (folder / "adapter_config.json").exists():
        message = (
            f"{folder} has an adapter_config.json beside its weights: transformers adds the adapter when it "
            "loads and measures the model, mergekit does not when it merges it"
        )
        remedy = (
            "Move adapter_config.json and adapter_model.safetensors to a folder of their own. To merge the "
            "model with its adapter, name both: MODEL+ADAPTER."
        )
        yield error("stale-weights", key, message, remedy)


def _is_one(index: Path, single: Path) -> bool:
    """Whether an index names the single file alone."""
    weight_map = read_memo(index).get("weight_map")
    return isinstance(weight_map, dict) and {*weight_map.values()} == {single.name}
