"""Single values that are wrong by themselves, and settings that would have no effect."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from mergelab.core.dtypes import MERGEABLE
from mergelab.core.errors import did_you_mean, none_of
from mergelab.core.findings import MAY_PASS, Finding, Severity, error, warning
from mergelab.core.machine import existing
from mergelab.jobs.step import unread_settings
from mergelab.models.resolver import Source
from mergelab.preflight import engine_selection, evaluation_checks, resources
from mergelab.preflight.resolve_inputs import reads_file
from mergelab.recipes import mixtures
from mergelab.recipes.recipe import PER_MODEL
from mergelab.schema import Hardware, Run

SIXTY_HOURS = 3600
"""Minutes: as a bare number YAML reads 1:00:00 and more, unless they are in quotes."""
RESERVED = (
    "array", "chdir", "comment", "error", "job-name", "nodes", "ntasks", "ntasks-per-node", "open-mode",
    "output", "parsable", "signal", "wait", "wrap",
)  # fmt: skip
"""Options of sbatch by which we find our jobs and what they have done; nobody else may set them."""
CHAT_TEMPLATES = ("auto", "alpaca", "chatml", "exaone", "llama3", "mistral")

DECIDED_BY_FILE = (
    "experts", "method.parameters", "method.base", "model.tokenizer", "model.chat_template", "hardware.dtype",
    "hardware.compute_dtype",
)  # fmt: skip
"""Keys that mean nothing where a mergekit YAML file is run."""


def check(run: Run, overrides: Iterable[str], missing_severity: Severity) -> Iterator[Finding]:
    """What can be said of a run's own values without looking at a model.

    Args:
        overrides: what the user typed, to tell a setting that has no effect from a default.
        missing_severity: the severity of a device that this machine does not have.
    """
    h = run.hardware
    for key, value in (("hardware.dtype", h.dtype), ("hardware.compute_dtype", h.compute_dtype)):
        if value is not None and value not in MERGEABLE:
            yield error("setting", key, none_of(value, MERGEABLE))
    if h.threads is not None and h.threads < 1:
        yield error("setting", "hardware.threads", f"{h.threads} is out of range; at least 1")
    if not 0 <= run.seed < 2**32:
        yield error("setting", "seed", f"{run.seed} is out of range; 0 to 4294967295")
    for key, value in (("hardware.shard_size", h.shard_size), ("hardware.memory", h.memory)):
        yield from resources.check_size(value, key)
    yield from engine_selection.check(run)
    yield from evaluation_checks.check(run)
    if not h.on_cluster:
        yield from resources.check_device(h.device, h.devices, missing_severity)
    yield from _check_cluster(run)
    if run.model.tokenizer not in (None, "base", "union"):
        yield error("setting", "model.tokenizer", f"'{run.model.tokenizer}' is none of null, base, union")
    yield from check_template(run.model.chat_template, "model.chat_template")
    for key, codes in (("allow", run.allow), ("model.allow", run.model.allow)):
        for code in codes:
            if code not in MAY_PASS:
                message = (
                    f"no error that may be let pass has the code '{code}'.{did_you_mean(code, MAY_PASS)}"
                )
                yield error("setting", key, message, f"There are {', '.join(MAY_PASS)}.")
    yield from _no_effect(run, overrides)


def _check_cluster(run: Run) -> Iterator[Finding]:
    """The settings of a Slurm cluster, and those that mean nothing without one."""
    h, default = run.hardware, Hardware()
    if not h.on_cluster:
        for key in ("candidates_per_task", "detach", "scratch"):
            if getattr(h, key) != getattr(default, key):
                message = "it has no effect, because no cluster is asked for"
                yield error("no-effect", f"hardware.{key}", message, "Set hardware=slurm.")
        if run.tracking.sync:
            message = "it has no effect, for what this machine records it uploads by itself"
            yield error("no-effect", "tracking.sync", message, "Leave it out.")
        return
    if h.candidates_per_task < 1:
        message = f"{h.candidates_per_task} is out of range; at least 1"
        yield error("setting", "hardware.candidates_per_task", message)
    if h.workers > h.candidates_per_task >= 1:
        message = f"{h.workers} processes cannot share out {h.candidates_per_task} candidates a task"
        yield error("no-effect", "hardware.workers", message, "Raise hardware.candidates_per_task as well.")
    if (s := h.slurm) is None:  # another scheduler checks its own options
        return
    bounds = (
        ("slurm.cpus", s.cpus, 1), ("slurm.gpus", s.gpus, 0),
        ("slurm.warning", s.warning, 0), ("slurm.parallel", 1 if s.parallel is None else s.parallel, 1),
    )  # fmt: skip
    for key, value, least in bounds:
        if value < least:
            yield error("setting", f"hardware.{key}", f"{value} is out of range; at least {least}")
    if h.device != "cpu" and s.gpus < 1 and "gres" not in s.options:
        message = f"{s.gpus}, but hardware.device={h.device} needs one"
        yield error("setting", "hardware.slurm.gpus", message, "Set hardware.slurm.gpus=1.")
    if h.device == "cpu" and s.gpus > 0:
        message = f"{s.gpus}, but hardware.device=cpu uses none"
        yield error("no-effect", "hardware.slurm.gpus", message, "Set hardware.device=cuda, or 0 GPUs.")
    for name in s.options:
        if str(name).replace("_", "-") in RESERVED:
            message = "it is reserved: mergelab finds its jobs and their results by it"
            yield error("setting", f"hardware.slurm.options.{name}", message, "Leave it out.")
    if s.memory not in (None, "0"):
        if str(s.memory).strip().isdigit():
            yield error("type", "hardware.slurm.memory", f"'{s.memory}' has no unit", "Write it as 200GB.")
        else:
            yield from resources.check_size(str(s.memory), "hardware.slurm.memory")
    if s.time is not None and str(s.time).isdigit() and int(s.time) >= SIXTY_HOURS:
        message = f"{s.time} minutes are {int(s.time) / 1440:.0f} days"
        yield warning("type", "hardware.slurm.time", message, 'In a file write "12:00:00" in quotes.')
    if s.time is not None and not re.fullmatch(
        r"(\d+-)?\d+(:\d+){0,2}|UNLIMITED|INFINITE", str(s.time).upper()
    ):
        message = f"'{s.time}' is not a time as Slurm writes it"
        yield error("type", "hardware.slurm.time", message, "Write 90 (minutes), 12:00:00 or 2-00:00:00.")


def check_template(template: str | None, place: str) -> Iterator[Finding]:
    """A chat template: one of mergekit's names, or a text that Jinja can read."""
    if template is None or template in CHAT_TEMPLATES:
        return
    if "{" not in template:
        yield error(
            "chat-template",
            place,
            f"'{template}' is neither a Jinja template nor one of {', '.join(CHAT_TEMPLATES)}."
            f"{did_you_mean(template, CHAT_TEMPLATES)}",
        )
    elif "{% generation" not in template:  # a tag of transformers' own
        from jinja2 import Environment, TemplateSyntaxError

        try:
            Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        except TemplateSyntaxError as e:
            yield error("chat-template", place, f"Jinja cannot read it, line {e.lineno}: {e.message}")


