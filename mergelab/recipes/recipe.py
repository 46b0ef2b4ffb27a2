"""A Run as plain mergekit YAML, and what a parameter's setting means. Pure: no files, no network.

mergekit's format: a *setting* is a scalar, a list (a gradient over the layers, interpolated
linearly), or a list of `{filter, value}` of which the first whose filter is part of the tensor's
name applies (https://github.com/arcee-ai/mergekit, docs/merge_methods.md and README).
Ours writes the last form as a mapping: `{self_attn: 0.3, mlp: [0.2, 0.8], "*": 0.5}`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from mergelab.core.errors import InputError, InputErrors, none_of
from mergelab.schema import Run
from mergelab.schema.conditions import MIXTURE

REST = "*"
"""The filter that stands for every tensor not named before."""

REFERENCES = ("model", "base_model", "source_model", "tokenizer_source", "source")
"""Keys of a recipe whose value may be a model."""

PER_MODEL = ("weight", "density")
"""Parameters that every expert carries, whatever the method."""


def setting(value: Any, key: str, *, numbers: bool = True) -> Any:
    """`value` in mergekit's form; a number that YAML read as text, as it does with 1e-5, as number.

    Args:
        value: a scalar, a list of scalars, or a mapping from filter to either; or mergekit's own
            form of the last, a list of `{filter, value}` or a single one.
        key: the configuration key, for the message.
        numbers: whether text becomes a number where it is one.
    Raises:
        InputError: when it is none of these.
    """
    if isinstance(value, Mapping) and "value" not in value:
        if not value:
            raise InputError(f"{key}: the mapping is empty; give it filters such as mlp: 0.5")
        return _conditions([{"filter": str(f), "value": v} for f, v in value.items()], key, numbers)
    if isinstance(value, Mapping):
        return _conditions([value], key, numbers)
    if isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
        return _conditions(value, key, numbers)
    return _gradient(value, key, numbers)


def _conditions(items: list[Any], key: str, numbers: bool) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for i, item in enumerate(items):
        if not isinstance(item, Mapping) or "value" not in item or set(item) - {"filter", "value"}:
            raise InputError(
                f"{key}: {item!r} is not a mapping with `value` and, if it is for some, `filter`"
            )
        f = item.get("filter")
        if f in (None, REST) and i < len(items) - 1:
            raise InputError(
                f'{key}: "{REST}" stands for every tensor not named before it, so it has to come last'
            )
        value = _gradient(item["value"], f"{key}.{REST if f is None else f}", numbers)
        out.append({"value": value} | ({} if f in (None, REST) else {"filter": str(f)}))
    return out


def _gradient(value: Any, key: str, numbers: bool) -> Any:
    if isinstance(value, (bool, int, float, str)):
        return number(value) if numbers else value
    if isinstance(value, list) and value and all(isinstance(v, (bool, int, float, str)) for v in value):
        return [number(v) if numbers else v for v in value]
    raise InputError(
        f"{key}: {value!r} is not a setting; give a number, a list of numbers (a gradient over the "
        f'layers) or a mapping from a part of a tensor\'s name to either, with "{REST}" for the rest'
    )


def number(value: Any) -> Any:
    """Text that is a number as that number; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def scalars(value: Any) -> Iterator[Any]:
    """Every scalar in a setting of mergekit's form."""
    if isinstance(value, list):
        for v in value:
            yield from scalars(v)
    elif isinstance(value, dict):
        yield from scalars(value.get("value"))
    else:
        yield value


def filters(value: Any) -> list[str | None]:
    """The filters of a conditional setting in order, None for the rest; empty if it has none."""
    if isinstance(value, list) and isinstance(value[0], dict):
        return [v.get("filter") for v in value]
    return []


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A setting of mergekit's form with every scalar changed."""
    if isinstance(value, list):
        return [mapped(v, change) for v in value]
    if isinstance(value, dict):
        return value | {"value": mapped(value["value"], change)}
    return change(value)


def value_at(value: Any, tensor: str, t: float) -> Any:
    """What a setting comes to for one tensor, or None where no filter applies.

    Args:
        value: a setting in mergekit's form, as `setting` gives it.
        tensor: the tensor's name.
        t: the layer's place, 0 for the first and 1 for the last; mergekit uses 0 for tensors
            outside the layers.
    """
    if isinstance(value, list) and isinstance(value[0], dict):
        for f, v in zip(filters(value), value, strict=True):
            if f is None or f in tensor:
                return value_at(v["value"], tensor, t)
        return None
    if isinstance(value, list):
        at = t * (len(value) - 1)
        low = int(at)
        high = min(len(value) - 1, low + 1)
        if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value):
            return (1 - (at - low)) * value[low] + (at - low) * value[high]
        return value[low]
    return value


