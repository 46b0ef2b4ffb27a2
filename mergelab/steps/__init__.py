"""The steps of a job. Each is one file with `execute(run, workspace) -> str`: it gets the Run and
the folder, leaves files in the folder, and returns a line on what came of it."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from importlib import import_module

from mergelab import pulse
from mergelab.errors import InputError, MergelabError, StepError, did_you_mean
from mergelab.report import scores as scores_table
from mergelab.report import terminal
from mergelab.schema import Run, settings_of
from mergelab.tracking import Tracker, track
from mergelab.workspace import Workspace, read_json

STEPS = (
    "preflight", "plan", "inspect", "fetch", "merge", "check", "evaluate", "routing", "report", "analyze",
    "generate", "extract", "publish",
)  # fmt: skip

LOOKING = ("preflight", "plan", "inspect")
"""Steps that only look: what the disk has against them is wrong with the input, and a run that goes no
further is not finished, for the next may go on in its folder."""

UNRECORDED = (*LOOKING, "fetch", "generate", "extract", "publish")
"""Steps that leave nothing to be recorded elsewhere."""

NEEDS = {
    "merge": "preflight", "check": "merge", "evaluate": "preflight", "routing": "evaluate",
    "report": "preflight", "analyze": "preflight",
}  # fmt: skip
"""For a step the one whose files it reads."""

STATES: dict[type[BaseException], str] = {InputError: "invalid"}
"""What result.json says of a run that an exception ended: of one from outside, such as Ctrl-C,
`interrupted`, of any other `failed`."""


def run_job(run: Run, workspace: Workspace) -> None:
    """Run the job's steps in order, with an event and a time for each.

    Raises:
        InputError: for an unknown step, before any of them starts, or from preflight.
        StepError: when a step cannot be finished; result.json then says which and why.
    """
    if reason := wrong_steps(run.job.steps):
        workspace.record({"status": "invalid", "error": {"step": None, "reason": reason}})
        raise InputError(f"job.steps: {reason}")
    with ExitStack() as stack:
        stack.enter_context(pulse.beating(workspace.folder, gpu=run.hardware.device != "cpu"))
        tracker = None
        for name in run.job.steps:
            if not applies(name, run, workspace):
                continue
            if tracker is None and name not in UNRECORDED:
                tracker = stack.enter_context(
                    track(
                        run.tracking,
                        settings_of(run),
                        workspace.folder,
                        name=_name(run),
                        job_type=run.job.name,
                    )
                )
            _run_step(name, run, workspace)
        if not set(run.job.steps) <= {*LOOKING}:
            workspace.record({"status": "done"})
        if tracker is not None:
            hand_over(tracker, workspace)


def applies(name: str, run: Run, workspace: Workspace) -> bool:
    """Whether a step has something to do in this run: its module may have a function of this name."""
    own = getattr(import_module(f"mergelab.steps.{name}"), "applies", None)
    return own is None or bool(own(run, workspace))


def wrong_steps(steps: list[str]) -> str | None:
    """Why these steps cannot be run in this order, or None."""
    choices = f"There are {', '.join(STEPS)}."
    if not steps:
        return f"it is empty. {choices}"
    for i, name in enumerate(steps):
        if name not in STEPS:
            return f"'{name}' is no step.{did_you_mean(name, STEPS)} {choices}"
        if name in NEEDS and NEEDS[name] not in steps[:i]:
            return f"'{name}' has to come after '{NEEDS[name]}', in {steps}"
    return None


def _name(run: Run) -> str:
    return f"{run.model.name}-{run.method.name}"


def _run_step(name: str, run: Run, workspace: Workspace) -> None:
    workspace.event("step", step=name, state="started")
    pulse.step(name)
    start = time.monotonic()
    try:
        with terminal.step(name) as done:
            done(import_module(f"mergelab.steps.{name}").execute(run, workspace))
    except BaseException as e:
        told = e
        if isinstance(e, OSError):
            kind = InputError if name in LOOKING else StepError
            told = kind(f"{name}: {e.strerror or e}: {e.filename or workspace.folder}")
        reason = str(told) if isinstance(told, MergelabError) else type(told).__name__
        other = "failed" if isinstance(told, Exception) else "interrupted"
        state = next((s for kind, s in STATES.items() if isinstance(told, kind)), other)
        with suppress(OSError):  # the disk may be what has failed
            workspace.event("step", step=name, state=state, reason=reason)
            workspace.record({"status": state, "error": {"step": name, "reason": reason}})
        if told is not e:
            raise told from e
        raise
    seconds = round(time.monotonic() - start, 3)
    workspace.event("step", step=name, state="done", seconds=seconds)
    timings = read_json(workspace.result).get("timings", {})
    workspace.record({"timings": timings | {name: seconds}})


def hand_over(tracker: Tracker, workspace: Workspace) -> None:
    """Hand what is in the run's folder to the tracker: scores, table, recipe, result."""
    result = read_json(workspace.result)
    metrics = result.get("metrics", {})
    flat = {
        f"{split}/{model}/{name}": score["value"]
        for model, splits in metrics.items()
        for split, scores in splits.items()
        for name, score in scores.items()
    }
    if result.get("fitness"):
        flat["fitness"] = result["fitness"]["value"]
    if flat:
        tracker.log(flat)
        tracker.table("validation", *scores_table.rows(metrics, "validation", result.get("shares", {})))
    tracker.summary({k: result[k] for k in ("key", "command", "model", "versions") if result.get(k)})
    if workspace.recipe.exists():
        tracker.file(workspace.recipe, "recipe")
    tracker.file(workspace.result, "result")
