"""Parameters against what the merge method declares, and against the ranges where it makes sense.

mergekit checks neither: an unknown name is ignored, a density of 5 is taken, weights that cancel
under normalization give a model of NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergelab.errors import did_you_mean
from mergelab.preflight.findings import Finding, error
from mergelab.preflight.layout import Assignment
from mergelab.recipe import filters, scalars, value_at


@dataclass(frozen=True)
class Parameter:
    """One parameter as the method declares it."""

    name: str
    kind: type
    per_model: bool
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

NORMALIZERS = {"nuslerp": None, "multislerp": "normalize_weights"}
"""Methods that divide by the sum of the weights, and the switch for it where it is not
`normalize`; None: always."""

DISREGARDED = {("task_arithmetic", "density")}
"""Parameters that a method declares and does not use."""

CONDITION = 1e6
"""Largest sum of |weight| over |sum of weights| at which dividing by that sum is still arithmetic
and not noise."""

TWO_EXPERTS = "Choose a pair such as experts=math_physics, or leave one out with '~experts.ROLE'."


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


def check_inputs(d: Declaration, inputs: Sequence[str], base: str | None, place: str) -> list[Finding]:
    """How many models the method takes, and whether it wants one of them as base."""
    out = []
    twice = sorted({m for m in inputs if list(inputs).count(m) > 1})
    if twice:
        out.append(error("duplicate", place, f"{', '.join(twice)} takes part twice"))
    if d.base == "required" and base is None:
        out.append(error("no-base", place, f"{d.name} needs a base model", "Set method.base=model."))
    others = [m for m in inputs if m != base]
    total = len(others) + (base is not None and d.base != "ignored")
    count = total if d.base != "ignored" else len(inputs)
    what = "models, the base among them" if base is not None and d.base != "ignored" else "models"
    for n, low, high, noun in (
        (count, d.min_inputs, d.max_inputs, what),
        (len(others), d.min_non_base, d.max_non_base, "models besides the base"),
    ):
        if n < low or (high is not None and n > high):
            want = f"exactly {low}" if low == high else f"at least {low}" if n < low else f"at most {high}"
            remedy = TWO_EXPERTS if high == 2 else "experts=single_math has one." if high == 1 else ""
            out.append(error("inputs", place, f"{d.name} takes {want} {noun}; here are {n}", remedy))
    return out


def check_parameters(
    d: Declaration,
    given: Sequence[Assignment],
    models: Sequence[str],
    base: str | None,
    tensors: Sequence[tuple[str, float]],
) -> list[Finding]:
    """Names, types, ranges, filters, and what the parameters of one tensor come to together.

    Args:
        d: the method.
        given: what was set, and under which key.
        models: the references of the models that take part, in order.
        base: the reference that mergekit gets as base_model.
        tensors: (name, t) of every tensor of the output; empty where it cannot be known.
    """
    out: list[Finding] = []
    for a in given:
        p = d.parameters.get(a.parameter)
        if p is None:
            out.append(_unknown(d, a))
            continue
        if a.model is not None and not p.per_model:
            out.append(
                error(
                    "scope",
                    a.key,
                    f"{d.name} takes {p.name} once for the merge, not for each model",
                    f"Set method.parameters.{p.name}.",
                )
            )
            continue
        out += _check_values(d, p, a)
        out += _check_filters(a, [n for n, _ in tensors])
    if not out:
        out += _check_together(d, given, models, base, tensors)
    return out


def _unknown(d: Declaration, a: Assignment) -> Finding:
    names = sorted(d.parameters)
    takes = f"It takes {', '.join(names)}." if names else "It takes none."
    return error(
        "unknown-parameter",
        a.key,
        f"{d.name} has no parameter '{a.parameter}'.{did_you_mean(a.parameter, names)}",
        takes,
    )


def takes(d: Declaration) -> set[str]:
    """The parameters that make a difference."""
    return {p for p in d.parameters if (d.name, p) not in DISREGARDED}


def _check_values(d: Declaration, p: Parameter, a: Assignment) -> Iterator[Finding]:
    allowed = RANGES.get((d.name, p.name), RANGES.get((None, p.name), FINITE))
    for x in scalars(a.value):
        if p.kind is bool:
            if not isinstance(x, bool):
                yield error("type", a.key, f"{x!r} is no boolean; give true or false")
            continue
        number = _number(x)
        if number is None or (p.kind is int and number != int(number)):
            noun = "a whole number" if p.kind is int else "a number"
            yield error("type", a.key, f"{x!r} is not {noun}")
        elif number not in allowed:
            yield error("range", a.key, f"{number:g} is out of range; {p.name} must be {allowed}")


def _number(x: Any) -> float | None:
    """A number, also one that YAML read as text, as it does with 1e-5."""
    if isinstance(x, bool):
        return None
    try:
        return float(x)
    except (TypeError, ValueError):
        return None


def _check_filters(a: Assignment, names: Sequence[str]) -> Iterator[Finding]:
    if not names:
        return
    for f in filters(a.value):
        if f is not None and not any(f in n for n in names):
            parts = sorted({part for n in names for part in n.split(".") if not part.isdigit()})
            yield error(
                "filter",
                a.key,
                f"the filter '{f}' is part of no tensor's name.{did_you_mean(f, parts)}",
                f"Parts of names here: {', '.join(parts)}.",
            )


def _check_together(
    d: Declaration,
    given: Sequence[Assignment],
    models: Sequence[str],
    base: str | None,
    tensors: Sequence[tuple[str, float]],
) -> list[Finding]:
    """What only shows once every setting is resolved for one tensor; each kind is told once."""
    by: dict[tuple[str | None, str], list[Assignment]] = {}
    for a in given:
        by.setdefault((a.model, a.parameter), []).append(a)

    def resolve(model: str | None, name: str, tensor: str, t: float) -> tuple[Any, str]:
        for a in by.get((model, name), []) + (by.get((None, name), []) if model else []):
            value = value_at(a.value, tensor, t)
            if value is not None:
                return value, a.key
        return d.parameters[name].default, f"method.parameters.{name}"

    voting = [m for m in models if m != base or d.base == "ignored"]
    findings: dict[tuple[str, str], Finding] = {}

    def tell(f: Finding) -> None:
        findings.setdefault((f.code, f.place), f)

    for tensor, t in tensors or [("", 0.0)]:
        for p in d.parameters.values():
            if not p.required or (not tensors and any(filters(a.value) for a in given)):
                continue
            for m in voting if p.per_model else [None]:
                value, _ = resolve(m, p.name, tensor, t)
                if value is None:
                    where = next((a.key for a in by.get((m, p.name), [])), f"method.parameters.{p.name}")
                    tell(
                        error(
                            "uncovered",
                            where,
                            f"{d.name} needs {p.name}, and nothing sets it for "
                            f"{m + ': ' if m else ''}{tensor or 'every tensor'}",
                            'Add "*" as the last filter, or set a number.',
                        )
                    )
        if findings:
            continue
        if "weight" in d.parameters and voting:
            switch = NORMALIZERS.get(d.name, "normalize")
            if switch is None or (switch in d.parameters and resolve(None, switch, tensor, t)[0]):
                total = sum(float(resolve(m, "weight", tensor, t)[0]) for m in voting)
                size = sum(abs(float(resolve(m, "weight", tensor, t)[0])) for m in voting)
                if abs(total) * CONDITION <= size:
                    tell(
                        error(
                            "zero-sum",
                            resolve(voting[0], "weight", tensor, t)[1],
                            f"the weights sum to 0{f' at {tensor}' if tensor else ''}, and {d.name} "
                            "divides by their sum",
                            "Change a weight"
                            + (f", or set method.parameters.{switch}=false." if switch else "."),
                        )
                    )
        if {"density", "gamma"} <= set(d.parameters):
            for m in voting:
                density, key = resolve(m, "density", tensor, t)
                gamma, key2 = resolve(m, "gamma", tensor, t)
                if density < 1 and float(density) + float(gamma) > 1:
                    tell(
                        error(
                            "range",
                            key,
                            f"density {density:g} and gamma {gamma:g} ask for more than "
                            "there is; together they must be at most 1",
                            f"Lower one ({key2}).",
                        )
                    )
        if {"density", "epsilon"} <= set(d.parameters):
            for m in voting:
                density, key = resolve(m, "density", tensor, t)
                epsilon, key2 = resolve(m, "epsilon", tensor, t)
                low, high = float(density) - float(epsilon), float(density) + float(epsilon)
                if float(density) < 1 and (low <= 0 or high >= 1):
                    tell(
                        error(
                            "epsilon",
                            key,
                            f"{d.name} keeps entries with probabilities from density - "
                            f"epsilon to density + epsilon; {density:g} ± {epsilon:g} leaves (0, 1)",
                            f"Lower epsilon ({key2}) or move density away from 0 and 1.",
                        )
                    )
    return list(findings.values())