def build(
    run: Run, references: Mapping[str, str], takes: Collection[str], out_dtype: str | None
) -> dict[str, Any]:
    """The mergekit YAML of a typed Run.

    Args:
        run: the composed run (not `method=mergekit`).
        references: the model reference of "base" and of every expert by name.
        takes: the parameters that the method declares. An expert's weight and density are left
            out where it takes none: expert sets serve methods of every kind.
        out_dtype: the dtype to write, where `hardware.dtype` leaves it to the base.
    Returns:
        what `dump` turns into a file that `mergekit-yaml` takes.
    Raises:
        InputErrors: for every value that is not a setting, and an unknown `method.base`.
    """
    wrong: list[str] = []

    def checked(value: Any, key: str) -> Any:
        try:
            return setting(value, key)
        except InputError as e:
            wrong.append(str(e))

    recipe: dict[str, Any] = {"merge_method": run.method.name}
    bases = {"model": references.get("base"), "first": references[next(iter(run.experts))], "none": None}
    if run.method.base not in bases:
        wrong.append(f"method.base: {none_of(run.method.base, bases)}")
    recipe["base_model"] = bases.get(run.method.base)
    recipe["models"] = []
    for name, expert in run.experts.items():
        own = {p: getattr(expert, p) for p in PER_MODEL if p in takes} | expert.parameters
        item: dict[str, Any] = {"model": references[name]}
        parameters = {p: checked(v, expert_key(name, p)) for p, v in own.items() if v is not None}
        if parameters:
            item["parameters"] = parameters
        recipe["models"].append(item)
    recipe["parameters"] = {
        p: checked(v, f"method.parameters.{p}") for p, v in run.method.parameters.items() if v is not None
    }
    if wrong:
        raise InputErrors(wrong)
    recipe["dtype"] = run.hardware.compute_dtype
    recipe["out_dtype"] = run.hardware.dtype or out_dtype
    recipe["tokenizer_source"] = run.model.tokenizer
    recipe["chat_template"] = run.model.chat_template
    return {k: v for k, v in recipe.items() if v not in (None, {})}


def build_mixture(
    run: Run, references: Mapping[str, str], shared: str, architecture: str | None, out_dtype: str | None
) -> dict[str, Any]:
    """The mergekit-moe YAML of a typed Run, whose values are checked afterwards.

    The shared expert sees every token, so its own gate is made of all experts' prompts.

    Args:
        run: the composed run with `method=moe`.
        references: the model reference of "base" and of every expert by name.
        shared: the name of the shared expert, or `none`.
        architecture: as mergekit names it; None where the models' own calls for it.
        out_dtype: the dtype to write, where `hardware.dtype` leaves it to the base.
    """
    p = run.method.parameters
    recipe: dict[str, Any] = {
        "base_model": references.get("base"),
        "gate_mode": p.get("gate_mode"),
        "architecture": architecture,
        "dtype": run.hardware.dtype or out_dtype,
        "experts_per_token": p.get("experts_per_token"),
        "experts": [],
    }
    prompts: dict[str, None] = {}
    for name, e in run.experts.items():
        own = e.prompts or run.model.prompts.get(name) or []
        if not own and p.get("gate_mode") == "uniform_random":
            own = [name]  # mergekit needs prompts here too, and does not look at them
        prompts |= dict.fromkeys(own)
        item = {"source_model": references.get(name, name), "positive_prompts": own,
                "negative_prompts": e.negative_prompts, **e.parameters}  # fmt: skip
        recipe["experts"].append({k: v for k, v in item.items() if v not in (None, [])})
    if shared != "none":
        item = {"source_model": references.get(shared, shared), "positive_prompts": [*prompts],
                "residual_scale": p.get("residual_scale")}  # fmt: skip
        recipe["shared_experts"] = [{k: v for k, v in item.items() if v not in (None, [])}]
    return {k: v for k, v in recipe.items() if v is not None}


def is_mixture(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe is for a mixture of experts."""
    return "merge_method" not in recipe


def builds_tokenizer(recipe: Mapping[str, Any]) -> bool:
    """Whether a tokenizer is built and the embeddings are fitted to it. An empty `tokenizer` asks for the
    union of all tokens."""
    return any(recipe.get(k) is not None for k in ("tokenizer", "tokenizer_source"))


def vocabulary_models(recipe: Mapping[str, Any]) -> set[str]:
    """The models whose rows for tokens get into the output: all of them, but of slices those of the first
    and the last one, and of a mixture the base."""
    if is_mixture(recipe):
        return {str(recipe["base_model"])}
    base = recipe.get("base_model")
    out = {str(base)} if base is not None else set()
    for part in (recipe, *(recipe.get("modules") or {}).values()):
        slices = part.get("slices") or []
        out |= {m["model"] for m in part.get("models") or []}
        out |= {m["model"] for s in (*slices[:1], *slices[-1:]) for m in s["sources"]}
    return out


def method_of(recipe: Mapping[str, Any]) -> str:
    """The name of the method of a recipe of either kind."""
    return str(recipe.get("merge_method", MIXTURE))


def expert_key(name: str, parameter: str) -> str:
    """The configuration key of an expert's parameter."""
    return f"experts.{name}.{parameter if parameter in PER_MODEL else 'parameters.' + parameter}"


def dump(recipe: Mapping[str, Any]) -> str:
    """The recipe as YAML text, keys in the order that people write them."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """A text of several lines stays on one, with its line breaks written as \\n."""

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if "\n" in value else None)

    Dumper.add_representer(str, text)
    return str(yaml.dump(dict(recipe), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100))


def models(recipe: Mapping[str, Any]) -> list[str]:
    """The model references of a recipe in the order of the file, each once, the base first."""
    out: dict[str, None] = {}

    def visit(node: Any, key: str) -> None:
        if isinstance(node, dict):
            for k, v in node.items():
                if k in ("model", "base_model", "source_model") and isinstance(v, str):
                    out[v] = None
                elif k not in ("tokenizer", "parameters"):
                    visit(v, k)
        elif isinstance(node, list):
            for v in node:
                visit(v, key)

    if isinstance(recipe.get("base_model"), str):
        out[recipe["base_model"]] = None
    visit(dict(recipe), "")
    return list(out)


def renamed(recipe: Mapping[str, Any], swap: Mapping[str, str]) -> dict[str, Any]:
    """The recipe with other references of models, wherever it names one."""

    def visit(node: Any, key: str) -> Any:
        if isinstance(node, dict):
            return {k: visit(v, str(k)) for k, v in node.items()}
        if isinstance(node, list):
            return [visit(v, key) for v in node]
        return swap.get(node, node) if key in REFERENCES and isinstance(node, str) else node

    return {k: visit(v, k) for k, v in recipe.items()}
