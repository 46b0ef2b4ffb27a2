"""Mixtures of experts: which can be built of what, and what is wrong with a request for one.

mergekit-moe puts the MLPs of several models side by side, keeps the rest of the base, and makes each
layer's gate from prompts (https://github.com/arcee-ai/mergekit, docs/moe.md). It finds out late, or
never, most of what is checked here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergelab.core.dtypes import MERGEABLE
from mergelab.core.errors import did_you_mean, none_of
from mergelab.core.findings import Finding, error, note, warning
from mergelab.models.checkpoint import ModelMetadata
from mergelab.models.resolver import Source
from mergelab.recipes import recipe as recipes
from mergelab.recipes.file_schema import Reader, whole
from mergelab.schema import Run
from mergelab.schema.conditions import MIXTURE
from mergelab.schema.experts import RANDOM_GATES

METHOD, FILE_METHOD = MIXTURE, "mergekit_moe"
"""The names of method that mean: a mixture of the composed experts, or of a mergekit-moe YAML file."""

GATES = ("hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random")
"""How a gate is made: of the base's hidden states for the prompts (of the last token, or the mean of
all), of the prompts' token embeddings, or at random (normal, or uniform as torch starts a layer)."""

PARAMETERS = ("gate_mode", "experts_per_token", "shared_expert", "residual_scale", "architecture")
OF_EXPERT = ("residual_scale", "noise_scale")
DTYPES = tuple(name for name in MERGEABLE if name != "float64")
"""What mergekit writes a mixture in."""

KeyOf = Callable[[tuple[Any, ...]], str]


@dataclass(frozen=True)
class Kind:
    """An architecture that a mixture can have."""

    name: str
    """As mergekit calls it."""
    architecture: str
    """The class of transformers."""
    of: tuple[str, ...]
    """The model types that its experts may have."""
    shared: int
    """How many experts that see every token it has besides."""
    windows_by_layer: bool = False
    """Whether its layers may have different attention windows."""


KINDS = (
    Kind("Mixtral", "MixtralForCausalLM", ("llama", "mistral"), 0),
    Kind("Qwen MoE", "Qwen2MoeForCausalLM", ("qwen2", "llama", "mistral"), 1, True),
    Kind("Qwen3 MoE", "Qwen3MoeForCausalLM", ("qwen3",), 0),
)
"""mergekit also writes DeepSeek's, which needs code from the hub to load; it is not offered."""


def wanted(run: Run) -> bool:
    """Whether a run builds a mixture."""
    return run.method.name in (METHOD, FILE_METHOD)


def place(names: list[str]) -> KeyOf:
    """From a path into a composed recipe to the key that the user knows.

    Args:
        names: of the experts, in order.
    """

    def key(path: tuple[Any, ...]) -> str:
        if path[:1] == ("experts",) and len(path) > 1:
            own = {"positive_prompts": "prompts"}.get(str(path[-1]), str(path[-1]))
            own = f".parameters.{own}" if own in OF_EXPERT else f".{own}" if len(path) > 2 else ""
            return f"experts.{names[path[1]]}{own}"
        if path[:1] == ("shared_experts",):
            last = str(path[-1])
            return f"method.parameters.{last if last in PARAMETERS else 'shared_expert'}"
        if path in (("dtype",), ("base_model",)):
            return {"dtype": "hardware.dtype", "base_model": "model.base"}[path[0]]
        return f"method.parameters.{path[0]}" if path and path[0] in PARAMETERS else "experts"

    return key


