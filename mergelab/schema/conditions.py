"""Conditions under which settings of several sections have no effect."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING

from mergelab.schema.fields import NoEffect

if TYPE_CHECKING:
    from mergelab.schema.run import Run

MIXTURE = "moe"
"""The method that puts experts side by side instead of merging them."""
FILE_METHODS = ("mergekit", "mergekit_moe")
"""Methods that take models and parameters from a YAML file of mergekit's."""

DECIDED_BY_FILE = NoEffect(
    "with method=mergekit or mergekit_moe, whose file decides it",
    lambda run: run.method.name in FILE_METHODS,
    typed=True,
)


def file_of(run: Run) -> str | None:
    """The name of the file that a run takes its models from, by which it is called; the family that is
    composed beside it is only the default."""
    if run.method.name not in FILE_METHODS or not run.method.path:
        return None
    return PurePath(run.method.path).name


WITHOUT_CLUSTER = NoEffect(
    "without a cluster", lambda run: not run.hardware.on_cluster, "Set hardware=slurm."
)


def of_mixture(because: str, *, typed: bool = False) -> NoEffect:
    """The condition that experts are put side by side.

    Args:
        because: what then makes the setting needless, beginning with `which`.
        typed: see `NoEffect`.
    """
    return NoEffect(
        f"with method={MIXTURE}, {because}",
        lambda run: run.method.name == MIXTURE,
        code="unused",
        typed=typed,
    )
