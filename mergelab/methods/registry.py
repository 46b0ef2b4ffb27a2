"""The merge methods of mergekit: what each declares, how many models it takes, and the ranges of its
parameters, which mergekit does not know."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mergelab.core.errors import did_you_mean
from mergelab.core.findings import Finding, error


@dataclass(frozen=True)
class Parameter:
    """One parameter as the method declares it."""

    name: str
    kind: type
    per_model: bool
    on_base: bool
    """Taken for the base model as well, not only for the others."""
    required: bool
    default: Any


@dataclass(frozen=True)
class Declaration:
    """What mergekit says of a merge method."""

    name: str
    parameters: Mapping[str, Parameter]
    base: str
    """`required`, `optional`, `forbidden` or `ignored`."""
    min_inputs: int
    max_inputs: int | None
    min_non_base: int
    max_non_base: int | None


def declarations() -> dict[str, Declaration]:
    """Every merge method that the installed mergekit has, by name (imports torch)."""
    from typing import get_args

    from mergekit.merge_methods import registered_methods
    from mergekit.merge_methods.base import ParameterScope

    out = {}
    for method in registered_methods():
        spec, contract = method.spec, method.spec.contract
        parameters = {}
        for p in spec.parameters:
            kind = next((t for t in get_args(p.value_type) if t is not type(None)), p.value_type)
            parameters[p.name] = Parameter(
                p.name,
                kind,
                p.scope != ParameterScope.SHARED,
                p.scope == ParameterScope.INPUT,
                p.required,
                None if p.required else p.default,
            )
        out[spec.name] = Declaration(
            spec.name,
            parameters,
            contract.base.value,
            contract.min_inputs,
            contract.max_inputs,
            contract.min_non_base or 0,
            contract.max_non_base,
        )
    return out


@dataclass(frozen=True)
class Range:
    """The numbers that a parameter may take."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, x: float) -> bool:
        above = x > self.low if self.open_low else x >= self.low
        below = x < self.high if self.open_high else x <= self.high
        return math.isfinite(x) and above and below

    def __str__(self) -> str:
        if math.isinf(self.low) and math.isinf(self.high):
            return "a finite number"
        if math.isinf(self.high):
            return f"{'above' if self.open_low else 'at least'} {self.low:g}"
        left, right = "(["[not self.open_low], ")]"[not self.open_high]
        return f"in {left}{self.low:g}, {self.high:g}{right}"


FINITE = Range()
POSITIVE = Range(0, open_low=True)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1, open_low=True)

RANGES: dict[tuple[str | None, str], Range] = {
    (None, "density"): SHARE,
    (None, "t"): Range(0, 1),
    (None, "select_topk"): SHARE,
    (None, "gamma"): Range(0, 1, open_high=True),
    (None, "epsilon"): Range(0, 1, open_high=True),
    (None, "eps"): POSITIVE,
    (None, "tol"): POSITIVE,
    (None, "max_iter"): Range(1),
    (None, "r"): NOT_NEGATIVE,
    (None, "alpha"): NOT_NEGATIVE,
    ("nearswap", "t"): POSITIVE,
    ("ramplus_tl", "epsilon"): POSITIVE,
}
"""By (method, parameter), with None for every method; any other number must be finite."""

DISREGARDED = {("task_arithmetic", "density")}
"""Parameters that a method declares and does not use."""


def check_name(name: str, known: Iterable[str], place: str) -> list[Finding]:
    """That mergekit has the method."""
    choices = sorted(known)
    if name in choices:
        return []
    return [
        error(
            "unknown-method",
            place,
            f"'{name}' is no merge method.{did_you_mean(name, choices)}",
            f"mergekit has {', '.join(choices)}.",
        )
    ]


def takes(d: Declaration) -> set[str]:
    """The parameters that make a difference."""
    return {p for p in d.parameters if (d.name, p) not in DISREGARDED}
