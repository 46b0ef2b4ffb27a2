"""Planning: from a Run to a Plan with models, recipe, findings and estimate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergelab import evaluation
from mergelab.core import dtypes, model_folder
from mergelab.core.findings import MAY_PASS, Finding, Severity, apply_allow, note, warning
from mergelab.core.plan_file import PlannedModel
from mergelab.methods import registry
from mergelab.models import (
    adapters,
    architecture,
    checkpoint,
    compatibility,
    hub_access,
    remote_code,
    tensor_checks,
    ties,
)
from mergelab.models.checkpoint import ModelMetadata, TensorInfo
from mergelab.models.resolver import Source, Zoo
from mergelab.preflight import (
    engine_selection,
    evaluation_checks,
    recipe_checks,
    resolve_inputs,
    resources,
    tokenizer_checks,
    value_checks,
)
from mergelab.preflight.engine_selection import Engine
from mergelab.preflight.resolve_inputs import Inputs, keeps_dtypes
from mergelab.preflight.resources import Estimate
from mergelab.recipes import mixtures, recipe_groups
from mergelab.recipes import recipe as recipes
from mergelab.schema import Run


@dataclass(frozen=True)
class Plan:
    """What a Run comes to."""

    sources: list[Source]
    facts: dict[str, ModelMetadata]
    """By the sources' names; without those that were not found."""
    recipe: dict[str, Any] | None
    findings: list[Finding]
    estimate: Estimate | None = None
    config_source: str | None = None
    """The name of the model whose config and tokenizer the output gets."""
    engine: Engine | None = None
    """What merges; None where that is not known yet."""

    @property
    def errors(self) -> list[Finding]:
        """What keeps the run from starting."""
        return [f for f in self.findings if f.severity == "error"]

    @property
    def warnings(self) -> list[Finding]:
        """What somebody should look at."""
        return [f for f in self.findings if f.severity == "warning"]

    def json(self) -> dict[str, Any]:
        """plan.json."""
        return {
            "schema": 1,
            "models": [_planned(s).json() for s in self.sources],
            "config_source": self.config_source,
            "engine": self.engine.json() if self.engine else None,
            "recipe": self.recipe,
            "findings": [f.json() for f in self.findings],
            "estimate": self.estimate.json() if self.estimate else None,
        }


def _planned(s: Source) -> PlannedModel:
    return PlannedModel(s.name, s.path, s.revision, s.commit, s.folder, s.adapter, s.reference)


def examine(
    run: Run,
    *,
    output: Path,
    overrides: Iterable[str] = (),
    zoo: Zoo,
    merges: bool = True,
    missing_severity: Severity = "error",
    more: Iterable[Finding] = (),
    there: Callable[[Mapping[str, Any]], int] = lambda recipe: 0,
) -> Plan:
    """Plan a run without reading any weights.

    Args:
        run: The composed run.
        output: The folder of the merged model.
        overrides: What the user typed, to distinguish a setting without effect from a default.
        zoo: Returns the folder of a role of the tiny family, training it if needed.
        merges: Whether the run merges. Otherwise only the models are checked.
        missing_severity: The severity of what this machine lacks: a hub model, a device, disk space.
        more: Findings of other parts, to be reported together with these.
        there: Bytes of a recipe's output that an interrupted merge has left on the disk.

    Returns:
        The plan, which has the errors as findings.
    """
    typed = list(overrides)
    asked = resolve_inputs.find(run, zoo)
    pickled = value_checks.pickled_allowed(run)
    facts = {
        s.name: checkpoint.read(s.folder, s.key, s.repair, pickled=pickled) for s in asked.sources if s.folder
    }
    assumed = _assumed(run)
    findings = [*more, *value_checks.check(run, typed, missing_severity), *asked.findings]
    base = asked.sources[0].name if asked.sources else ""
    shape = facts[base] if base in facts and facts[base].config else assumed
    findings += _check_absent(run, asked.sources, shape, missing_severity)
    findings += _check_models(run, asked, facts, assumed, merges=merges)
    recipe, estimate, engine = None, None, None
    if merges:
        recipe, new = recipe_checks.recipe_of(run, asked, facts, shape, typed)
        findings += new
        if recipe and recipes.is_mixture(recipe):
            engine = engine_selection.MIXTURE
        elif recipe and shape and not any(_stops(f) for f in findings):
            engine, new = engine_selection.choose(
                run,
                recipe,
                {s.reference: facts.get(s.name, shape) for s in asked.sources},
                registry.get(recipe["merge_method"]),
            )
            findings += new
        wrong = list(value_checks.check_output(output, asked.sources))
        findings += wrong
        if recipe and shape:
            estimate = _estimate(run, recipe, shape, asked, facts, output, engine, there(recipe))
            if estimate and not wrong:
                findings += resources.check(estimate, output, missing_severity)
    findings += tokenizer_checks.check(asked.sources, facts, recipe)
    plan = apply_allow(findings, [*run.allow, *run.model.allow])
    return Plan(asked.sources, facts, recipe, plan, estimate, asked.config_source, engine)