def compose(
    run: Run, sources: Mapping[str, Source], shape: ModelMetadata | None
) -> tuple[dict[str, Any] | None, list[Finding]]:
    """The mergekit-moe YAML of a composed run, and what is wrong with the request itself.

    Args:
        sources: the base and the experts that were found, by name.
        shape: the base, or what is known of it.
    """
    p = run.method.parameters
    findings = list(_unknown(run))
    shared = p.get("shared_expert", "auto")
    choices = ("auto", "none", "base", *run.experts)
    if shared not in choices:
        findings.append(error("setting", "method.parameters.shared_expert", none_of(shared, choices)))
    if findings:
        return None, findings
    own = shape.config.get("model_type") if shape else None
    if shared == "auto":
        shared = "base" if own == "qwen2" else "none"
    references = {name: s.reference for name, s in sources.items()}
    # Of Llama and Mistral models with a shared expert mergekit would make DeepSeek's.
    architecture = p.get("architecture") or ("qwen" if shared != "none" and own != "qwen2" else None)
    recipe = recipes.build_mixture(run, references, shared, architecture, shape.dtype if shape else None)
    return recipe, findings


def _unknown(run: Run) -> Iterator[Finding]:
    """Names of parameters that a mixture does not take."""
    given: list[tuple[str, dict[str, Any], tuple[str, ...]]]
    given = [("method.parameters", run.method.parameters, PARAMETERS)]
    given += [(f"experts.{n}.parameters", e.parameters, OF_EXPERT) for n, e in run.experts.items()]
    for where, parameters, known in given:
        for name in set(parameters) - {*known}:
            message = f"moe has no parameter '{name}'.{did_you_mean(str(name), known)}"
            yield error("unknown-parameter", f"{where}.{name}", message, f"It takes {', '.join(known)}.")


def read(content: Any, at: KeyOf, held: Iterable[str] = ()) -> tuple[dict[str, Any], list[Finding]]:
    """The recipe of a mergekit-moe YAML file without what has no effect, and what is wrong with its keys and
    types.

    Args:
        content: What YAML makes of the file.
        at: From a path into the file to the key that the user knows.
        held: Keys of the top whose values are used elsewhere by an alias.
    """
    reader = Reader(at, frozenset(held), "mergekit-moe")
    if not isinstance(content, dict):
        reader.wrong((), "it is not a mapping, so it is not a mergekit-moe configuration")
        return {}, reader.findings
    if any(content.get(k) for k in ("models", "slices", "modules")) and not content.get("experts"):
        message = "it is a merge, not a mixture of experts"
        reader.findings.append(error("structure", at(()), message, "Set method=mergekit."))
        return {}, reader.findings
    out = _node(reader, content, TOP, ())
    for key in ("experts", "shared_experts"):
        items = content.get(key)
        if items is None and key == "shared_experts":
            continue
        if not isinstance(items, list) or not items:
            reader.wrong((key,), "it has to be a list of experts")
            continue
        sound = [(i, item) for i, item in enumerate(items) if isinstance(item, dict)]
        for i in {*range(len(items))} - {i for i, _ in sound}:
            reader.wrong((key, i), "it has to be a mapping with `source_model`")
        out[key] = [_node(reader, item, EXPERT, (key, i)) for i, item in sound]
    for model in reader.architectures:
        message = "override_architecture cannot be followed here; a mixture is built by config.json"
        reader.findings.append(error("architecture-override", at(()), f"{model}: {message}"))
    return out, reader.findings


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


