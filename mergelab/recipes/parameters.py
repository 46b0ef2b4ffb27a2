"""Parameters against what the merge method declares, and what those of one tensor come to together.

mergekit checks neither: an unknown name is ignored, a density of 5 is taken, weights that cancel
under normalization give a model of NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergelab.core.errors import closest, did_you_mean, none_of
from mergelab.core.findings import MAY_PASS, Finding, error, warning
from mergelab.methods.declared import NUMBERS, Parameter
from mergelab.methods.registry import MethodInfo
from mergelab.methods.traits import ALWAYS, HALVES, TASK_VECTORS
from mergelab.recipes.recipe import filters, scalars, value_at
from mergelab.recipes.recipe_groups import Assignment, Group, KeyOf

CONDITION = 1e6
"""Largest sum of |weight| over |sum of weights| at which dividing by that sum is still arithmetic
and not noise."""

HALVED_BELOW = 1e-6
"""The sum of weights below which nuslerp takes halves; mergekit's bound."""

Tensor = tuple[str, float]
"""The name of a tensor of the output, and its layer's place from 0 to 1."""


def check_parameters(
    d: MethodInfo,
    g: Group,
    tensors: Sequence[Tensor],
    place: KeyOf,
    tied: Mapping[str, str] = {},
    *,
    everywhere: Sequence[str] = (),
    of_file: bool = False,
) -> list[Finding]:
    """Names, types, ranges and filters of every setting; if these are right, what they come to.

    Args:
        d: the method.
        g: the models that take part, and what was set under which key.
        tensors: those of the output that these models make; empty where it cannot be known.
        place: from a path into the recipe to the key that the user knows.
        tied: names of tensors that are made under another name, with that name.
        everywhere: names of the output's tensors, where a setting for all groups may find its own.
        of_file: whether they stand in a file of mergekit's; what it ignores is then a warning.
    """
    out: list[Finding] = []
    names = [n for n, _ in tensors]
    for a in g.given:
        p = d.parameters.get(a.parameter)
        if p is None:
            out.append(_unknown(d, a))
        elif a.model is not None and not p.per_model:
            message = f"{d.name} takes {p.name} once for the merge, not for each model"
            out.append(error("scope", a.key, message, f"Set {place(('parameters', p.name))}."))
        else:
            out += _check_values(d, p, a)
            out += _check_filters(a, names if a.model else [*names, *everywhere], tied, of_file=of_file)
    if any(f.severity == "error" and f.code not in MAY_PASS for f in out):
        return out
    told = [f.place for f in out if f.severity == "error"]
    together = _check_together(Settings(d, g, place), tensors, of_file=of_file)
    # What follows from a value that is wrong by itself is not told again.
    return [*out, *(f for f in together if not any(key in f.place + f.remedy for key in told))]


def _unknown(d: MethodInfo, a: Assignment) -> Finding:
    names = sorted(d.parameters)
    takes = f"It takes {', '.join(names)}." if names else "It takes none."
    message = f"{d.name} has no parameter '{a.parameter}'.{did_you_mean(a.parameter, names)}"
    return error("unknown-parameter", a.key, message, takes)


def _check_values(d: MethodInfo, p: Parameter, a: Assignment) -> Iterator[Finding]:
    values = list(scalars(a.value))
    found = [f for x in values for f in _check_value(p, x, a.key)]
    if p.kind is int and len(set(values)) > 1:
        found.append(error("type", a.key, f"{a.value} is not one whole number; {p.name} takes no gradient"))
    yield from found
    if p.validate is None or found:
        return
    for x in values:
        try:
            p.validate(x)
        except ValueError as e:
            yield error("type", a.key, f"{x!r} is not a value of {p.name}: {_reason(e)}")


def _check_value(p: Parameter, x: Any, key: str) -> Iterator[Finding]:
    """What is wrong with one value as far as the type is one of YAML's."""
    if p.choices:
        if x not in p.choices:
            yield error("type", key, none_of(x, [*map(str, p.choices)]))
    elif p.kind is bool:
        if not isinstance(x, bool):
            yield error("type", key, f"{x!r} is not a boolean; give true or false")
    elif p.kind in NUMBERS:
        if isinstance(x, (bool, str)):
            yield error("type", key, f"{x!r} is not a number")
        elif x not in p.allowed:
            yield error("range", key, f"{x:g} is out of range; {p.name} must be {p.allowed}")
        elif p.kind is int and x != int(x):
            yield error("type", key, f"{x:g} is not a whole number")


def _reason(e: ValueError) -> str:
    """pydantic's reason, without its own heading."""
    errors = getattr(e, "errors", None)
    return str(errors()[0]["msg"]) if errors else str(e)


