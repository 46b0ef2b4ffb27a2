"""The steps of a job. Each is one file with `execute(run, run_dir) -> str`: it gets the Run and
the folder, leaves files in the folder, and returns a line on what came of it."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from importlib import import_module

from mergelab.core import heartbeat
from mergelab.core.errors import InputError, MergelabError, StepError, did_you_mean
from mergelab.core.run_dir import RunDir, read_json
from mergelab.report import score_table, terminal
from mergelab.schema import Run, settings_of
from mergelab.tracking.tracker import Tracker, track

STEPS = (
    "preflight", "plan", "check", "fetch", "merge", "verify", "evaluate", "routing", "report", "analyze",
    "generate", "extract", "publish",
)  # fmt: skip

READ_ONLY = ("preflight", "plan", "check")
"""Steps that only look: what the disk has against them is wrong with the input, and a run that goes no
further is not finished, for the next may go on in its folder."""

UNRECORDED = (*READ_ONLY, "fetch", "generate", "extract", "publish")
"""Steps that leave nothing to be recorded elsewhere."""

NEEDS = {
    "merge": "preflight", "verify": "merge", "evaluate": "preflight", "routing": "evaluate",
    "report": "preflight", "analyze": "preflight",
}  # fmt: skip
"""For a step the one whose files it reads."""

STATES: dict[type[BaseException], str] = {InputError: "invalid"}
"""What result.json says of a run that an exception ended: of one from outside, such as Ctrl-C,
`interrupted`, of any other `failed`."""


def run_job(run: Run, run_dir: RunDir) -> None:
    """Run the job's steps in order, with an event and a time for each.

    Raises:
        InputError: for an unknown step, before any of them starts, or from preflight.
        StepError: when a step cannot be finished; result.json then says which and why.
    """
    if reason := wrong_steps(run.job.steps):
        run_dir.record({"status": "invalid", "error": {"step": None, "reason": reason}})
        raise InputError(f"job.steps: {reason}")
    with ExitStack() as stack:
        stack.enter_context(heartbeat.running(run_dir.folder, gpu=run.hardware.device != "cpu"))
        tracker = None
        for name in run.job.steps:
            if not applies(name, run, run_dir):
                continue
            if tracker is None and name not in UNRECORDED:
                tracker = stack.enter_context(
                    track(
                        run.tracking,
                        settings_of(run),
                        run_dir.folder,
                        name=_name(run),
                        job_type=run.job.name,
                    )
                )
            _run_step(name, run, run_dir)
        if not set(run.job.steps) <= {*READ_ONLY}:
            run_dir.record({"status": "done"})
        if tracker is not None:
            hand_over(tracker, run_dir)


def applies(name: str, run: Run, run_dir: RunDir) -> bool:
    """Whether a step has something to do in this run: its module may have a function of this name."""
    own = getattr(import_module(f"mergelab.steps.{name}"), "applies", None)
    return own is None or bool(own(run, run_dir))


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


def _run_step(name: str, run: Run, run_dir: RunDir) -> None:
    run_dir.event("step", step=name, state="started")
    heartbeat.step(name)
    start = time.monotonic()
    try:
        with terminal.step(name) as done:
            done(import_module(f"mergelab.steps.{name}").execute(run, run_dir))
    except BaseException as e:
        told = e
        if isinstance(e, OSError):
            kind = InputError if name in READ_ONLY else StepError
            told = kind(f"{name}: {e.strerror or e}: {e.filename or run_dir.folder}")
        reason = str(told) if isinstance(told, MergelabError) else type(told).__name__
        other = "failed" if isinstance(told, Exception) else "interrupted"
        state = next((s for kind, s in STATES.items() if isinstance(told, kind)), other)
        with suppress(OSError):  # the disk may be what has failed
            run_dir.event("step", step=name, state=state, reason=reason)
            run_dir.record({"status": state, "error": {"step": name, "reason": reason}})
        if told is not e:
            raise told from e
        raise
    seconds = round(time.monotonic() - start, 3)
    run_dir.event("step", step=name, state="done", seconds=seconds)
    timings = read_json(run_dir.result).get("timings", {})
    run_dir.record({"timings": timings | {name: seconds}})


def hand_over(tracker: Tracker, run_dir: RunDir) -> None:
    """Hand what is in the run's folder to the tracker: scores, table, recipe, result."""
    result = read_json(run_dir.result)
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
        tracker.table("validation", *score_table.rows(metrics, "validation", result.get("shares", {})))
    tracker.summary({k: result[k] for k in ("key", "command", "model", "versions") if result.get(k)})
    if run_dir.recipe.exists():
        tracker.file(run_dir.recipe, "recipe")
    tracker.file(run_dir.result, "result")