TEXT = ("a text", lambda v: isinstance(v, str))
MODEL = ("a model", lambda v: True)
NUMBER = ("a number", _is_number)
TEXTS = ("a list of texts", _is_texts)
LIST = ("a list", lambda v: isinstance(v, list))
WHOLE = ("a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool))

Type = tuple[str, Callable[[Any], bool]]
TOP: dict[str, Type] = {
    "base_model": MODEL, "experts": LIST, "gate_mode": TEXT, "dtype": TEXT, "experts_per_token": WHOLE,
    "shared_experts": LIST, "architecture": TEXT,
}  # fmt: skip
EXPERT: dict[str, Type] = {
    "source_model": MODEL, "positive_prompts": TEXTS, "negative_prompts": TEXTS, "residual_scale": NUMBER,
    "noise_scale": NUMBER,
}  # fmt: skip


def _node(
    reader: Reader, node: Mapping[str, Any], known: Mapping[str, Type], path: tuple[Any, ...]
) -> dict[str, Any]:
    """A mapping of a file: its known keys in their types."""
    out = {k: v for k, v in reader.known(node, known, path).items() if v is not None}
    for k, value in out.items():
        if known[k] is WHOLE:
            out[k] = whole(value) if whole(value) is not None else value
        elif known[k] is NUMBER:
            out[k] = recipes.number(value)
        if known[k] is not MODEL and not known[k][1](out[k]):
            reader.wrong((*path, k), f"{value!r} is not {known[k][0]}", "type")
    for k in (k for k, kind in known.items() if kind is MODEL):
        if k in out:
            out[k] = reader.model(out[k], (*path, k))
        else:
            reader.wrong((*path, k), "it has to name a model")
    return out


def check(
    recipe: Mapping[str, Any], types: Mapping[str, str | None], sources: Iterable[Source], at: KeyOf
) -> Iterator[Finding]:
    """What is wrong with a mixture of sound structure.

    Args:
        recipe: mergekit-moe's YAML.
        types: the model type of each reference, as far as it is known.
        sources: of all references.
        at: from a path into the recipe to the key that the user knows.
    """
    yield from _check_values(recipe, at)
    yield from _check_kind(recipe, types, at)
    yield from _check_prompts(recipe, at)
    experts = recipe["experts"]
    same = {e["source_model"] for e in experts}
    if len(same) == 1 and recipe.get("gate_mode") not in RANDOM_GATES:
        message = "all experts are the same model: the mixture would only be a slower copy of it"
        yield error(
            "same-experts", at(("experts",)), message, "Pass allow=[same-experts] to train it further."
        )
    if len(experts) & (len(experts) - 1):
        message = f"{len(experts)} experts are not a power of two, which llama.cpp needs"
        yield note("llama.cpp", at(("experts",)), message)
    for s in sources:
        if s.adapter:
            message = "a mixture is built of whole models, and this is one with an adapter"
            yield error(
                "adapter", s.key, message, "Merge the two first: method=passthrough with this expert alone."
            )


def _check_values(recipe: Mapping[str, Any], at: KeyOf) -> Iterator[Finding]:
    gate = recipe.get("gate_mode", GATES[0])
    if gate not in GATES:
        yield error("setting", at(("gate_mode",)), none_of(gate, GATES))
    k, n = recipe.get("experts_per_token", 2), len(recipe["experts"])
    if not WHOLE[1](k) or not 1 <= k <= n:
        message = f"{k!r} of {n} experts cannot be asked for each token; 1 to {n}"
        yield error("setting", at(("experts_per_token",)), message)
    dtype = str(recipe.get("dtype") or DTYPES[0])
    if dtype not in DTYPES:
        yield error("setting", at(("dtype",)), f"'{dtype}' is none of {', '.join(DTYPES)}")
    for key in ("experts", "shared_experts"):
        for i, e in enumerate(recipe.get(key) or []):
            for name in OF_EXPERT:
                if e.get(name) is not None and not _is_number(e[name]):
                    yield error("type", at((key, i, name)), f"{e[name]!r} is not a number")


def _check_kind(recipe: Mapping[str, Any], types: Mapping[str, str | None], at: KeyOf) -> Iterator[Finding]:
    """That there is an architecture for what is asked."""
    base = types.get(recipe["base_model"])
    shared = recipe.get("shared_experts") or []
    asked = recipe.get("architecture")
    named = [k for k in KINDS if not asked or k.name.lower().startswith(str(asked).lower())]
    if not named:
        yield error("setting", at(("architecture",)), f"'{asked}' is none of mixtral, qwen, qwen3")
        return
    if base is None:  # the comparison reports models of another type than the base's
        return
    fit = [k for k in named if base in k.of]
    if not fit:
        built = "; ".join(f"{k.architecture.removesuffix('ForCausalLM')} of {', '.join(k.of)}" for k in named)
        yield error("no-mixture", at(("base_model",)), f"no mixture can be built of {base} models: {built}")
        return
    if not any(len(shared) == k.shared for k in fit):
        kind = fit[-1]
        wants = "exactly one shared expert" if kind.shared else "no shared expert"
        name = kind.architecture.removesuffix("ForCausalLM")
        message = f"a {name} has {wants}; here {'is one' if len(shared) == 1 else f'are {len(shared)}'}"
        yield error("shared-expert", at(("shared_experts",)), message)
    elif base != "qwen2" and shared and not asked and not shared[0].get("positive_prompts"):
        message = "mergekit would make DeepSeek's architecture of it, which needs code from the hub"
        yield error("no-mixture", at(("architecture",)), message, "Set architecture: qwen.")
    known = {recipe["base_model"], *(e["source_model"] for e in recipe["experts"])}
    for i, e in enumerate(shared):
        if e["source_model"] not in known:
            message = "mergekit reads the shared expert only where it is the base or one of the experts"
            yield error("shared-expert", at(("shared_experts", i, "source_model")), message)


def kind(recipe: Mapping[str, Any], model_type: str) -> Kind | None:
    """The architecture that a mixture gets, or None where there is none for what is asked."""
    asked, shared = recipe.get("architecture"), recipe.get("shared_experts") or []
    named = [k for k in KINDS if not asked or k.name.lower().startswith(str(asked).lower())]
    return next((k for k in named if model_type in k.of and k.shared == len(shared)), None)


def _check_prompts(recipe: Mapping[str, Any], at: KeyOf) -> Iterator[Finding]:
    """That the gate has something to tell the experts apart by."""
    gate, experts = recipe.get("gate_mode", GATES[0]), recipe["experts"]
    shared = recipe.get("shared_experts") or []
    if gate == "random":  # the only one for which mergekit does without
        return
    lacking = [("experts", i) for i, e in enumerate(experts) if not e.get("positive_prompts")]
    lacking += [("shared_experts", i) for i, e in enumerate(shared) if not e.get("positive_prompts")]
    for path in lacking:
        message = f"gate_mode={gate} needs prompts for each expert, and there are none"
        yield error("prompts", at((*path, "positive_prompts")), message, "Give some that it shall answer.")
    if lacking or gate in RANDOM_GATES:
        return
    seen: dict[tuple[tuple[str, ...], ...], int] = {}
    for i, e in enumerate(experts):
        own = (tuple(e["positive_prompts"]), tuple(e.get("negative_prompts") or ()))
        first = seen.setdefault(own, i)
        if first != i:
            message = (
                f"its prompts are those of {at(('experts', first))}, so the gate cannot tell the two apart"
            )
            yield warning("prompts", at(("experts", i, "positive_prompts")), message)
    if len(experts) > 1 and len(seen) == 1:
        message = "all experts have the same prompts, so the gate cannot tell them apart"
        yield error("prompts", at(("experts",)), message, "Give each expert prompts of its own.")


def check_tokens(recipe: Mapping[str, Any], at: KeyOf) -> Iterator[Finding]:
    """That hidden states are asked of something, where the tokenizer puts no token before a text."""
    if recipe.get("gate_mode", GATES[0]) not in GATES[:3]:
        return
    for key in ("experts", "shared_experts"):
        for i, e in enumerate(recipe.get(key) or []):
            for prompts in ("positive_prompts", "negative_prompts"):
                if e.get(prompts) and not any(e[prompts]):
                    message = "an empty prompt gives no tokens because the base's tokenizer has no bos_token"
                    yield error("prompts", at((key, i, prompts)), message, "Give one that is not empty.")


def elements(recipe: Mapping[str, Any], shape: ModelMetadata) -> list[int]:
    """Elements of each tensor that is written, the experts of a layer as one.

    Args:
        shape: the base.
    """
    n, s = len(recipe["experts"]), len(recipe.get("shared_experts") or [])
    mlp: dict[str, int] = {}
    out: list[int] = []
    for name, t in shape.tensors.items():
        layer, inside, _ = name.partition(".mlp.")
        if inside:
            mlp[layer] = mlp.get(layer, 0) + t.numel
        else:
            out.append(t.numel)
    hidden = int(shape.text_config.get("hidden_size") or 0)
    return out + [m * (n + s) + hidden * (n + s) for m in mlp.values()]
