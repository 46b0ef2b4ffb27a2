"""The steps of a job. Each is one file with `execute(run, workspace) -> str`: it gets the Run and
the folder, leaves files in the folder, and returns a line on what came of it."""

from __future__ import annotations

import time
from importlib import import_module

from mergelab.errors import InputError, MergelabError, StepError, did_you_mean
from mergelab.report import terminal
from mergelab.schema import Run
from mergelab.workspace import Workspace

STEPS = ("preflight", "plan", "inspect", "merge", "check", "evaluate", "report")


def run_job(run: Run, workspace: Workspace) -> None:
    """Run the job's steps in order, with an event and a time for each.

    Raises:
        InputError: for an unknown step, before any of them starts, or from preflight.
        StepError: when a step cannot be finished; result.json then says which and why.
    """
    unknown = [s for s in run.job.steps if s not in STEPS]
    if unknown or not run.job.steps:
        name = unknown[0] if unknown else ""
        raise InputError(
            f"job.steps: '{name}' is no step.{did_you_mean(name, STEPS)} There are {', '.join(STEPS)}."
        )
    timings: dict[str, float] = {}
    for name in run.job.steps:
        workspace.event("step", step=name, state="started")
        start = time.monotonic()
        try:
            with terminal.step(name) as done:
                done(import_module(f"mergelab.steps.{name}").execute(run, workspace))
        except BaseException as e:
            reason = str(e) if isinstance(e, MergelabError) else type(e).__name__
            state = "invalid" if isinstance(e, InputError) else "failed"
            workspace.event("step", step=name, state=state, reason=reason)
            workspace.record({"status": state, "error": {"step": name, "reason": reason}})
            if isinstance(e, OSError):
                raise StepError(f"{name}: {e.strerror or e}: {e.filename or workspace.folder}") from e
            raise
        timings[name] = round(time.monotonic() - start, 3)
        workspace.event("step", step=name, state="done", seconds=timings[name])
        workspace.record({"timings": timings})
