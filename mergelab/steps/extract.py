"""extract: a LoRA adapter from what sets an expert, or a finished model, apart from the base."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from mergelab import __version__, preflight
from mergelab.context import family, other_findings, tell
from mergelab.core.errors import did_you_mean
from mergelab.core.findings import Finding, error, first_few, stop_on_errors
from mergelab.core.folders import move, sync
from mergelab.core.run_dir import RunDir, find_model, finished_model, read_json, short_path, write_text
from mergelab.core.sizes import format_size
from mergelab.jobs import Step, register
from mergelab.lora import extract
from mergelab.lora.verify import Part, relative_error
from mergelab.models import blueprint
from mergelab.models.architecture import tied
from mergelab.models.checkpoint import ModelMetadata
from mergelab.models.resolver import Source
from mergelab.preflight import value_checks
from mergelab.report import score_table, terminal
from mergelab.schema import Evaluation, Expert, Extract, Method, Run

HEADS = ["", "modules", "rank", "kept", "error"]
WHOLE = "whole model"


def findings(run: Run) -> Iterator[Finding]:
    """What is wrong with the choice of a model."""
    e = run.extract
    if e.model is None and e.path is None:
        yield error(
            "setting", "extract.model", "is not set; name an expert, or a finished model by extract.path=DIR"
        )
    elif e.model is not None and e.path is not None:
        yield error(
            "setting", "extract.path", f"extract.model={e.model} names a model, too; leave one of them out"
        )
    elif e.model is not None and e.model not in (names := _experts(run)):
        near = did_you_mean(e.model, names)
        yield error(
            "setting",
            "extract.model",
            f"'{e.model}' is not an expert.{near} There are {', '.join(names) or 'none'}.",
        )
    elif e.path is not None:
        try:
            find_model(e.path)
        except LookupError as wrong:
            yield error("setting", "extract.path", str(wrong.args[0]))


def execute(run: Run, run_dir: RunDir) -> str:
    """Write the adapter aside, measure what it leaves of the difference, and move it into place.

    Raises:
        InputErrors: with all that is wrong with settings and models, before a weight is read.
        StepError: where nothing can be extracted, or something fails; nothing is then left.
    """
    run_dir = replace(run_dir, model=run_dir.model if run.output else run_dir.folder / "adapter")
    plan = examine(run, run_dir)
    tell(plan, "warning")
    stop_on_errors(plan.findings)
    base, source = plan.sources
    with terminal.progress() as progress, run_dir.staging() as out:
        parts = extract.extract(
            plan.facts[base.name],
            plan.facts[source.name],
            out,
            known_as=(base.path, base.commit) if base.commit else (str(base.folder), None),
            settings=run.extract,
            hardware=run.hardware,
            trust_remote_code=run.model.trust_remote_code,
            progress=progress,
        )
        size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
        command = read_json(run_dir.result)["command"]
        write_text(out / "README.md", card(base, source, parts, run.extract, run_dir.model.name, command))
        sync(out)
        move(out, run_dir.model)
    run_dir.record({"adapter": str(run_dir.model), "extraction": record(base, source, parts, run.extract)})
    body = rows(parts)
    if not terminal.brief:
        terminal.table(f"{source.label} − {base.label}", HEADS, body, texts=1)
        terminal.aside(f"As an expert: {_as_expert(run, base, run_dir.model)}")
    return f"rank {body[-1][2]}, error {body[-1][4]}, {format_size(size)}"


def _as_expert(run: Run, base: Source, adapter: Path) -> str:
    """The arguments that let the adapter stand for its model in a merge."""
    key = f"experts.{run.extract.model or 'NAME'}"
    revision = f" {key}.revision={base.revision}" if base.revision else ""
    return f"{key}.path={base.path}+{short_path(adapter)}{revision}"


def examine(run: Run, run_dir: RunDir) -> preflight.Plan:
    """What can be said of the base and the one model, without reading a weight."""
    key, expert = _subject(run)
    asked = replace(run, experts=expert, method=Method(name="linear"), eval=Evaluation(kind="none"))
    with terminal.progress() as progress:
        plan = preflight.examine(
            asked,
            output=run_dir.model,
            overrides=run.overrides,
            zoo=lambda role: family(run, progress).checkpoint(role),
            merges=False,
            more=other_findings(replace(run, eval=asked.eval)),
        )
    found = [_renamed(f, key, *expert) for f in plan.findings if f.code not in ("inputs", "no-tokenizer")]
    found += [f for s in plan.sources for f in _unsuitable(s, plan.facts.get(s.name), key)]
    found += value_checks.check_output(run_dir.model, plan.sources)
    base = plan.facts.get("base")
    if base and base.tensors and not any(f.place.startswith("extract.") for f in found):
        found += _check_modules(run.extract, base)
    return replace(plan, findings=found)


def _experts(run: Run) -> list[str]:
    """The names that extract.model may have: experts with a path of their own, and the family's roles."""
    return sorted({n for n, e in run.experts.items() if e.path is not None} | {*run.model.roles})


