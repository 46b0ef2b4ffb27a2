"""The models that job=generate asks: found on this machine, and looked at without their weights."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mergelab.context import family
from mergelab.core.errors import none_of
from mergelab.core.findings import Finding, apply_allow, error, stop_on_errors
from mergelab.core.run_dir import find_model
from mergelab.models import adapters, checkpoint, remote_code, tensor_checks
from mergelab.models.resolver import Source
from mergelab.preflight import evaluation_checks, resolve_inputs, resources
from mergelab.preflight.value_checks import pickled_allowed
from mergelab.report import terminal
from mergelab.schema import Run
from mergelab.schema.steps import MERGED

OF_ALL = ("duplicate", "inputs")
"""Codes of what is wrong with the composition as a whole, and no matter to a model by itself."""


@dataclass(frozen=True)
class Subject:
    """A model that is asked, and where it is."""

    name: str
    label: str
    """How people know it."""
    folder: Path
    adapter: Path | None = None
    context: int | None = None
    """Tokens that prompt and answer may have together; None: not known to be limited."""


def choose(run: Run, overrides: Iterable[str]) -> list[Subject]:
    """The models that `generate.models` names.

    Args:
        overrides: what the user typed, for the command that fetches what is missing.
    Raises:
        InputErrors: with all that is wrong with them; of models that are not asked nothing is said.
    """
    sources, findings = _named(run)
    findings += resources.check_device(run.hardware.device, 1, "error")
    if absent := [part for s in sources for part in s.parts if part.absent]:
        message = f"not on this machine: {', '.join(s.label for s in absent)}"
        typed = [o for o in overrides if not o.startswith(("job=", "generate."))]
        remedy = "Fetch first:\n  " + shlex.join(["python", "-m", "mergelab", "job=fetch", *typed])
        findings.append(error("not-downloaded", ", ".join(s.key for s in absent), message, remedy))
    subjects = []
    for s in sources:
        if s.folder:
            subject, wrong = _look(run, s, s.folder)
            subjects.append(subject)
            findings += wrong
    if run.model.trust_remote_code and len(subjects) == len(sources):
        findings += remote_code.check_needed(s.folder for s in subjects)
    settled = apply_allow(findings, [*run.allow, *run.model.allow])
    stop_on_errors(settled)
    for f in settled:
        terminal.finding(f.severity, f.text())
    return subjects


def _named(run: Run) -> tuple[list[Source], list[Finding]]:
    """The models by their names, and the names that no model has."""
    g = run.generate
    names = list(g.models) or ([MERGED] if g.path is not None else [])
    sources, findings = _merged(g.path) if g.path is not None else ({}, [])
    places = {MERGED: "generate.path"}
    if names != [MERGED]:
        with terminal.progress() as progress:
            found = resolve_inputs.find(run, lambda role: family(run, progress).checkpoint(role))
        sources = {s.name: s for s in found.sources} | sources
        composed = {s.name: s.key for s in found.sources}
        if not resolve_inputs.reads_file(run):  # with those for which the family has no role
            composed |= {n: f"experts.{n}" for n in run.experts}
        names = names or list(composed)
        places = composed | places
        others = {place for name, place in places.items() if name not in names}
        findings += [f for f in found.findings if f.place not in others and f.code not in OF_ALL]
    for name in names:
        if name not in places:
            findings.append(error("setting", "generate.models", none_of(name, places)))
    return [sources[n] for n in names if n in sources], findings


def _merged(path: str) -> tuple[dict[str, Source], list[Finding]]:
    key = "generate.path"
    try:
        folder = find_model(path)
    except LookupError as e:
        return {}, [error("missing", key, str(e.args[0]))]
    return {MERGED: Source(MERGED, key, str(folder), folder=folder)}, []


def _look(run: Run, source: Source, folder: Path) -> tuple[Subject, list[Finding]]:
    """A model without its weights, and what is to be said of it."""
    place, allowed = source.key, run.model.trust_remote_code
    facts = checkpoint.read(folder, place, source.repair, pickled=pickled_allowed(run))
    findings = [f for f in facts.findings if f.code not in checkpoint.OF_MERGES]
    if len(findings) == len(facts.findings):  # quantised weights have names of their own
        complete = tensor_checks.check_complete(facts, place, source.repair, merged=False)
        findings += [f for f in complete if f.severity == "error"]
    if facts.config and not facts.has_tokenizer:
        findings.append(error("no-tokenizer", place, facts.no_tokenizer))
    findings += remote_code.check(folder, place, allowed=allowed, commit=source.commit)
    findings += evaluation_checks.check_model(run, facts, place)
    findings += _look_at_adapter(run, source, facts)
    config = facts.text_config
    context = config.get("max_position_embeddings", config.get("n_positions"))
    known = context if isinstance(context, int) else None
    return Subject(source.name, source.label, folder, source.adapter, known), findings


def _look_at_adapter(run: Run, source: Source, facts: checkpoint.ModelMetadata) -> Iterator[Finding]:
    """What is to be said of an adapter, if there is one, and of its base together."""
    yield from adapters.check(source, facts)
    if source.adapter is None:
        return
    if run.hardware.quantize != "none" and run.hardware.device == "cpu":
        message = f"{run.hardware.quantize} is not possible with the adapter of {source.name} on a CPU"
        yield error("setting", "hardware.quantize", message, "Set hardware.quantize=none.")