def _check_filters(
    a: Assignment, names: Sequence[str], tied: Mapping[str, str], *, of_file: bool
) -> Iterator[Finding]:
    for f in filters(a.value):
        if f is None or not names or any(f in n for n in names):
            continue
        if second := next((n for n in tied if f in n), None):
            yield warning(
                "tied-filter",
                a.key,
                f"the filter '{f}' has no effect: {second} is tied to {tied[second]}",
                f"Name {tied[second]}, or leave the filter out.",
            )
        else:
            parts = sorted({part for n in names for part in n.split(".") if not part.isdigit()})
            message = f"the filter '{f}' is part of no tensor's name.{did_you_mean(f, parts)}"
            here = f"Parts of names here: {', '.join(parts)}."
            words = [w for w in f.split(".") if w and not w.isdigit()]
            if of_file and (all(w in parts for w in words) or closest(f, parts) is None):
                yield warning("no-effect", a.key, f"no effect: {message}", here)
            else:
                yield error("filter", a.key, message, here)


@dataclass(frozen=True)
class Settings:
    """What every parameter of a group of models comes to."""

    d: MethodInfo
    g: Group
    place: KeyOf

    def models(self, name: str) -> list[str | None]:
        """The models for which a parameter is looked up; [None] for one of the whole merge."""
        p = self.d.parameters[name]
        if not p.per_model:
            return [None]
        return [m for m in self.g.inputs if p.on_base or self.d.inputs.base == "ignored" or m != self.g.base]

    def at(self, model: str | None, name: str, tensor: Tensor) -> tuple[Any, str]:
        """A parameter's value at a tensor, as mergekit resolves it, and the key that sets it."""
        own = [a for a in self.g.given if a.parameter == name and a.model == model]
        shared = [a for a in self.g.given if a.parameter == name and a.model is None]
        for a in own if model is None else own + shared:
            value = value_at(a.value, *tensor)
            if value is not None:
                return value, a.key
        key = next((a.key for a in own), self.place(("parameters", name)))
        return self.d.parameters[name].default, key

    def each(self, name: str, tensor: Tensor) -> list[tuple[float, str]]:
        """`at` of every model."""
        found = (self.at(m, name, tensor) for m in self.models(name))
        return [(float(value), key) for value, key in found]


def _check_together(s: Settings, tensors: Sequence[Tensor], *, of_file: bool) -> list[Finding]:
    """What only shows once every setting is resolved for one tensor; each kind is reported once."""
    filtered = any(filters(a.value) for a in s.g.given)
    if filtered and not tensors:
        return []
    found: dict[tuple[str, str], Finding] = {}
    for tensor in tensors or [("", 0.0)]:
        wrong = list(_uncovered(s, tensor)) or [
            *_zero_sum(s, tensor, of_file=of_file), *_unsatisfied(s, tensor)
        ]  # fmt: skip
        for f in wrong:
            found.setdefault((f.code, f.place), f)
    return list(found.values())


def _uncovered(s: Settings, tensor: Tensor) -> Iterator[Finding]:
    for p in s.d.parameters.values():
        for m in s.models(p.name) if p.required else []:
            value, key = s.at(m, p.name, tensor)
            if value is None:
                whom = f" of {m}" if m is not None and key == s.place(("parameters", p.name)) else ""
                yield error(
                    "uncovered",
                    key,
                    f"{s.d.name} needs {p.name}, and nothing sets it for {tensor[0] or 'every tensor'}{whom}",
                    'Add "*" as the last filter, or set a number.',
                )


def _zero_sum(s: Settings, tensor: Tensor, *, of_file: bool) -> Iterator[Finding]:
    switch = s.d.traits.divides_by
    if switch is None or (switch not in (ALWAYS, HALVES) and not s.at(None, switch, tensor)[0]):
        return
    weights = s.each("weight", tensor)
    total, size = sum(w for w, _ in weights), sum(abs(w) for w, _ in weights)
    if switch == HALVES:
        if abs(total) < HALVED_BELOW:
            keys = ", ".join(dict.fromkeys(key for _, key in weights))
            message = f"the weights sum to 0, for which {s.d.name} takes halves: t = 0.5"
            yield warning("zero-sum", keys, message)
        return
    keeps_base = s.d.traits.kernel == TASK_VECTORS  # and mergekit does not divide by a sum of 0 there
    if keeps_base and size == 0 and of_file:
        return
    if weights and abs(total) * CONDITION <= size:
        shown = ", ".join(f"{w:g}" for w, _ in weights)
        keys = ", ".join(dict.fromkeys(key for _, key in weights))
        message = f"the weights {shown} sum to 0{f' at {tensor[0]}' if tensor[0] else ''}, and {s.d.name} "
        if keeps_base and total == 0 and of_file:
            yield warning("zero-sum", keys, f"{message}then does not divide by their sum")
            return
        yield error(
            "zero-sum",
            keys,
            f"{message}divides by their sum",
            "Change a weight"
            + ("." if switch == ALWAYS else f", or set {s.place(('parameters', switch))}=false."),
        )


def _unsatisfied(s: Settings, tensor: Tensor) -> Iterator[Finding]:
    """The method's constraints on two parameters of one model."""
    for c in s.d.traits.constraints:
        one, other = (s.each(p, tensor) for p in c.parameters)
        for (x, key), (y, key2) in zip(one, other, strict=True):
            if not c.holds(x, y):
                message = c.message.format(x, y, method=s.d.name)
                yield error(c.code, key, message, c.remedy.format(key=key2))
