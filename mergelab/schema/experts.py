"""Who takes part in a merge, and by which method."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from omegaconf import MISSING


@dataclass
class Expert:
    """One fine-tuned model that takes part, and how much of it.

    A weight or density is a number, a list (a gradient over the layers, first to last), or a
    mapping from a part of a tensor's name to either, with "*" for all the rest.
    """

    path: Optional[str] = None
    """Instead of the family's checkpoint of this role: a folder or hub id, `+adapter` allowed."""
    revision: Optional[str] = None
    weight: Any = 1.0
    """The merge coefficient."""
    density: Any = None
    """The fraction of the task vector that is kept, in (0, 1]; null: the method's default, 1."""
    parameters: Dict[str, Any] = field(default_factory=dict)
    """Any other parameter that the method takes for each model, such as epsilon or gamma."""
    prompts: List[str] = field(default_factory=list)
    """Prompts that shall be routed to this expert. Empty: those of the family for this role. (method=moe)"""
    negative_prompts: List[str] = field(default_factory=list)
    """Prompts that shall not. (method=moe)"""


@dataclass
class Method:
    """How the experts are combined."""

    name: str = MISSING
    """A merge method of mergekit; `moe` for a mixture of experts; `mergekit` or `mergekit_moe` for a plain
    YAML file of either kind."""
    base: str = "model"
    """Which model mergekit is given as base_model: `model` (the family's base), `first` (the
    first expert), or `none` (only for methods that can do without)."""
    parameters: Dict[str, Any] = field(default_factory=dict)
    """The method's own parameters; numbers, gradients and filters as for a weight."""
    rescale: str = "l1"
    """Where the method makes up for entries that it drops at random or by size: `l1` gives each task
    vector its sum of magnitudes back, as mergekit does; `density` divides what is kept by the
    probability of being kept, as the papers do."""
    path: Optional[str] = None
    """The YAML file that `method=mergekit` or `method=mergekit_moe` runs; model, experts and parameters
    then come from that file."""
