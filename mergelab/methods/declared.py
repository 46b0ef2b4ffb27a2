"""What mergekit declares of a merge method: its parameters with types and bounds, and the models it takes."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from mergelab.methods.ranges import FINITE, Range

if TYPE_CHECKING:
    from mergekit.merge_methods import MergeMethod

NUMBERS = (bool, int, float)


@dataclass(frozen=True)
class Parameter:
    """One parameter as the method declares it."""

    name: str
    kind: type
    """bool, int or float; str; or object for any other type."""
    per_model: bool
    on_base: bool
    """Taken for the base model as well, not only for the others."""
    required: bool
    default: Any
    allowed: Range = FINITE
    """The numbers that it may take."""
    choices: tuple[Any, ...] = ()
    """The values that it may take, where they are listed."""
    validate: Callable[[Any], Any] | None = None
    """What else the declared type demands: raises ValueError. None: nothing."""

    def convert(self, value: Any) -> Any:
        """A value in the type that the method expects."""
        return self.kind(value) if self.kind in NUMBERS and value is not None else value


@dataclass(frozen=True)
class Inputs:
    """Which models a method takes; the names are those of mergekit's InputContract."""

    base: str
    """`required`, `optional`, `forbidden` or `ignored`."""
    min_inputs: int
    max_inputs: int | None
    min_non_base: int
    max_non_base: int | None

    def counts(self, has_base: bool) -> tuple[int, int | None]:
        """The fewest and the most models that may take part, the base among them where there is one."""
        low = max(self.min_inputs, self.min_non_base + has_base)
        others = None if self.max_non_base is None else self.max_non_base + has_base
        tops = [n for n in (self.max_inputs, others) if n]
        return low, min(tops) if tops else None

    def experts(self, base: str) -> tuple[int, int | None]:
        """The fewest and the most experts that a composed run may have, by its `method.base`."""
        low, high = self.counts(base != "none" and self.base != "ignored")
        apart = base == "model"
        return max(low - apart, 1), None if high is None else high - apart


def parameters(method: MergeMethod) -> Iterator[Parameter]:
    """The parameters of a method of mergekit's registry, in the order of its signature."""
    from mergekit.merge_methods.base import ParameterScope

    for p in method.spec.parameters:
        declared = _Type(p.value_type)
        yield Parameter(
            p.name,
            declared.kind,
            p.scope != ParameterScope.SHARED,
            p.scope == ParameterScope.INPUT,
            p.required,
            None if p.required else p.default,
            declared.range,
            declared.choices,
            p.validate if declared.demanding else None,
        )


def inputs(method: MergeMethod) -> Inputs:
    """The models that a method of mergekit's registry takes."""
    c = method.spec.contract
    return Inputs(c.base.value, c.min_inputs, c.max_inputs, c.min_non_base or 0, c.max_non_base)


class _Type:
    """An annotation such as `Annotated[float, Field(gt=0, le=1)]` or `Optional[int]`, taken apart."""

    def __init__(self, annotation: Any):
        self.range, self.choices = FINITE, ()
        bounds: list[Any] = []
        while True:
            origin, arguments = get_origin(annotation), get_args(annotation)
            if origin is Annotated:
                annotation, *metadata = arguments
                bounds += _flat(metadata)
                continue
            if origin in (Union, types.UnionType):
                several = [a for a in arguments if a is not type(None)]
                if len(several) == 1:
                    annotation = several[0]
                    continue
            break
        if origin is Literal:
            self.choices = arguments
        self.kind = annotation if annotation in (*NUMBERS, str) else object
        self.demanding = bool(bounds) or self.kind not in NUMBERS
        if self.kind in (int, float):
            self.range = _range(bounds)


def _flat(metadata: Iterable[Any]) -> Iterator[Any]:
    """Bounds, which pydantic's Field keeps in a list of its own."""
    for m in metadata:
        yield from getattr(m, "metadata", None) or [m]


def _range(bounds: Iterable[Any]) -> Range:
    low, high, open_low, open_high = FINITE.low, FINITE.high, False, False
    for b in bounds:
        for name, is_open in (("gt", True), ("ge", False)):
            if (value := getattr(b, name, None)) is not None and value >= low:
                low, open_low = float(value), is_open
        for name, is_open in (("lt", True), ("le", False)):
            if (value := getattr(b, name, None)) is not None and value <= high:
                high, open_high = float(value), is_open
    return Range(low, high, open_low, open_high)