def _stops(f: Finding) -> bool:
    """Whether a finding is an error after which no engine can be chosen."""
    return f.severity == "error" and (f.code not in MAY_PASS or f.code == "pickled")


def _assumed(run: Run) -> ModelMetadata | None:
    """The base as its model file describes it, for use without its files."""
    config = dict(run.model.architecture)
    shapes = architecture.shapes(config) if config and not resolve_inputs.reads_file(run) else None
    if not shapes:
        return None
    name = str(config.get("torch_dtype", "bfloat16"))
    dtype = dtypes.BY_NAME[name if name in dtypes.MERGEABLE else "bfloat16"].code
    return ModelMetadata(Path(), config, {n: TensorInfo(dtype, s, "") for n, s in shapes.items()})


def _check_absent(
    run: Run, sources: list[Source], shape: ModelMetadata | None, severity: Severity
) -> Iterator[Finding]:
    """Report hub models that are not on this machine, and what could therefore not be checked."""
    absent = [part for s in sources for part in s.parts if part.absent]
    yield from hub_access.ask(absent, severity, gated=run.model.gated)
    if not absent or severity == "error":
        return
    what = ", ".join(s.name for s in absent)
    if shape is None:
        yield warning(
            "unchecked",
            what,
            "not on this machine, and their shapes are unknown, so nothing could be checked",
        )
        return
    message = (
        "not on this machine: planned with the base's shapes; config.json, tensors, tokenizers and chat "
        "templates could not be checked"
    )
    yield note("unchecked", what, message)


def _check_models(
    run: Run,
    asked: Inputs,
    facts: Mapping[str, ModelMetadata],
    assumed: ModelMetadata | None,
    *,
    merges: bool,
) -> Iterator[Finding]:
    """Check each model by itself, and compare it with the one that all must be related to."""
    fitted, sliced, fit = run.model.tokenizer is not None, False, "model.tokenizer=union (or base)"
    mixed = mixtures.wanted(run)
    rows = {asked.sources[0].reference} if mixed and asked.sources else None
    if asked.file is not None:
        fitted, rows = recipes.builds_tokenizer(asked.file), recipes.vocabulary_models(asked.file)
        fit = "tokenizer_source: union (or base) in the file"
        sliced = not asked.file.get("models") and not recipes.is_mixture(asked.file)
    asked_for = tokenizer_checks.needs(run, asked, merges, fitted)
    measured = evaluation_checks.measures_language(run) and run.eval.baselines
    present = [s for s in asked.sources if s.name in facts]
    reference, possessive = _reference(asked, facts, assumed)
    if run.model.trust_remote_code and len(present) == len(asked.sources) and run.evaluate.path is None:
        yield from remote_code.check_needed(s.folder for s in present if s.folder)
    for s in present:
        own = facts[s.name]
        yield from own.findings
        yield from tensor_checks.check_complete(own, s.key, s.repair, merged=merges)
        yield from ties.check(own, s.key)
        yield from remote_code.check(own.folder, s.key, allowed=run.model.trust_remote_code, commit=s.commit)
        yield from evaluation_checks.check_model(run, own, s.key)
        yield from adapters.check(s, own)
        if own.config and not own.has_tokenizer:
            lends = merges and s.name == asked.config_source
            needs = asked_for if lends else []
            yield tokenizer_checks.missing(s, own, needs, lends=lends, measured=measured, fitted=fitted)
        if reference and reference is not own:
            free = fitted or (rows is not None and s.reference not in rows)
            for f in compatibility.compare(
                reference,
                own,
                s.key,
                possessive=possessive,
                fitted=free,
                described=reference is assumed,
                fit=fit,
            ):
                if mixed and f.code == "architecture":
                    yield replace(f, code="no-mixture", remedy="Use models of one architecture.")
                elif s.name in asked.alike and f.code == "architecture":
                    yield replace(
                        f, severity="warning", remedy="override_architecture says that they are alike."
                    )
                elif not (sliced and f.code == "layers"):
                    yield f


