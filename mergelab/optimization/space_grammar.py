"""Ranges in the grammar of Hydra's Nevergrad sweeper, and Nevergrad's parameters for them.

Besides `sweeper` the only module of the search that knows Hydra.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergelab.core.errors import InputError, first_line
from mergelab.optimization.gene import Gene


def read(key: str, spec: Any) -> Gene:
    """The gene of a key.

    Args:
        key: of the override.
        spec: `interval(0, 1)` and so on, a list of choices, or a mapping with lower, upper, log, integer.
    Raises:
        InputError: where it is not a range.
    """
    if isinstance(spec, Mapping):
        return _of_mapping(key, spec)
    if isinstance(spec, (list, tuple)):
        return Gene(key, f"choice({', '.join(map(str, spec))})", choices=tuple(spec))
    return _of_text(key, str(spec))


def _of_mapping(key: str, spec: Mapping[str, Any]) -> Gene:
    known = ("lower", "upper", "log", "integer")
    unknown = [str(k) for k in spec if k not in known]
    if unknown:
        raise InputError(f"search.space.{key}: a range has no '{unknown[0]}'; it has {', '.join(known)}")
    try:
        low, high = float(spec["lower"]), float(spec["upper"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"search.space.{key}: a range needs the numbers lower and upper") from None
    log, whole = bool(spec.get("log")), bool(spec.get("integer"))
    return _checked(Gene(key, f"interval({low:g}, {high:g})", low, high, log=log, whole=whole))


def _of_text(key: str, text: str) -> Gene:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob, IntervalSweep
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    try:
        override = parser.parse_override(f"key={text}")
    except HydraException as e:
        raise InputError(f"search.space.{key}: '{text}' is not a range: {first_line(e)}") from None
    value = override.value()
    if isinstance(value, IntervalSweep):
        assert value.start is not None and value.end is not None
        whole = isinstance(value.start, int)
        return _checked(Gene(key, text, value.start, value.end, log="log" in value.tags, whole=whole))
    if not override.is_sweep_override() or isinstance(value, Glob):
        raise InputError(
            f"search.space.{key}: '{text}' is not a range\n"
            "Write interval(0, 1.5), choice(a, b), range(1, 5), tag(log, interval(1e-4, 1))."
        )
    choices = tuple(parser.parse_override(f"key={c}").value() for c in _choices(override))
    ordered = "ordered" in getattr(value, "tags", ())
    return Gene(key, text, choices=choices, ordered=ordered)


def _choices(override: Any) -> list[str]:
    from hydra.core.override_parser.types import Transformer

    return [str(c) for c in override.sweep_iterator(transformer=Transformer.encode)]


def _checked(gene: Gene) -> Gene:
    assert gene.low is not None and gene.high is not None
    if not gene.low < gene.high:
        raise InputError(f"search.space.{gene.key}: {gene.text} is empty; the lower bound comes first")
    if gene.log and gene.low <= 0:
        raise InputError(
            f"search.space.{gene.key}: {gene.text} is logarithmic; its lower bound has to be above 0"
        )
    return gene


def parameter(gene: Gene, start: Any, sigma: float) -> Any:
    """Nevergrad's parameter for a gene, made by the code of Hydra's Nevergrad sweeper.

    Args:
        gene: what is searched.
        start: the value at which it starts.
        sigma: size of the first steps, as a share of the range.
    """
    from hydra_plugins.hydra_nevergrad_sweeper._impl import create_nevergrad_param_from_config

    if gene.choices:
        import nevergrad as ng

        kind = ng.p.TransitionChoice if gene.ordered else ng.p.Choice
        made = (
            kind(list(gene.choices))
            if gene.ordered
            else create_nevergrad_param_from_config(list(gene.choices))
        )
    else:
        spec = {"lower": gene.low, "upper": gene.high, "log": gene.log, "integer": gene.whole}
        made = create_nevergrad_param_from_config(spec)
        if not gene.log:
            assert gene.low is not None and gene.high is not None
            made.set_mutation(sigma=sigma * (gene.high - gene.low))
    made.value = start
    return made
