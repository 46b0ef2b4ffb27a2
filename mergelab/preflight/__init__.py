"""Preflight: everything that can be known before a weight is read, all at once.

`examine` turns a Run into a Plan: where the models lie, the recipe, the findings, the estimate.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergelab import recipe as recipes
from mergelab.errors import InputError, did_you_mean
from mergelab.preflight import (
    architecture,
    checkpoint,
    compare,
    layout,
    methods,
    resources,
    sources,
)
from mergelab.preflight.checkpoint import Facts, Header
from mergelab.preflight.findings import Finding, error, note, settle, warning
from mergelab.preflight.resources import Estimate
from mergelab.preflight.sources import Source
from mergelab.schema import Run

__all__ = ["Finding", "Plan", "Source", "examine", "reads_file"]

FILE_METHOD = "mergekit"
"""The method's name that means: run the mergekit YAML at method.path."""

CHAT_TEMPLATES = ("auto", "alpaca", "chatml", "exaone", "llama3", "mistral")


@dataclass(frozen=True)
class Plan:
    """What a Run comes to."""

    sources: list[Source]
    facts: dict[str, Facts]
    """By the sources' names; without those that were not found."""
    recipe: dict[str, Any] | None
    findings: list[Finding]
    estimate: Estimate | None = None
    donor: str | None = None
    """The name of the model whose config and tokenizer the output gets."""

    def json(self) -> dict[str, Any]:
        """plan.json."""
        return {
            "schema": 1,
            "models": [
                {
                    "name": s.name,
                    "path": s.path,
                    "revision": s.revision,
                    "commit": s.commit,
                    "folder": str(s.folder) if s.folder else None,
                    "adapter": str(s.adapter) if s.adapter else None,
                    "reference": s.reference,
                }
                for s in self.sources
            ],
            "donor": self.donor,
            "recipe": self.recipe,
            "findings": [f.json() for f in self.findings],
            "estimate": self.estimate.json() if self.estimate else None,
        }


def reads_file(run: Run) -> bool:
    """Whether the run takes its models from a mergekit YAML file."""
    return run.method.name == FILE_METHOD


def examine(
    run: Run,
    *,
    output: Path,
    overrides: Iterable[str] = (),
    zoo: Callable[[str], Path],
    merges: bool = True,
    absent: str = "error",
    more: Iterable[Finding] = (),
) -> Plan:
    """Plan a run without reading a weight.

    Args:
        run: the composed run.
        output: where the model will go.
        overrides: what the user typed, to tell a setting that has no effect from a default.
        zoo: the folder of a role of the tiny family, which it may have to build.
        merges: whether a merge is asked for; otherwise only the models are looked at.
        absent: the severity of a hub model that is not on this machine.
        more: findings of other parts, to be told together with these.
    """
    findings = [*more, *_check_settings(run)]
    found, raw, place, new = _sources(run, zoo)
    findings += new
    facts = {s.name: checkpoint.read(s.folder, s.place) for s in found if s.folder}
    for s in found:
        if s.name in facts:
            findings += facts[s.name].findings
            findings += compare.check_complete(facts[s.name], s.place)
    findings += sources.ask_hub([s for s in found if _absent(s)], absent)  # type: ignore[arg-type]
    assumed = _assumed(run)
    if any(_absent(s) for s in found):
        findings += _unseen(assumed, [s for s in found if _absent(s)])

    donor, base_facts = _donor(run, raw, found, facts)
    for s in found:
        if base_facts and s.name != donor and s.name in facts:
            fitted = bool(raw.get("tokenizer") or raw.get("tokenizer_source") or run.model.tokenizer)
            findings += [
                f
                for f in compare.compare(base_facts, facts[s.name], s.place, fitted=fitted)
                if not (f.code == "layers" and raw.get("slices"))
            ]
    shape = base_facts or assumed
    recipe, estimate = None, None
    if merges:
        recipe, new = _recipe(run, raw, place, found, shape, list(overrides))
        findings += new
        findings += _check_output(run, output, found)
        if recipe and shape:
            estimate, new = _estimate(run, recipe, shape, facts, found, output)
            findings += new
    return Plan(found, facts, recipe, settle(findings, [*run.allow, *run.model.allow]), estimate, donor)


