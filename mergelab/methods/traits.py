"""What we know of each merge method beyond what mergekit declares: a row a method.

Everything else (names, types and defaults of parameters, whether there is a base, how many models) is
mergekit's declaration; `registry` joins the two. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mergelab.methods.ranges import (
    BELOW_ONE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITIES,
    ROOM_FOR_BOTH,
    UNIT,
    Constraint,
    Range,
)

ALWAYS = "always"
"""In the place of a switch: the method always divides by the sum of the weights."""
HALVES = "halves"
"""In the place of a switch: it does, but where they sum to 0 it takes half of each."""


@dataclass(frozen=True)
class Traits:
    """What mergekit does not declare of a method. The defaults hold for an unknown method."""

    ranges: Mapping[str, Range] = field(default_factory=dict)
    """Of the parameters that must be more than finite."""
    constraints: tuple[Constraint, ...] = ()
    unused: frozenset[str] = frozenset()
    """Parameters that it declares and does not use."""
    divides_by: str | None = None
    """The switch that makes it divide by the sum of the weights, ALWAYS or HALVES; None: it never does."""
    kernel: str | Callable[..., Any] | None = None
    """Our chunked kernel: the module of `merging.kernels` that has a function of the method's name, or a
    function. None: whole tensors go through mergekit's function."""
    exact: bool = False
    """Whether the bits are mergekit's whatever the size of a tensor. The other kernels draw masks of our
    own, or sum a large tensor in another order, or let the earlier of two equal magnitudes come first."""
    random: bool = False
    """Whether it draws random numbers."""
    buffers: int = 13
    """Chunk-sized buffers of a worker besides three for each input, at most; no kernel of ours needs more
    (della and sce come closest)."""

    @property
    def named(self) -> set[str]:
        """The parameters that it concerns."""
        switch = {self.divides_by, "weight"} - {ALWAYS, HALVES} if self.divides_by else set()
        constrained = {p for c in self.constraints for p in c.parameters}
        return {str(p) for p in {*self.ranges, *self.unused, *constrained, *switch}}


TASK_VECTORS = "task_vectors"
ON_TASK_VECTORS: dict[str, Any] = {
    "ranges": {"density": FRACTION},
    "kernel": TASK_VECTORS,
    "divides_by": "normalize",
}
BREADCRUMBS = ON_TASK_VECTORS | {
    "ranges": {"density": FRACTION, "gamma": BELOW_ONE},
    "constraints": (ROOM_FOR_BOTH,),
}
DELLA = ON_TASK_VECTORS | {
    "ranges": {"density": FRACTION, "epsilon": BELOW_ONE},
    "constraints": (PROBABILITIES,),
    "random": True,
}
WITHOUT_VOTE = frozenset(("int8_mask",))

TRAITS: dict[str, Traits] = {
    "arcee_fusion": Traits(kernel="pointwise"),
    "breadcrumbs": Traits(**BREADCRUMBS, unused=WITHOUT_VOTE),
    "breadcrumbs_ties": Traits(**BREADCRUMBS),
    "dare_linear": Traits(**ON_TASK_VECTORS, random=True, unused=WITHOUT_VOTE),
    "dare_ties": Traits(**ON_TASK_VECTORS, random=True),
    "della": Traits(**DELLA),
    "della_linear": Traits(**DELLA, unused=WITHOUT_VOTE),
    "karcher": Traits({"tol": POSITIVE, "max_iter": Range(1)}, kernel="spherical"),
    "linear": Traits(divides_by="normalize", kernel="pointwise", exact=True),
    "model_stock": Traits(kernel="pointwise"),
    "multislerp": Traits({"eps": POSITIVE}, divides_by="normalize_weights", kernel="spherical"),
    "nearswap": Traits({"t": POSITIVE}, kernel="pointwise", exact=True),
    "nuslerp": Traits(divides_by=HALVES, kernel="spherical"),
    "passthrough": Traits(kernel="pointwise", exact=True),
    "ram": Traits({"epsilon": BELOW_ONE}, kernel="pointwise"),
    "ramplus_tl": Traits({"r": NOT_NEGATIVE, "alpha": NOT_NEGATIVE, "epsilon": POSITIVE}, kernel="pointwise"),
    "sce": Traits({"select_topk": FRACTION}, kernel="pointwise"),
    "slerp": Traits({"t": UNIT}, kernel="spherical"),
    "task_arithmetic": Traits(
        **ON_TASK_VECTORS, unused=frozenset(("density", "rescale", "int8_mask")), exact=True
    ),
    "ties": Traits(**ON_TASK_VECTORS),
}
"""By the names that mergekit gives them."""
