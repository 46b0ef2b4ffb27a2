"""Whether the settings of single layers can follow the layers that a recipe moves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergelab.core.findings import MAY_PASS, Finding, error
from mergelab.models import architecture, layer_settings, moved_layers, remote_code
from mergelab.models.checkpoint import ModelMetadata
from mergelab.preflight.resolve_inputs import Inputs
from mergelab.recipes import mixtures, slices
from mergelab.recipes import recipe as recipes


def check(
    recipe: Mapping[str, Any], inputs: Inputs, facts: Mapping[str, ModelMetadata], *, trusted: bool
) -> Iterator[Finding]:
    """What cannot follow its layer in a recipe of sound structure.

    Args:
        recipe: mergekit's YAML.
        inputs: The sources of all references.
        facts: What is known of each source, by its name.
        trusted: Whether code that comes with the models may run.
    """
    used = {s.reference: facts[s.name] for s in inputs.sources if s.name in facts}
    named = recipes.models(recipe)
    known = [used[n] for n in named if n in used]
    if len(known) < len(named) or any(_is_damaged(m) for m in known):
        return  # what is not here, or cannot be read, is reported elsewhere
    if not trusted and any("auto_map" in m.config and remote_code.code(m.folder) for m in known):
        return
    source = used[named[0]]
    for name, path, own in slices.stacks(recipe, architecture.modules(source.config) or [slices.DEFAULT]):
        found = moved_layers.moved(
            source.folder,
            slices.layers(own, lambda reference: used[reference].folder),
            key=architecture.layers_key(source.config, name),
            trust_remote_code=trusted,
        )
        for problem in found["problems"]:
            yield _finding(problem, inputs.place(path))


def _is_damaged(m: ModelMetadata) -> bool:
    return not m.config or any(f.severity == "error" and f.code not in MAY_PASS for f in m.findings)


def _finding(problem: Mapping[str, str], place: str) -> Finding:
    kind, message = problem["kind"], problem["message"]
    if kind == moved_layers.UNFIT:
        return error(
            "layer-range", place, message, "Choose layers that keep their place, or take all of them."
        )
    if kind == moved_layers.UNLIKE:
        remedy = "Merge layers of one kind, or pass allow=[layer-settings] to keep the first model's setting."
        return error("layer-settings", place, message, remedy)
    remedy = (
        "Choose layers that keep their place, or pass allow=[layer-settings] if the difference is intended."
    )
    return error("layer-settings", place, f"{message}; config.json cannot say otherwise", remedy)


def check_mixture(
    recipe: Mapping[str, Any], inputs: Inputs, facts: Mapping[str, ModelMetadata]
) -> Iterator[Finding]:
    """Whether the attention windows of the base's layers can be those of a mixture's layers."""
    present = {s.reference: facts[s.name] for s in inputs.sources if s.name in facts}
    base = present.get(recipe["base_model"])
    kind = mixtures.kind(recipe, str(base.config.get("model_type"))) if base and base.config else None
    if base is None or kind is None:
        return
    windows = layer_settings.windows(base.config)
    if len(set(windows)) > 1 and not kind.windows_by_layer:
        first = next(i for i, w in enumerate(windows) if w != windows[0])
        message = (
            f"layer 0 of {base.folder} has a sliding window of {windows[0]}, layer {first} one of "
            f"{windows[first]}; in a {kind.architecture} all layers have the same"
        )
        remedy = "Pass allow=[layer-settings] to build it without windows."
        yield error("layer-settings", inputs.place(("base_model",)), message, remedy)