def _absent(s: Source) -> bool:
    return (
        s.folder is None
        and not s.path.startswith(sources.ZOO)
        and not sources.is_local(s.path)
        and (sources.HUB_ID.fullmatch(s.path.partition("+")[0]) is not None)
    )


def _check_settings(run: Run) -> Iterator[Finding]:
    """Single values that are wrong by themselves."""
    h = run.hardware
    for key, value in (("hardware.dtype", h.dtype), ("hardware.compute_dtype", h.compute_dtype)):
        if value is not None and value not in layout.MERGEABLE:
            near = did_you_mean(value, layout.MERGEABLE)
            yield error("dtype", key, f"'{value}' is none of {', '.join(layout.MERGEABLE)}.{near}")
    if h.threads is not None and h.threads < 1:
        yield error("range", "hardware.threads", f"{h.threads} is out of range; at least 1")
    if not 0 <= run.seed < 2**32:
        yield error("range", "seed", f"{run.seed} is out of range; 0 to 4294967295")
    yield from resources.parse_size(h.shard_size, "hardware.shard_size")[1]
    yield from resources.check_device(h.device)
    if run.model.tokenizer not in (None, "base", "union"):
        yield error("tokenizer", "model.tokenizer", f"'{run.model.tokenizer}' is none of null, base, union")
    yield from _check_template(run.model.chat_template, "model.chat_template")


def _check_template(template: str | None, place: str) -> Iterator[Finding]:
    if template is not None and template not in CHAT_TEMPLATES and "{" not in template:
        yield error(
            "chat-template",
            place,
            f"'{template}' is neither a Jinja template nor one of {', '.join(CHAT_TEMPLATES)}."
            f"{did_you_mean(template, CHAT_TEMPLATES)}",
        )


def _sources(
    run: Run, zoo: Callable[[str], Path]
) -> tuple[list[Source], dict[str, Any], layout.Place, list[Finding]]:
    """The models that take part, and the raw recipe where the run reads one."""
    if reads_file(run):
        return _sources_of_file(run, zoo)
    found: list[Source] = []
    findings: list[Finding] = []
    wanted = [("base", "model.base", run.model.base.path, run.model.base.revision)]
    for name, e in run.experts.items():
        if e.path is not None:
            wanted.append((name, f"experts.{name}", e.path, e.revision))
        elif name in run.model.roles:
            c = run.model.roles[name]
            wanted.append((name, f"experts.{name}", c.path, c.revision))
        else:
            roles = sorted(run.model.roles)
            findings.append(
                error(
                    "role",
                    f"experts.{name}",
                    f"model={run.model.name} has no role '{name}'.{did_you_mean(name, roles)} "
                    f"It has {', '.join(roles)}.",
                    f"Choose another expert set, leave it out with '~experts.{name}', or name a model: "
                    f"experts.{name}.path=...",
                )
            )
    if not run.experts:
        findings.append(error("inputs", "experts", "no expert takes part", "Choose a set: experts=balanced"))
    for name, key, path, revision in wanted:
        source, new = sources.locate(name, key, path, revision, zoo)
        found.append(source)
        findings += new
    keys = list(run.experts)

    def place(path: tuple[Any, ...]) -> str:
        if path[:1] == ("models",) and len(path) == 4:
            return recipes.expert_key(keys[path[1]], path[3])
        return "method." + ".".join(str(p) for p in path) if path[:1] == ("parameters",) else "method"

    return found, {}, place, findings


def _sources_of_file(
    run: Run, zoo: Callable[[str], Path]
) -> tuple[list[Source], dict[str, Any], layout.Place, list[Finding]]:
    key, text = "method.path", run.method.path
    place = layout.file_place(str(text))
    if text is None:
        return [], {}, place, [error("missing", key, "method=mergekit needs a file: method.path=my.yaml")]
    try:
        raw = yaml.safe_load(Path(text).expanduser().read_text(encoding="utf-8"))
    except OSError as e:
        return [], {}, place, [error("missing", key, f"cannot read {text}: {e.strerror}")]
    except (UnicodeDecodeError, yaml.YAMLError) as e:
        return [], {}, place, [error("corrupt", key, f"{text} is not YAML: {' '.join(str(e).split())}")]
    findings = layout.check_structure(raw, place)
    if findings:
        return [], {}, place, findings
    found: list[Source] = []
    for reference in recipes.models(raw):
        main, _, adapter = reference.partition("+")
        path, _, revision = main.partition("@")
        name = "base" if reference == raw.get("base_model") else _name(path, {s.name for s in found})
        full = path + (f"+{adapter}" if adapter else "")
        s, new = sources.locate(name, f"{text}: {reference}", full, revision or None, zoo)
        found.append(s)
        findings += new
    swap = {r: s.reference for r, s in zip(recipes.models(raw), found, strict=True)}
    return found, _replace_models(raw, swap), place, findings


