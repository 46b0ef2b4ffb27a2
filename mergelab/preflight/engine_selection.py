"""Which engine merges, and why: our own kernels wherever they can, mergekit's path for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mergelab.core import dtypes
from mergelab.core.findings import Finding, error, note
from mergelab.methods.registry import MethodInfo
from mergelab.models import remote_code
from mergelab.models.checkpoint import ModelMetadata
from mergelab.preflight.resolve_inputs import reads_file
from mergelab.recipes import tensor_list, tensor_plan
from mergelab.schema import Run


@dataclass(frozen=True)
class Engine:
    """What merges."""

    name: str
    """`fast`, `mergekit` or `mergekit-moe`."""
    why: str = ""
    """Why it is not the fast one."""

    def json(self) -> dict[str, str]:
        """As plan.json has it."""
        return asdict(self)


MIXTURE = Engine("mergekit-moe", "it builds a mixture of experts")
"""What puts experts side by side."""


def choose(
    run: Run,
    recipe: Mapping[str, Any],
    facts: Mapping[str, ModelMetadata],
    d: MethodInfo,
) -> tuple[Engine, list[Finding]]:
    """The engine of a run, and what is wrong with the one that was asked for.

    Args:
        recipe: a sound one.
        facts: what is known of each model, by its reference.
        d: the method.
    """
    wanted = run.hardware.engine
    reason = _reason(recipe, facts, d)
    computed = tensor_plan.arithmetic(recipe, next(iter(facts.values())).dtype if facts else None)
    unfit = next((why for f in facts.values() if (why := tensor_list.why_not_mergekit(f))), None)
    findings: list[Finding] = []
    if wanted == "mergekit":
        engine = Engine("mergekit", "hardware.engine asks for it")
    elif reason is not None:
        engine = Engine("mergekit", reason)
        if wanted == "fast":
            message = f"fast cannot do this recipe: {reason}"
            findings.append(error("engine", "hardware.engine", message, "Leave it at auto."))
    elif wanted == "auto" and computed not in dtypes.COMPUTABLE:
        engine = Engine("mergekit", f"its arithmetic is in {computed}")
    elif wanted == "auto" and reads_file(run) and not d.traits.exact and unfit is None:
        engine = Engine("mergekit", "a file gets mergekit's bits; hardware.engine=fast is faster")
    else:
        engine = Engine("fast")
    if engine.name == "mergekit" and unfit is not None and recipe.get("modules"):
        # Their names are those of mergekit's list; without them it can infer one.
        message = f"mergekit merges because {engine.why}, and cannot: {unfit}"
        remedy = "Leave it at auto." if wanted == "mergekit" and reason is None else ""
        findings.append(error("engine", "hardware.engine", message, remedy))
    if engine.name == "fast" and computed not in dtypes.COMPUTABLE:
        message = (
            f"the recipe computes in {computed}; fast computes in {dtypes.COMPUTABLE[0]} and rounds once"
        )
        findings.append(note("arithmetic", "hardware.engine", message))
    findings += _check_rescale(run, recipe, d, engine)
    return engine, findings


def _reason(recipe: Mapping[str, Any], facts: Mapping[str, ModelMetadata], d: MethodInfo) -> str | None:
    """Why our engine cannot do a recipe, or None."""
    for f in facts.values():
        if f.pickled:
            return f"the weights of {f.folder} are pickled"
        if f.folder.parts and remote_code.code(f.folder):
            return f"{f.folder} is loaded by code of its own"
    try:
        tensor_plan.assemble(recipe, facts, d)
    except tensor_plan.UnsupportedByFastEngine as e:
        return str(e)
    return None


def _check_rescale(run: Run, recipe: Mapping[str, Any], d: MethodInfo, engine: Engine) -> Iterator[Finding]:
    if run.method.rescale != "density":
        return
    p = d.parameters.get("rescale")
    on = p is not None and (recipe.get("parameters") or {}).get("rescale", p.default)
    if not on or not d.rescales:
        message = f"it has no effect because {d.name} rescales nothing here"
        remedy = "Leave it out, or set method.parameters.rescale=true." if p else "Leave it out."
        yield error("no-effect", "method.rescale", message, remedy)
    elif engine.name == "mergekit":
        message = f"mergekit, which merges because {engine.why}, only rescales by l1"
        yield error("engine", "method.rescale", message, "Leave it out.")
