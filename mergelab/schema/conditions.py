"""Conditions under which settings of several sections have no effect."""

from __future__ import annotations

from mergelab.schema.fields import NoEffect

MIXTURE = "moe"
"""The method that puts experts side by side instead of merging them."""
FILE_METHODS = ("mergekit", "mergekit_moe")
"""Methods that take models and parameters from a YAML file of mergekit's."""

DECIDED_BY_FILE = NoEffect(
    "with method=mergekit or mergekit_moe, whose file decides it",
    lambda run: run.method.name in FILE_METHODS,
    typed=True,
)

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
