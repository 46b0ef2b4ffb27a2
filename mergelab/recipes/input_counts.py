"""How many models a merge method takes, and whether one of them has to be the base. Pure."""

from __future__ import annotations

from mergelab.core.findings import Finding, error, warning
from mergelab.methods.registry import MethodInfo
from mergelab.recipes.recipe_groups import Group

FEWER = {
    1: "Choose experts=single_math, or leave others out with '~experts.ROLE'.",
    2: "Choose a pair such as experts=math_physics, or leave one out with '~experts.ROLE'.",
}
MORE = "Choose a larger set, such as experts=balanced."


def check_inputs(d: MethodInfo, g: Group) -> list[Finding]:
    """How many models the method takes, and whether one of them has to be the base.

    The rules are those of mergekit's InputContract.validate_ids; messages count the models that were listed.
    """
    out = []
    policy = d.inputs.base
    base = None if policy == "ignored" else g.base
    has_base = base is not None and base in g.inputs
    if base is not None and not has_base:
        out.append(error("no-base", g.place, f"{d.name} needs its base model, {base}, among the sources"))
    elif policy == "required" and not has_base:
        remedy = "Set method.base=model, or base_model in a file."
        out.append(error("no-base", g.place, f"{d.name} needs a base model", remedy))
    if policy == "ignored" and g.added:
        message = f"{d.name} has no base model, so mergekit merges {g.base} in as one more model"
        out.append(warning("base-merged", g.place, message))
    low, high = d.inputs.counts(has_base)
    n = len(g.inputs)
    if n < low or (high is not None and n > high):
        apart = int(has_base and g.added)
        want = f"exactly {low - apart}" if low == high else f"at least {low - apart}"
        if high is not None and low != high:
            want = f"{low - apart} to {high - apart}"
        noun = "model" if low == high and low - apart == 1 else "models"
        besides = " besides the base" if apart else ""
        message = (
            f"{d.name} takes {want} {noun}{besides}; here {'is' if n - apart == 1 else 'are'} {n - apart}"
        )
        remedy = FEWER.get((high or n) - apart, "") if n > low else MORE
        out.append(error("inputs", g.place, message, remedy))
    return out
