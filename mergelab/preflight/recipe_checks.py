"""The recipe of a run, and everything that is wrong with what it asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergelab.core.dtypes import plain_name
from mergelab.core.errors import InputErrors
from mergelab.core.findings import Finding, error, note, warning
from mergelab.methods import registry
from mergelab.methods.registry import MethodInfo
from mergelab.models import architecture, ties
from mergelab.models.checkpoint import ModelMetadata
from mergelab.models.json_files import load_json
from mergelab.preflight import layer_checks, token_checks
from mergelab.preflight.resolve_inputs import Inputs, reads_file
from mergelab.preflight.value_checks import check_template
from mergelab.recipes import file_parameters, input_counts, mixtures, parameters, recipe_groups
from mergelab.recipes import recipe as recipes
from mergelab.schema import Run

Found = tuple[dict[str, Any] | None, list[Finding]]


def recipe_of(
    run: Run,
    inputs: Inputs,
    facts: Mapping[str, ModelMetadata],
    shape: ModelMetadata | None,
    overrides: Iterable[str],
) -> Found:
    """The recipe, or None where it cannot be known, and what is wrong with it.

    Args:
        facts: what is known of each source, by its name.
        shape: the base, or what is assumed of it.
        overrides: what the user typed.
    """
    if reads_file(run) and inputs.file is None:
        return None, []
    if mixtures.wanted(run):
        return _mixture(run, inputs, facts, shape, list(overrides))
    known = registry.methods()
    if inputs.file is not None:
        recipe, findings = _read(inputs)
    else:
        recipe, findings = _composed(run, inputs, shape, list(overrides))
    if recipe is None or recipe["merge_method"] not in known:
        return recipe, findings
    d = known[recipe["merge_method"]]
    if inputs.file is not None:
        words = {name for method in known.values() for name in method.parameters}
        recipe, new = file_parameters.read(recipe, d, words, inputs.place)
        findings += new
    groups = recipe_groups.groups(recipe, inputs.place)
    tied = ties.of([shape, *facts.values()]) if shape else {}
    tensors = recipe_groups.output_tensors(shape, groups, tied) if shape else [[] for _ in groups]
    everywhere = sorted({name for names in tensors for name, _ in names})
    for g, names in zip(groups, tensors, strict=True):
        counted = input_counts.check_inputs(d, g)
        findings += counted if inputs.file is None else [replace(f, remedy="") for f in counted]
        findings += parameters.check_parameters(
            d, g, names, inputs.place, tied, everywhere=everywhere, of_file=inputs.file is not None
        )
        if inputs.file is not None:
            findings += _check_group(g, inputs, facts)
    findings += token_checks.check(recipe, inputs.sources, facts, inputs.place)
    findings += _check_modules(recipe, shape, inputs.place)
    key = "hardware.compute_dtype" if inputs.file is None else inputs.place(("dtype",))
    findings += _check_float16(recipe, d, shape, key)
    if not any(f.severity == "error" for f in findings):
        findings += layer_checks.check(recipe, inputs, facts, trusted=run.model.trust_remote_code)
    return recipe, findings


def _mixture(
    run: Run,
    inputs: Inputs,
    facts: Mapping[str, ModelMetadata],
    shape: ModelMetadata | None,
    overrides: list[str],
) -> Found:
    """The mergekit-moe YAML of a file, or of a model family and experts."""
    recipe, findings = inputs.file, list[Finding]()
    if recipe is None:
        if not run.experts:
            return None, []
        recipe, findings = mixtures.compose(run, {s.name: s for s in inputs.sources}, shape)
    if recipe is not None:
        types = {
            s.reference: facts[s.name].config.get("model_type") for s in inputs.sources if s.name in facts
        }
        if shape and inputs.sources:
            types.setdefault(inputs.sources[0].reference, shape.config.get("model_type"))
        findings += mixtures.check(recipe, types, inputs.sources, inputs.place)
        findings += layer_checks.check_mixture(recipe, inputs, facts)
        if inputs.sources and _lacks_bos(inputs.sources[0].folder):
            findings += mixtures.check_tokens(recipe, inputs.place)
    return recipe, findings


def _lacks_bos(folder: Path | None) -> bool:
    """Whether a tokenizer says that it has no token for the beginning of a text."""
    if folder is None or not (folder / "tokenizer_config.json").is_file():
        return False
    config, _ = load_json(folder / "tokenizer_config.json", "", "")
    return isinstance(config, dict) and config.get("bos_token", "") is None


def _read(inputs: Inputs) -> Found:
    """The recipe of a file."""
    recipe, place = inputs.file or {}, inputs.place
    findings = registry.check_name(recipe["merge_method"], place(("merge_method",)))
    findings += check_template(recipe.get("chat_template"), place(("chat_template",)))
    if recipe.get("base_model") is None:
        message = "not set; config and tokenizer come from the first model"
        findings.append(note("no-base", place(("base_model",)), message))
    return recipe, findings


def _composed(
    run: Run,
    inputs: Inputs,
    shape: ModelMetadata | None,
    overrides: list[str],
) -> Found:
    """The recipe of a model family, experts and a method."""
    findings = registry.check_name(run.method.name, "method.name")
    if findings or not run.experts:
        return None, findings
    d = registry.get(run.method.name)
    findings += _not_taken(d, overrides)
    if d.inputs.base == "ignored" and run.method.base == "model":
        message = f"{d.name} has no base model; mergekit would merge it in as one more model"
        remedy = "Set method.base=first (it lends config and tokenizer), or none."
        return None, [*findings, error("base", "method.base", message, remedy)]
    # Where a role is missing, its name stands for it, so that the rest can be checked.
    references = {name: name for name in run.experts} | {s.name: s.reference for s in inputs.sources}
    try:
        recipe = recipes.build(run, references, d.used, shape.dtype if shape else None)
    except InputErrors as e:
        split = [m.partition(": ") for m in e.messages]
        return None, [*findings, *(error("setting", key, message) for key, _, message in split)]
    return recipe, findings


def _not_taken(d: MethodInfo, overrides: list[str]) -> Iterator[Finding]:
    """A weight or density that was typed, and that the method does not take."""
    for o in overrides:
        key = o.lstrip("+").partition("=")[0]
        parts = key.split(".")
        if len(parts) == 3 and parts[0] == "experts" and parts[2] in {*recipes.PER_MODEL} - d.used:
            message = f"method={d.name} takes no {parts[2]}"
            yield error("no-effect", o, message, "Leave it out, or choose another method.")


def _check_group(
    g: recipe_groups.Group, inputs: Inputs, facts: Mapping[str, ModelMetadata]
) -> Iterator[Finding]:
    """What only a file can get wrong: a model twice, and layers that a model does not have."""
    labels = {s.reference: s.path for s in inputs.sources}
    configs = {s.reference: facts[s.name].config for s in inputs.sources if s.name in facts}
    for model in {m: None for m in g.inputs if g.inputs.count(m) > 1}:
        yield error("duplicate", g.place, f"{labels.get(model, model)} takes part twice")
    for model, (start, end) in zip(g.inputs, g.ranges, strict=False):
        depth = architecture.layer_count(configs.get(model, {}))
        if depth is not None and end > depth:
            message = f"layer_range [{start}, {end}] of {labels.get(model, model)}, which has {depth} layers"
            yield error("layer-range", g.place, message)


def _check_modules(
    recipe: Mapping[str, Any], shape: ModelMetadata | None, place: recipe_groups.KeyOf
) -> Iterator[Finding]:
    names = architecture.modules(shape.config) if shape else None
    for name in recipe.get("modules") or {}:
        if names and name not in names:
            message = f"the architecture has no module '{name}'; it has {', '.join(names)}"
            yield error("structure", place(("modules", name)), message)
    if names and len(names) > 1 and recipe.get("slices"):
        message = (
            f"the architecture has the modules {', '.join(names)}, and slices do not say of which they are"
        )
        remedy = (
            f"Write them under `modules: {{{names[0]}: {{slices: ...}}}}`, and the other modules beside it."
        )
        yield error("structure", place(("slices",)), message, remedy)


def _check_float16(
    recipe: Mapping[str, Any], d: MethodInfo, shape: ModelMetadata | None, key: str
) -> Iterator[Finding]:
    declared = d.parameters.get("rescale")
    rescale = (recipe.get("parameters") or {}).get("rescale", declared.default if declared else False)
    computed = plain_name(recipe.get("dtype") or (shape.dtype if shape else ""))
    if computed == "float16" and rescale:
        message = "rescaling sums in float16 and can overflow to NaN"
        yield warning("float16", key, message, "Compute in float32.")