def _name(path: str, taken: set[str]) -> str:
    stem = path.removeprefix(sources.ZOO).rstrip("/").rsplit("/", 1)[-1] or "model"
    name, n = stem, 2
    while name in taken or name in ("base", "merged"):
        name, n = f"{stem}-{n}", n + 1
    return name


def _replace_models(node: Any, swap: Mapping[str, str], key: str = "") -> Any:
    if isinstance(node, dict):
        return {k: _replace_models(v, swap, str(k)) for k, v in node.items()}
    if isinstance(node, list):
        return [_replace_models(v, swap, key) for v in node]
    if key in ("model", "base_model", "tokenizer_source", "source") and isinstance(node, str):
        return swap.get(node, node)
    return node


def _assumed(run: Run) -> Facts | None:
    """The base as its model file describes it, for when its files are not here."""
    config = dict(run.model.architecture)
    shapes = architecture.shapes(config) if config and not reads_file(run) else None
    if not shapes:
        return None
    names = {v: k for k, v in checkpoint.DTYPES.items()}
    dtype = names.get(str(config.get("torch_dtype", "bfloat16")), "BF16")
    return Facts(Path(), config, {n: Header(dtype, s, "") for n, s in shapes.items()})


def _unseen(assumed: Facts | None, absent: list[Source]) -> Iterator[Finding]:
    what = ", ".join(s.name for s in absent)
    if assumed is None:
        yield warning("unchecked", what, "not here, and their shapes are not known: nothing could be checked")
        return
    yield note(
        "unchecked",
        what,
        "not here: planned from the family's known shapes; their config.json, tensors, tokenizers and "
        "chat templates could not be checked",
    )


def _donor(
    run: Run, raw: Mapping[str, Any], found: list[Source], facts: Mapping[str, Facts]
) -> tuple[str | None, Facts | None]:
    """Whose config and tokenizer the output gets: mergekit's base_model, else the first model."""
    if not found:
        return None, None
    names = [s.name for s in found]
    if not reads_file(run) and run.method.base != "model" and len(names) > 1:
        # The first expert lends them; the comparison with the family's base stays.
        return names[1], facts.get("base")
    return names[0], facts.get(names[0])


def _recipe(
    run: Run,
    raw: dict[str, Any],
    place: layout.Place,
    found: list[Source],
    shape: Facts | None,
    overrides: list[str],
) -> tuple[dict[str, Any] | None, list[Finding]]:
    """The recipe, and everything that is wrong with what it asks for."""
    findings: list[Finding] = []
    known = methods.declarations()
    if reads_file(run):
        if not raw:
            return None, []
        recipe = raw
        where = place(("merge_method",))
        findings += _check_template(raw.get("chat_template"), place(("chat_template",)))
    else:
        where = "method.name"
        references = {s.name: s.reference for s in found}
        if methods.check_name(run.method.name, known, where) or set(run.experts) - set(references):
            return None, methods.check_name(run.method.name, known, where)
        if not run.experts:
            return None, []
        takes = methods.takes(known[run.method.name])
        findings += _no_effect(run, takes, overrides)
        try:
            recipe = recipes.build(run, references, takes, shape.dtype if shape else None)
        except InputError as e:
            key, _, message = str(e).partition(": ")
            return None, [*findings, error("setting", key, message)]
    findings += methods.check_name(recipe["merge_method"], known, where)
    if any(f.severity == "error" for f in findings):
        return None, findings
    d = known[recipe["merge_method"]]
    groups = layout.groups(recipe, place)
    tensors = layout.output_tensors(shape.config, groups) if shape else [[] for _ in groups]
    for g, names in zip(groups, tensors, strict=True):
        models = list(g.inputs)
        findings += methods.check_inputs(d, models, g.base, g.place if reads_file(run) else "experts")
        findings += methods.check_parameters(d, g.given, models, g.base, names)
    if reads_file(run):
        findings += _check_ranges(groups, found, shape)
        if recipe.get("base_model") is None:
            findings.append(
                note(
                    "no-base",
                    place(("base_model",)),
                    "not set; config and tokenizer come from the first model",
                )
            )
    computed = recipe.get("dtype") or (shape.dtype if shape else None)
    rescale = recipe.get("parameters", {}).get(
        "rescale", d.parameters.get("rescale") and d.parameters["rescale"].default
    )
    if computed == "float16" and rescale:
        findings.append(
            warning(
                "float16",
                "hardware.compute_dtype",
                "rescaling sums in float16 and can overflow to NaN",
                "Compute in float32.",
            )
        )
    return recipe, findings