def _no_effect(run: Run, overrides: Iterable[str]) -> Iterator[Finding]:
    def unused(key: str, why: str, remedy: str = "Leave it out.") -> Finding:
        return error("no-effect", key, f"it has no effect, for {why}", remedy)

    if reads_file(run):
        for o in overrides:
            key = o.lstrip("+~").partition("=")[0]
            if any(key == k or key.startswith(f"{k}.") for k in DECIDED_BY_FILE):
                yield unused(o, f"the file {run.method.path} decides it")
    else:
        if run.method.path is not None:
            remedy = (
                "Set method=mergekit_moe." if run.method.name == mixtures.METHOD else "Set method=mergekit."
            )
            yield unused("method.path", f"method={run.method.name} reads no file", remedy)
        for p in PER_MODEL if run.method.name != mixtures.METHOD else ():
            if run.method.parameters.get(p) is not None:
                message = f"{p} is set for each expert, not once"
                remedy = f"Set experts.ROLE.{p}."
                yield error("scope", f"method.parameters.{p}", message, remedy)
    for section, key in unread_settings(run):
        message = f"job={run.job.name} has no use for it"
        yield error("unused", f"{section}.{key}", message, f"Set job={section}.")


def pickled_allowed(run: Run) -> bool:
    """Whether weights in Python's pickle format will do."""
    return "pickled" in (*run.allow, *run.model.allow)


def check_output(output: Path, sources: list[Source]) -> Iterator[Finding]:
    """Whether a model may be written to a folder."""
    place, elsewhere = "output", "Choose a folder that is not there yet: output=DIR"
    for s in sources:
        for folder in (s.folder, s.adapter):
            if folder and (output == folder or folder in output.parents):
                message = f"{output} is the folder of {s.name}, which would be overwritten"
                yield error("output", place, message, elsewhere)
                return
    there = existing(output)
    if not there.is_dir():
        yield error("output", place, f"{there} is not a folder", elsewhere)
    elif there == output and any(output.iterdir()):
        yield error("output", place, f"{output} is not empty", elsewhere)
    elif not os.access(output.parent if there == output else there, os.W_OK | os.X_OK):
        yield error("output", place, f"no permission to write in {there}", elsewhere)
