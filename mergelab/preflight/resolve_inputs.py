"""The models of a run, whether it is composed of a family and experts or reads a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from mergelab.core.errors import did_you_mean
from mergelab.core.findings import MAY_PASS, Finding, error, warning
from mergelab.models import json_files
from mergelab.models.resolver import ZOO, Source, Zoo, locate
from mergelab.recipes import file_schema, mixtures, references, stages, yaml_documents
from mergelab.recipes import recipe as recipes
from mergelab.recipes.recipe_groups import KeyOf
from mergelab.recipes.yaml_documents import Document
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
    alike: frozenset[str] = frozenset()
    """The names of sources that a file says to have the first one's architecture."""


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
    document, findings = _load(run)
    if document is None:
        return Inputs([], place, findings)
    findings = [_ignored_twice(place(path)) for path in document.twice]
    content, architectures = document.content, dict[str, str]()
    if mixtures.wanted(run):
        recipe, new = mixtures.read(content, place, document.held)
    else:
        recipe, architectures, new = file_schema.read(content, place, document.held)
    findings += new
    if any(f.severity == "error" and f.code not in MAY_PASS for f in findings):
        return Inputs([], place, findings)
    sources: list[Source] = []
    swap: dict[str, str] = {}
    said: dict[str, str] = {}
    for reference in recipes.models(recipe):
        name = "base" if reference == recipe.get("base_model") else None
        source, new = _locate(str(text), reference, name, {s.name for s in sources}, zoo)
        sources.append(source)
        swap[reference] = source.reference
        findings += new
        said |= {source.name: architectures[reference]} if reference in architectures else {}
    for reference in _tokenizer_sources(recipe) - {*swap, "union", "base"}:
        source, new = _locate(str(text), reference, None, {s.name for s in sources}, zoo)
        swap[reference] = source.reference
        findings += new
        if source.absent:
            remedy = f"Fetch it:\n  {source.download}"
            findings.append(error("not-downloaded", source.key, "not on this machine yet", remedy))
    alike, new = _overridden(sources, said)
    file = recipes.renamed(recipe, swap)
    return Inputs(sources, place, [*findings, *new], file, sources[0].name, alike)


def _locate(
    file: str, reference: str, name: str | None, taken: set[str], zoo: Zoo
) -> tuple[Source, list[Finding]]:
    """A model of a file, in which a revision that means nothing is ignored as it is by mergekit."""
    r = references.parse(reference)
    path = replace(r, revision=None).text
    found, findings = locate(name or _name(r.path, taken), f"{file}: {reference}", path, r.revision, zoo)
    return found, [replace(f, severity="warning") if f.code == "no-effect" else f for f in findings]


def _overridden(sources: list[Source], said: Mapping[str, str]) -> tuple[frozenset[str], list[Finding]]:
    """The models that mergekit's `override_architecture` calls what the first model is.

    Where it differs from config.json in another way, that is an error.

    Args:
        said: What it says, by the names of the sources.
    """
    own = {s.name: _architecture_of(s) for s in sources}
    first = sources[0].name
    other = {s.name: s for s in sources if s.folder and s.name in said and said[s.name] != own[s.name]}
    alike = frozenset(n for n in other if n != first and said[n] == own[first])
    message = "override_architecture is {}, and its config.json says {}"
    remedy = "Set `architectures` in a copy of that config.json, beside links to the model's other files."
    return alike, [
        error("architecture-override", s.key, message.format(said[n], own[n]), remedy)
        for n, s in other.items()
        if n not in alike
    ]


def _architecture_of(source: Source) -> str | None:
    if source.folder is None:
        return None
    config, _ = json_files.load_json(source.folder / "config.json", source.key, "")
    names = config.get("architectures") if isinstance(config, dict) else None
    return str(names[0]) if isinstance(names, list) and names else None


def _tokenizer_sources(recipe: Mapping[str, Any]) -> set[str]:
    """Where the tokenizer comes from, be it a model of the merge or not."""
    named = (recipe.get("tokenizer_source"), (recipe.get("tokenizer") or {}).get("source"))
    return {n for n in named if n is not None}


def _ignored_twice(place: str) -> Finding:
    return warning("no-effect", place, "it stands here twice, and the last one counts")


def _load(run: Run) -> tuple[Document | None, list[Finding]]:
    key, text = "method.path", run.method.path
    if text is None:
        return None, [
            error("missing", key, f"method={run.method.name} needs a file", "Set method.path=my.yaml.")
        ]
    try:
        documents = yaml_documents.parse(Path(text).expanduser().read_text(encoding="utf-8"))
    except OSError as e:
        return None, [error("missing", key, f"cannot read {text}: {e.strerror}")]
    except (UnicodeDecodeError, yaml.YAMLError) as e:
        return None, [error("corrupt", key, f"{text} is not YAML: {' '.join(str(e).split())}")]
    if len(documents) > 1:
        contents = [d.content for d in documents]
        return None, [stages.refusal(key, text, run.method.name, contents)]
    return documents[0], []


def _name(path: str, taken: set[str]) -> str:
    """A short name for a model that has only a path."""
    stem = path.removeprefix(ZOO).rstrip("/").rsplit("/", 1)[-1] or "model"
    name, n = stem, 2
    while name in taken or name in ("base", "merged"):
        name, n = f"{stem}-{n}", n + 1
    return name