def _reference(
    asked: Inputs, facts: Mapping[str, ModelMetadata], assumed: ModelMetadata | None
) -> tuple[ModelMetadata | None, str]:
    """What every model is compared with: the base, else its description, else the first model."""
    names = [s.name for s in asked.sources]
    if assumed and "base" in names and "base" not in facts:
        return assumed, "the family's"
    first = next((n for n in names if n in facts), None)
    return facts.get(first or ""), "the base's" if first == "base" else f"that of {first}"


def _task_memory(run: Run) -> int | None:
    """Bytes that a task on a cluster asks for, 0 where that is not known; None without a cluster."""
    if not run.hardware.on_cluster:
        return None
    if run.hardware.slurm is None:
        return 0
    return run.hardware.slurm.memory_bytes or 0


def _estimate(
    run: Run,
    recipe: Mapping[str, Any],
    shape: ModelMetadata,
    asked: Inputs,
    facts: Mapping[str, ModelMetadata],
    output: Path,
    engine: Engine | None,
    there: int,
) -> Estimate | None:
    try:
        shard, memory = run.hardware.shard_bytes, run.hardware.memory_bytes
        ram_free = _task_memory(run)
    except ValueError:
        return None
    out_dtype, compute = (
        dtypes.plain_name(d or "bfloat16")
        for d in (
            recipe.get("out_dtype") or recipe.get("dtype") or shape.dtype,
            recipe.get("dtype") or shape.dtype,
        )
    )
    if not {out_dtype, compute} <= {*dtypes.MERGEABLE}:
        return None
    made, together = _written(recipe, shape, asked)
    kept = keeps_dtypes(run) or not (recipe.get("out_dtype") or recipe.get("dtype"))
    plain = dtypes.BY_NAME[out_dtype].code
    codes = [t.dtype if kept and dtypes.is_mergeable(t.dtype) else plain for t in made]
    used = [s for s in asked.sources if s.reference in set(recipes.models(recipe))]
    sizes = {s.name: facts.get(s.name, shape).nbytes for s in used}
    config_source = next(
        (facts[s.name].folder for s in used if s.name == asked.config_source and s.name in facts), None
    )
    files = [config_source / n for n in model_folder.companions_of(config_source)] if config_source else []
    fast = engine is not None and engine.name == "fast"
    return resources.estimate(
        [t.numel for t in made],
        together,
        sum(sizes.values()),
        write=sum(t.numel * dtypes.BY_CODE[c].nbytes for t, c in zip(made, codes, strict=True)),
        compute_bytes=dtypes.BY_NAME[compute].nbytes,
        shard=shard,
        device=run.hardware.device,
        low_memory=run.hardware.low_memory,
        bound=memory if fast else None,
        by_chunks=fast and not registry.get(recipe["merge_method"]).whole_tensors,
        evaluates=evaluation.measures_anything(run.eval),
        output=output,
        there=there,
        beside=sum(f.stat().st_size for f in files)
        + sum(
            4 * adapters.changed_elements(s.adapter, facts.get(s.name, shape)) for s in used if s.adapter
        ),  # in float32
        exact=len(facts) == len(asked.sources),
        ram_free=ram_free,
    )


def _written(recipe: Mapping[str, Any], shape: ModelMetadata, asked: Inputs) -> tuple[list[TensorInfo], int]:
    """Each tensor that a recipe writes, as the base holds it, and the number of inputs in memory for it."""
    if recipes.is_mixture(recipe):
        # Each tensor is read, and copied into the experts of its layer.
        return [TensorInfo("", (n,), "") for n in mixtures.elements(recipe, shape)], 0
    groups, tied = recipe_groups.groups(recipe, asked.place), ties.of([shape])
    names = [n for made in recipe_groups.output_tensors(shape, groups, tied) for n, _ in made]
    typical = {compatibility.generic(n): t for n, t in shape.tensors.items()}
    found = [shape.tensors.get(n) or typical.get(compatibility.generic(n)) for n in names]
    made = [t for t in found if t] or [t for n, t in shape.tensors.items() if n not in tied]
    return made, max(len(g.inputs) for g in groups)
