"""fetch: download what the run's models and its evaluation need, so that nodes need no internet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mergelab import context, evaluation
from mergelab.core.errors import InputError, StepError
from mergelab.core.findings import apply_allow, stop_on_errors
from mergelab.core.run_dir import RunDir
from mergelab.core.sizes import format_size
from mergelab.hub import cache
from mergelab.hub import plan as plans
from mergelab.hub.download import Wanted, download
from mergelab.hub.plan import Model, Plan
from mergelab.hub.repository import Need
from mergelab.jobs import Step, register
from mergelab.preflight import resolve_inputs
from mergelab.preflight.value_checks import pickled_allowed
from mergelab.report import terminal
from mergelab.schema import Run

COMMIT = 40
"""Digits of a whole commit."""


def execute(run: Run, run_dir: RunDir) -> str:
    """Show what is here and what is not, and download that.

    Raises:
        InputErrors: with all that the hub refuses, before anything is downloaded.
        StepError: when a download fails, or a data set does.
    """
    context.check_settings(run, run_dir)
    with terminal.progress() as progress:
        asked = resolve_inputs.find(run, lambda role: context.family(run, progress).checkpoint(role))
    # An adapter that is not whole is what a fetch mends.
    stop_on_errors(f for f in asked.findings if f.code != "adapter")
    with terminal.waiting() as waiting:
        waiting("asking the hub")
        need = Need(code=run.model.trust_remote_code, pickled=pickled_allowed(run))
        plan = plans.make(asked.sources, need, gated=run.model.gated)
    show(plan)
    findings = apply_allow(plan.findings, [*run.allow, *run.model.allow])
    for f in findings:
        if f.severity != "error" or run.fetch.dry_run:
            terminal.finding("warning", f.text())
    tasks = evaluation.kind_of(run.eval).data(run) if run.fetch.data else []
    if run.fetch.dry_run:
        _tell_pins(run, plan.models)
        if tasks:
            terminal.aside(f"The data of {', '.join(tasks)} would be read, too.")
        refused = any(f.severity == "error" for f in findings)
        known = (
            f"{format_size(plan.left)} to download" if plan.left or not refused else "how much is not known"
        )
        return f"{known}{', if all could be had' if plan.left and refused else ''}; nothing was downloaded"
    stop_on_errors(findings)
    fetched = list(_fetched(plan.wanted))
    with terminal.progress(nbytes=True) as progress:
        download(plan.wanted, workers=run.fetch.workers, progress=progress)
    run_dir.record({"fetched": fetched, "cache": str(cache.root())})
    if tasks:
        _read_data(run)
    _tell_pins(run, plan.models)
    downloaded = sum(f["downloaded"] for f in fetched)
    models = f"{format_size(downloaded)} downloaded" if downloaded else "every model was here"
    return f"{models}; the data of {len(tasks)} tasks read" if tasks else models


def show(plan: Plan) -> None:
    """A row for each model, and what the cache has room for."""
    rows = [_row(m) for m in plan.models]
    total = sum(f.size for w in plan.wanted for f in w.files)
    if len(plan.wanted) > 1:
        rows.append(["in all", "", "", format_size(total - plan.left), format_size(plan.left)])
    terminal.table("models", ["", "where", "commit", "here", "to download"], rows, texts=3)
    if plan.wanted:
        terminal.gap()
        room = [["cache", str(cache.root())], ["disk free", format_size(plan.free)]]
        terminal.table("", ["", ""], room)


def _row(m: Model) -> list[str]:
    s = m.source
    if m.of is None:
        at = s.commit if s.on_hub and s.commit else ""
        return [s.name, s.path, at[:12], "yes" if s.folder else "", "" if s.folder else "?"]
    if m.wanted is None:
        return [s.name, s.path, m.of.commit[:12], "", "?"]
    left = plans.left(m.wanted)
    here = sum(f.size for f in m.wanted.files) - left
    return [
        s.name,
        s.path,
        m.of.commit[:12],
        format_size(here) if here else "",
        format_size(left) if left else "nothing",
    ]


def _tell_pins(run: Run, models: list[Model]) -> None:
    """What to write in order to get the same commits again, for models that name none."""
    pins = []
    for m in models:
        if m.wanted is None or m.adapter or len(m.source.revision or "") == COMMIT:
            continue
        file, commit = resolve_inputs.reads_file(run), m.wanted.of.commit
        pins.append(f"{m.source.path}@{commit}" if file else f"{m.source.key}.revision={commit}")
    if pins:
        terminal.aside("What the hub has under a name may change. To have these very models again:")
    for pin in pins:
        terminal.command(pin)


def _fetched(wanted: list[Wanted]) -> Iterator[dict[str, Any]]:
    """What result.json says of each repository, before it is downloaded."""
    for w in wanted:
        yield {
            "repo": w.of.name,
            "commit": w.of.commit,
            "files": len(w.files),
            "bytes": sum(f.size for f in w.files),
            "downloaded": plans.left(w),
        }


def _read_data(run: Run) -> None:
    """Have the evaluation read its data, which downloads them.

    Raises:
        StepError: naming the task and its data.
    """
    with terminal.waiting() as waiting:
        waiting("the evaluation's data")
        try:
            context.read_tasks(run)
        except InputError as e:
            raise StepError(str(e)) from e


STEP = register(Step("fetch", execute, settings="fetch", recorded=False, on_login_node=True))