def _no_effect(run: Run, takes: set[str], overrides: list[str]) -> Iterator[Finding]:
    """A weight or density that somebody typed, and that the method does not take."""
    for o in overrides:
        parts = o.lstrip("+").partition("=")[0].split(".")
        if (
            len(parts) == 3
            and parts[0] == "experts"
            and parts[2] in recipes.PER_MODEL
            and parts[2] not in takes
        ):
            yield error(
                "no-effect",
                o,
                f"method={run.method.name} takes no {parts[2]}",
                "Leave it out, or choose another method.",
            )


def _check_ranges(groups: list[layout.Group], found: list[Source], shape: Facts | None) -> Iterator[Finding]:
    depth = architecture.layer_count(shape.config) if shape else None
    for g in groups:
        for model, (start, end) in zip(g.inputs, g.ranges, strict=False):
            if depth is not None and end > depth:
                name = next((s.label for s in found if s.reference == model), model)
                yield error("layer-range", g.place, f"[{start}, {end}] of {name}, which has {depth} layers")


def _check_output(run: Run, output: Path, found: list[Source]) -> Iterator[Finding]:
    place = "output"
    for s in found:
        if s.folder and (output == s.folder or s.folder in output.parents):
            yield error(
                "output",
                place,
                f"{output} is the folder of {s.name}, which would be overwritten",
                "Choose another folder.",
            )
            return
    if output.is_file():
        yield error("output", place, f"{output} is a file", "Choose a folder that is not there yet.")
    elif output.exists() and any(output.iterdir()):
        yield error("output", place, f"{output} is not empty", "Choose a folder that is not there yet.")
    existing = next(p for p in (output.parent, *output.parent.parents) if p.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        yield error("output", place, f"no permission to write in {existing}", "Choose another folder.")


def _estimate(
    run: Run,
    recipe: Mapping[str, Any],
    shape: Facts,
    facts: Mapping[str, Facts],
    found: list[Source],
    output: Path,
) -> tuple[Estimate | None, list[Finding]]:
    shard, wrong = resources.parse_size(run.hardware.shard_size, "hardware.shard_size")
    if wrong:
        return None, []
    out_dtype = recipe.get("out_dtype") or recipe.get("dtype") or shape.dtype or "bfloat16"
    compute = recipe.get("dtype") or shape.dtype or "bfloat16"
    if str(out_dtype) not in resources.SIZE or str(compute) not in resources.SIZE:
        return None, []
    groups = layout.groups(recipe, lambda p: "")
    made = [n for names in layout.output_tensors(shape.config, groups) for n, _ in names]
    typical = {compare.generic(n): t.numel for n, t in shape.tensors.items()}
    elements = [typical[compare.generic(n)] for n in made if compare.generic(n) in typical]
    elements = elements or [t.numel for t in shape.tensors.values()]
    used = set(recipes.models(recipe))
    read = sum(
        facts[s.name].nbytes if s.name in facts else shape.nbytes for s in found if s.reference in used
    )
    e = resources.estimate(
        elements,
        max(len(g.inputs) for g in groups) + 1,
        read,
        out_bytes=resources.SIZE[str(out_dtype)],
        compute_bytes=resources.SIZE[str(compute)],
        shard=shard,
        device=run.hardware.device,
        low_memory=run.hardware.low_memory,
        evaluates=run.eval.kind != "none",
        output=output,
        exact=len(facts) == len(found),
    )
    return e, list(resources.check(e, output))