def _subject(run: Run) -> tuple[str, dict[str, Expert]]:
    """The key that names the model, and the model by its name; none where `problems` has something
    against it."""
    e = run.extract
    if any(f.place in ("extract.model", "extract.path") for f in findings(run)):
        return "extract.model", {}
    if e.path is not None:
        return "extract.path", {"expert": Expert(path=str(finished_model(e.path, "extract.path")))}
    return "extract.model", {str(e.model): run.experts.get(str(e.model), Expert())}


def _renamed(f: Finding, key: str, name: str = "") -> Finding:
    """A finding about the expert in the words of this job."""
    if f.code == "duplicate":
        return error("duplicate", key, "it is the base itself (model.base): there is nothing to extract")
    remedy = (
        "An adapter can only be put on a base of the same vocabulary." if f.code == "vocabulary" else f.remedy
    )
    return replace(f, place=f.place.replace(f"experts.{name}", key), remedy=remedy)


def _unsuitable(s: Source, facts: ModelMetadata | None, key: str) -> Iterator[Finding]:
    """A model that can be merged, but not be taken apart here."""
    place = "model.base" if s.name == "base" else key
    if s.adapter:
        yield error("adapter", place, f"{s.path} has an adapter already", "Name a model without one.")
    if facts and facts.pickled:
        message = f"the weights of {facts.folder} are pickled, and only safetensors are read here"
        yield error("format", place, message, "Convert them: load with transformers and save_pretrained.")


def _check_modules(e: Extract, base: ModelMetadata) -> Iterator[Finding]:
    """Patterns that match nothing or leave nothing, and what the base does not allow."""
    modules = dict.fromkeys(n.rpartition(".")[0] for n in base.tensors)
    idle = [
        (f"extract.{key}", pattern)
        for key in ("include", "exclude")
        for pattern in getattr(e, key)
        if not any(re.search(pattern, m) for m in modules)
    ]
    for place, pattern in idle:
        yield error(
            "setting", place, f"'{pattern}' matches none of the modules, such as {first_few(modules)}"
        )
    found = blueprint.of(base)
    tokens = {n for n in base.tensors if found and found.vocabulary_axis(n) is not None}
    matrices = {n for n, t in base.tensors.items() if len(t.shape) == 2} - tokens
    if not idle and not any(extract.selected(n.rpartition(".")[0], e) for n in matrices):
        place = "extract.exclude" if e.exclude else "extract.include"
        yield error("setting", place, "it leaves no weight matrix to decompose; embeddings are saved whole")
    if e.embeddings and tied(base.text_config):
        message = "the base's head is its embedding, and peft cannot merge factors of a weight with two uses"
        yield error("setting", "extract.embeddings", message, "Leave it out: embeddings are saved whole.")


