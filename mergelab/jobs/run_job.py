"""Running the steps of a job in a folder, with an event, a time and a record for each."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress

from mergelab.core import heartbeat
from mergelab.core.errors import InputError, MergelabError, StepError, typed_line
from mergelab.core.registry import use_extensions
from mergelab.core.run_dir import RunDir, read_json
from mergelab.jobs.step import Step, steps_of, wrong_steps
from mergelab.report import score_table, terminal
from mergelab.schema import Run, settings_of
from mergelab.schema.conditions import file_of
from mergelab.tracking.base import Tracker
from mergelab.tracking.tracker import track


def run_job(run: Run, run_dir: RunDir) -> None:
    """Run the job's steps in order, with an event and a time for each.

    Raises:
        InputError: for an unknown step, before any of them starts, or from preflight.
        StepError: when a step cannot be finished; result.json then says which and why.
    """
    use_extensions(run.composition)
    if reason := wrong_steps(run.job.steps):
        run_dir.record({"status": "invalid", "error": {"step": None, "reason": reason}})
        raise InputError(f"job.steps: {reason}")
    with ExitStack() as stack:
        stack.enter_context(heartbeat.running(run_dir.folder, gpu=run.hardware.device != "cpu"))
        tracker = None
        steps = steps_of(run)
        for step in steps:
            if not step.applies(run, run_dir):
                continue
            if tracker is None and step.recorded:
                tracker = stack.enter_context(
                    track(
                        run.tracking,
                        settings_of(run),
                        run_dir.folder,
                        name=_name(run),
                        job_type=run.job.name,
                    )
                )
            _run_step(step, run, run_dir)
        if not all(s.read_only for s in steps):
            run_dir.record({"status": "done"})
        if tracker is not None:
            hand_over(tracker, run_dir)


def _name(run: Run) -> str:
    return f"{file_of(run) or run.model.name}-{run.method.name}"


def _run_step(step: Step, run: Run, run_dir: RunDir) -> None:
    name = step.name
    run_dir.event("step", step=name, state="started")
    heartbeat.step(name)
    start = time.monotonic()
    try:
        with terminal.step(name) as done:
            done(step.execute(run, run_dir))
    except BaseException as e:
        told = e
        if isinstance(e, OSError):
            kind = InputError if step.read_only else StepError
            told = kind(f"{name}: {e.strerror or e}: {e.filename or run_dir.folder}")
        reason = str(told) if isinstance(told, MergelabError) else typed_line(told)
        state = "failed" if isinstance(told, Exception) else "interrupted"
        state = "invalid" if isinstance(told, InputError) else state
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
