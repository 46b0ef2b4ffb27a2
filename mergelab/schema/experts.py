"""Who takes part in a merge, and by which method."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from omegaconf import MISSING

from mergelab.schema.conditions import DECIDED_BY_FILE, FILE_METHODS, MIXTURE, of_mixture
from mergelab.schema.fields import NoEffect, one_of, setting

RANDOM_GATES = ("random", "uniform_random")
"""Values of the parameter `gate_mode` of a mixture of experts for which no prompt is read."""

AS_IT_IS = of_mixture("which takes each expert as it is", typed=True)
RANDOM_GATE = NoEffect(
    "with a random gate, which reads no prompts",
    lambda run: run.method.name == MIXTURE and run.method.parameters.get("gate_mode") in RANDOM_GATES,
    code="unused",
    typed=True,
)


@dataclass
class Expert:
    """One fine-tuned model that takes part, and how much of it.

    A weight or density is a number, a list (a gradient over the layers, first to last), or a
    mapping from a part of a tensor's name to either, with "*" for all the rest.
    """

    path: Optional[str] = None
    """Instead of the family's checkpoint of this role: a folder or hub id, `+adapter` allowed."""
    revision: Optional[str] = None
    weight: Any = setting(1.0, no_effect=[AS_IT_IS])
    """The merge coefficient."""
    density: Any = setting(None, no_effect=[AS_IT_IS])
    """The fraction of the task vector that is kept, in (0, 1]; null: the method's default, 1."""
    parameters: Dict[str, Any] = field(default_factory=dict)
    """Any other parameter that the method takes for each model, such as epsilon or gamma."""
    prompts: List[str] = setting([], no_effect=[RANDOM_GATE])
    """Prompts to be routed to this expert. Empty: those of the family for this role. (method=moe)"""
    negative_prompts: List[str] = setting([], no_effect=[RANDOM_GATE])
    """Prompts not to be routed to this expert. (method=moe)"""


@dataclass
class Method:
    """How the experts are combined."""

    name: str = MISSING
    """A merge method of mergekit; `moe` for a mixture of experts; `mergekit` or `mergekit_moe` for a plain
    YAML file of either kind."""
    base: str = one_of(
        "model", "first", "none",
        no_effect=[DECIDED_BY_FILE, of_mixture("which is built on the family's base")],
    )  # fmt: skip
    """Which model mergekit is given as base_model: `model` (the family's base), `first` (the
    first expert), or `none` (only for methods that can do without)."""
    parameters: Dict[str, Any] = setting({}, no_effect=[DECIDED_BY_FILE])
    """The method's own parameters; numbers, gradients and filters as for a weight."""
    rescale: str = one_of("l1", "density", no_effect=[of_mixture("which drops no entries")])
    """How a method compensates for entries that it drops at random or by size. `l1` restores the sum of
    magnitudes of each task vector, as mergekit does. `density` divides what is kept by the probability of
    being kept, as the papers do."""
    path: Optional[str] = setting(
        None,
        no_effect=[
            NoEffect(
                "with method=moe; method=mergekit_moe runs a file",
                lambda run: run.method.name == MIXTURE,
                "Set method=mergekit_moe.",
            ),
            NoEffect(
                "unless method=mergekit",
                lambda run: run.method.name not in (MIXTURE, *FILE_METHODS),
                "Set method=mergekit.",
            ),
        ],
    )
    """The YAML file that `method=mergekit` or `method=mergekit_moe` runs; model, experts and parameters
    then come from that file."""