def _kinds(parts: Sequence[Part]) -> dict[str, list[Part]]:
    kinds: dict[str, list[Part]] = {}
    for p in parts:
        kinds.setdefault(p.kind, []).append(p)
    return kinds


def _ranks(parts: Iterable[Part]) -> str:
    """`4–8`, `whole`, `left out`, or several of these."""
    listed = list(parts)
    ranks = sorted({p.rank for p in listed if p.rank})
    whole = sum(p.whole for p in listed)
    left = sum(not p.whole and not p.rank for p in listed)
    texts = [f"{ranks[0]}–{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])] if ranks else []
    for count, what in ((whole, "whole"), (left, "left out")):
        if count:
            texts.append(what if count == len(listed) else f"{count} {what}")
    return ", ".join(texts)


def rows(parts: Sequence[Part]) -> list[list[str]]:
    """A row for each kind of module that differs, as `HEADS`; the last for all of them together."""
    table = []
    for kind, those in _kinds(parts).items():
        table.append([kind, f"{len(those):,}", _ranks(those), *_quality(those)])
    ranks = _ranks(p for p in parts if p.rank)
    return [*table, [WHOLE, f"{len(parts):,}", ranks, *_quality(parts)]]


def _quality(parts: Sequence[Part]) -> list[str]:
    """The share of the difference's squares that is kept, and the relative error."""
    wrong = relative_error(parts)
    return [f"{1 - wrong**2:.1%}", f"{wrong:.3f}" if wrong == 0 or wrong >= 0.001 else f"{wrong:.0e}"]


def record(base: Source, source: Source, parts: Sequence[Part], e: Extract) -> dict[str, Any]:
    """What result.json keeps of an extraction."""

    def quality(those: Sequence[Part]) -> dict[str, Any]:
        ranks = [p.rank for p in those if p.rank]
        wrong = relative_error(those)
        return {
            "modules": len(those),
            "rank": [min(ranks), max(ranks)] if ranks else None,
            "whole": sum(p.whole for p in those),
            "left_out": sum(not p.rank and not p.whole for p in those),
            "kept": 1 - wrong**2,
            "error": wrong,
        }

    return {
        "base": base.label,
        "source": source.label,
        "settings": {"rank": e.rank, "epsilon": e.epsilon, "embeddings": e.embeddings,
                     "include": e.include, "exclude": e.exclude},
        **quality(parts),
        "kinds": {kind: quality(those) for kind, those in _kinds(parts).items()},
        "tensors": {p.tensor: {"norm": p.norm, "rank": p.rank or None, "whole": p.whole,
                               "error": p.residual / p.norm} for p in parts},
    }  # fmt: skip


def card(base: Source, source: Source, parts: Sequence[Part], e: Extract, name: str, command: str) -> str:
    """The adapter's card as Markdown, with the front matter that the hub reads.

    Args:
        name: the adapter's.
        command: what made it.
    """
    front: dict[str, Any] = {"library_name": "peft", "tags": ["lora", "mergekit", "mergelab"]}
    if base.commit:
        front |= {"base_model": base.path, "base_model_relation": "adapter"}
    body = rows(parts)
    return "\n".join(
        [
            "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---\n",
            f"# {name}\n",
            f"A LoRA of rank {body[-1][2]} that turns `{base.label}` into `{source.label}`, but for a "
            f"relative error of {body[-1][4]}: the Frobenius norm of what is left of the difference, over "
            f"that of the difference. Extracted by mergelab {__version__} with mergekit "
            f"{version('mergekit')} at extract.rank={e.rank}; measured on these files as peft "
            f"{version('peft')} loads them:\n",
            score_table.markdown(["module", *HEADS[1:]], body) + "\n",
            "Only modules in which the two models differ are counted; kept is 1 - error².\n",
            "## Command\n",
            f"```\n{command}\n```\n",
        ]
    )


STEP = register(Step("extract", execute, settings="extract", findings=findings, recorded=False))
