"""The models of a run, whether it is composed of a family and experts or reads a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mergelab.core.errors import did_you_mean
from mergelab.core.findings import Finding, error
from mergelab.models.resolver import ZOO, Source, Zoo, locate
from mergelab.recipes import file_schema, mixtures
from mergelab.recipes import recipe as recipes
from mergelab.recipes.recipe_groups import KeyOf
from mergelab.schema import Run
from mergelab.schema.conditions import FILE_METHODS


@dataclass(frozen=True)
class Inputs:
    """The models that a run merges."""

    sources: list[Source]
    """All models. The first one is the base, or the model that is used instead."""
    place: KeyOf
    """Maps a path into the recipe to the user's key."""
    findings: list[Finding] = field(default_factory=list)
    file: dict[str, Any] | None = None
    """The recipe of a file, with its models replaced by their folders."""
    config_source: str | None = None
    """The name of the source whose config and tokenizer the output gets."""


def reads_file(run: Run) -> bool:
    """Whether the run takes its models from a mergekit YAML file."""
    return run.method.name in FILE_METHODS


def keeps_dtypes(run: Run) -> bool:
    """Whether each tensor is written in the dtype that the base holds it in."""
    return run.hardware.dtype is None and not reads_file(run)


def find(run: Run, zoo: Zoo) -> Inputs:
    """Find every model of a run on this machine, without the network."""
    return _of_file(run, zoo) if reads_file(run) else _of_experts(run, zoo)


def _of_experts(run: Run, zoo: Zoo) -> Inputs:
    base = run.model.base
    found, findings = locate("base", "model.base", base.path, base.revision, zoo)
    sources, config_source = [found], "base"
    for name, e in run.experts.items():
        key, family = f"experts.{name}", run.model.roles.get(name)
        if e.path is not None:
            source, new = locate(name, key, e.path, e.revision, zoo)
        elif family is not None:
            source, new = locate(name, key, family.path, e.revision or family.revision, zoo)
        else:
            findings.append(_no_role(run, name))
            continue
        if len(sources) == 1 and run.method.base != "model":
            config_source = name
        findings += new
        sources.append(source)
    if not run.experts:
        findings.append(error("inputs", "experts", "there is no expert", "Choose a set: experts=balanced"))
    keys = list(run.experts)
    if mixtures.wanted(run):
        return Inputs(sources, mixtures.place(keys), findings, None, config_source)
    findings += _duplicates(sources if run.method.base == "model" else sources[1:])

    def place(path: tuple[Any, ...]) -> str:
        if path[:1] == ("models",) and len(path) == 4:
            return recipes.expert_key(keys[path[1]], path[3])
        if path[:1] == ("parameters",):
            return "method." + ".".join(str(p) for p in path)
        return "experts" if path[:1] == ("models",) else "method"

    return Inputs(sources, place, findings, None, config_source)


def _no_role(run: Run, name: str) -> Finding:
    roles = sorted(run.model.roles)
    return error(
        "role",
        f"experts.{name}",
        f"model={run.model.name} has no role '{name}'.{did_you_mean(name, roles)} "
        f"It has {', '.join(roles) or 'none'}.",
        f"Choose another expert set, leave it out with '~experts.{name}', or name a model: "
        f"experts.{name}.path=...",
    )


def _duplicates(sources: list[Source]) -> Iterator[Finding]:
    seen: dict[str, str] = {}
    for s in sources:
        first = seen.setdefault(s.reference, s.key)
        if first != s.key:
            message = f"{s.label} is already used as {first}"
            yield error("duplicate", s.key, message, f"Leave one out: '~{s.key}'")


def _of_file(run: Run, zoo: Zoo) -> Inputs:
    text = run.method.path
    place = file_schema.file_place(str(text))
    raw, findings = _load(run)
    check = mixtures.check_structure if mixtures.wanted(run) else file_schema.check
    findings = findings or check(raw, place)
    if findings:
        return Inputs([], place, findings)
    sources: list[Source] = []
    swap: dict[str, str] = {}
    for reference in recipes.models(raw):
        main, plus, adapter = reference.partition("+")
        path, _, revision = main.partition("@")
        name = "base" if reference == raw.get("base_model") else _name(path, {s.name for s in sources})
        source, new = locate(name, f"{text}: {reference}", path + plus + adapter, revision or None, zoo)
        sources.append(source)
        swap[reference] = source.reference
        findings += new
    return Inputs(sources, place, findings, recipes.renamed(raw, swap), sources[0].name)


def _load(run: Run) -> tuple[Any, list[Finding]]:
    key, text = "method.path", run.method.path
    if text is None:
        return None, [
            error("missing", key, f"method={run.method.name} needs a file", "Set method.path=my.yaml.")
        ]
    try:
        return yaml.safe_load(Path(text).expanduser().read_text(encoding="utf-8")), []
    except OSError as e:
        return None, [error("missing", key, f"cannot read {text}: {e.strerror}")]
    except (UnicodeDecodeError, yaml.YAMLError) as e:
        return None, [error("corrupt", key, f"{text} is not YAML: {' '.join(str(e).split())}")]


def _name(path: str, taken: set[str]) -> str:
    """A short name for a model that has only a path."""
    stem = path.removeprefix(ZOO).rstrip("/").rsplit("/", 1)[-1] or "model"
    name, n = stem, 2
    while name in taken or name in ("base", "merged"):
        name, n = f"{stem}-{n}", n + 1
    return name
