"""The values of a run by themselves: what the schema declares of each, and what relates several."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from mergelab.core.errors import did_you_mean
from mergelab.core.findings import MAY_PASS, Finding, Severity, error, warning
from mergelab.core.machine import existing_parent
from mergelab.jobs.step import unread_settings
from mergelab.models.resolver import Source
from mergelab.preflight import evaluation_checks, resources
from mergelab.recipes.recipe import PER_MODEL
from mergelab.schema import Run, validation
from mergelab.schema.conditions import FILE_METHODS, MIXTURE

SIXTY_HOURS = 3600
"""Minutes: as a bare number YAML reads 1:00:00 and more, unless they are in quotes."""
RESERVED = (
    "array", "chdir", "comment", "error", "job-name", "nodes", "ntasks", "ntasks-per-node", "open-mode",
    "output", "parsable", "signal", "wait", "wrap",
)  # fmt: skip
"""Options of sbatch by which mergelab finds its jobs and their results. Nobody else may set them."""
CHAT_TEMPLATES = ("auto", "alpaca", "chatml", "exaone", "llama3", "mistral")


def check(run: Run, overrides: Iterable[str], missing_severity: Severity) -> Iterator[Finding]:
    """What can be said of a run's own values without looking at a model.

    The rules of single values stand beside the fields of the schema; here are those that relate several.

    Args:
        overrides: what the user typed, to distinguish a setting that has no effect from a default.
        missing_severity: the severity of a device that this machine does not have.
    """
    unread = list(unread_settings(run))
    for section, key in unread:
        message = f"job={run.job.name} does not use it"
        yield error(
            "unused", f"{section}.{key}", message, f"Leave it out; a job with the step {section} reads it."
        )
    yield from validation.check(run, overrides, unread={section for section, _ in unread})
    yield from evaluation_checks.check(run)
    yield from _check_cluster(run, missing_severity)
    yield from check_template(run.model.chat_template, "model.chat_template")
    for key, codes in (("allow", run.allow), ("model.allow", run.model.allow)):
        for code in codes:
            if code not in MAY_PASS:
                message = (
                    f"no error that may be let pass has the code '{code}'.{did_you_mean(code, MAY_PASS)}"
                )
                yield error("setting", key, message, f"There are {', '.join(MAY_PASS)}.")
    yield from _check_scope(run)


def _check_cluster(run: Run, missing_severity: Severity) -> Iterator[Finding]:
    """The device, and what a Slurm task requests for it."""
    h = run.hardware
    if not h.on_cluster:
        yield from resources.check_device(h.device, h.devices, missing_severity)
    if h.slurm is None:  # another scheduler checks its own options
        return
    for key, s in (("hardware.slurm", h.slurm), ("search.controller_job", run.search.controller_job)):
        for name in s.options:
            if str(name).replace("_", "-") in RESERVED:
                message = "it is reserved: mergelab finds its jobs and their results by it"
                yield error("setting", f"{key}.options.{name}", message, "Leave it out.")
        if s.time is not None and str(s.time).isdigit() and int(s.time) >= SIXTY_HOURS:
            message = f"{s.time} minutes are {int(s.time) / 1440:.0f} days"
            yield warning("type", f"{key}.time", message, 'In a file write "12:00:00" in quotes.')
    gpus, key = h.slurm.gpus, "hardware.slurm.gpus"
    if h.device != "cpu" and gpus < 1 and "gres" not in h.slurm.options:
        message = f"{gpus}, but hardware.device={h.device} needs one"
        yield error("setting", key, message, "Set hardware.slurm.gpus=1.")
    if h.device == "cpu" and gpus > 0:
        message = f"{gpus}, but hardware.device=cpu uses none"
        yield error("no-effect", key, message, "Set hardware.device=cuda, or 0 GPUs.")


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


def _check_scope(run: Run) -> Iterator[Finding]:
    """Parameters of each expert that were given once for all."""
    if run.method.name in (MIXTURE, *FILE_METHODS):
        return
    for p in PER_MODEL:
        if run.method.parameters.get(p) is not None:
            message = f"{p} is set for each expert, not once"
            yield error("scope", f"method.parameters.{p}", message, f"Set experts.ROLE.{p}.")


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
    there = existing_parent(output)
    if not there.is_dir():
        yield error("output", place, f"{there} is not a folder", elsewhere)
    elif there == output and any(output.iterdir()):
        yield error("output", place, f"{output} is not empty", elsewhere)
    elif not os.access(output.parent if there == output else there, os.W_OK | os.X_OK):
        yield error("output", place, f"no permission to write in {there}", elsewhere)
