"""What several steps need: a run's plan, the tiny family, and what measures its models."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mergelab import evaluation, preflight, zoo
from mergelab.core import cache_dir, hashing
from mergelab.core.errors import InputError, StepError, one_line
from mergelab.core.findings import Finding, Severity, apply_allow, error, stop_on_errors, warning
from mergelab.core.machine import existing_parent
from mergelab.core.registry import use_extensions
from mergelab.core.run_dir import RunDir, write_json, write_text
from mergelab.jobs.step import renamed, steps_of, wrong_steps
from mergelab.merging import resume
from mergelab.merging.verify import Report, verify
from mergelab.preflight import value_checks
from mergelab.recipes import recipe as recipes
from mergelab.report import terminal
from mergelab.schema import Run
from mergelab.tracking import tracker

log = logging.getLogger("mergelab.run")


def make_plan(
    run: Run, run_dir: RunDir, *, merges: bool, missing_severity: Severity = "error"
) -> preflight.Plan:
    """Examine the run, and leave plan.json and, where there is one, recipe.yaml in its folder."""
    plan = plan_of(run, run_dir.model, merges=merges, missing_severity=missing_severity)
    write_json(run_dir.plan, plan.json())
    if plan.recipe:
        write_text(run_dir.recipe, recipes.dump(plan.recipe))
    _log(plan)
    return plan


def _log(plan: preflight.Plan) -> None:
    """What was decided, and what was found that the terminal does not show."""
    for s in plan.sources:
        adapter = f" with the adapter in {s.adapter}" if s.adapter else ""
        log.info("model %s: %s in %s%s", s.name, s.label, s.folder or "no folder here", adapter)
    if plan.engine:
        log.info("engine: %s%s", plan.engine.name, f", because {plan.engine.why}" if plan.engine.why else "")
    if plan.recipe:
        log.info("recipe: %s", json.dumps(plan.recipe, ensure_ascii=False))
    if plan.estimate:
        log.info("estimate in bytes: %s", plan.estimate.json())
    for f in plan.findings:
        if f.severity == "note":
            log.info("note: %s", one_line(f.text()))


def plan_of(run: Run, output: Path, *, merges: bool, missing_severity: Severity = "error") -> preflight.Plan:
    """`preflight.examine` with a bar, together with what evaluation and tracking have to say."""
    use_extensions(run.composition)
    with terminal.progress() as progress:
        return preflight.examine(
            run,
            output=output,
            overrides=run.overrides,
            zoo=lambda role: family(run, progress).checkpoint(role),
            merges=merges,
            missing_severity=missing_severity,
            more=other_findings(run, progress),
            there=lambda recipe: resume.allocated(recipe, existing_parent(output), cache_dir.home()),
        )


def on_this_machine(run: Run) -> Run:
    """The run for work that is done where it is asked for: a cluster's `hardware.device` speaks of its
    nodes, and its login node may have none."""
    if not run.hardware.on_cluster:
        return run
    return replace(run, hardware=replace(run.hardware, device="cpu"))


def tell(plan: preflight.Plan, *severities: Severity) -> None:
    """Show the findings of some severities; errors are for `stop_on_errors`."""
    for f in plan.findings:
        if f.severity in severities:
            terminal.finding(f.severity, f.text())


def verify_model(
    folder: Path, run: Run, inputs: Mapping[str, Path], *, computed: str | None = None
) -> Report:
    """`merging.verify.verify` with a bar and the run's settings."""
    with terminal.progress() as progress:
        return verify(
            folder,
            hardware=run.hardware,
            inputs=inputs,
            computed=computed,
            prompt=run.check.prompt,
            trust_remote_code=run.model.trust_remote_code,
            progress=progress,
        )


def read_tasks(run: Run) -> None:
    """Read now what will be asked, so that a missing data set shows before the merge.

    Raises:
        InputError: naming the task and its data, and how to fetch them.
    """
    wanted = [m for split in evaluation.SPLITS for m in evaluation.measures(run, split)]
    try:
        if wanted:
            evaluator(run).build(wanted)
    except StepError as e:
        raise InputError(f"eval: {e}") from e


def evaluator(run: Run) -> evaluation.Evaluator:
    """What measures the run's models."""
    return evaluation.Evaluator(
        run.eval,
        hardware=run.hardware,
        seed=run.seed,
        tasks_path=task_files(run),
        home=cache_dir.home(),
        trust_remote_code=run.model.trust_remote_code,
    )


def hashes(folder: Path, progress: zoo.Progress) -> dict[str, str]:
    """sha256 of a model's files by name, remembered from run to run."""
    return hashing.file_hashes(folder, cache_dir.home() / "hashes.json", progress)


def fingerprint(folder: Path, adapter: Path | None, progress: zoo.Progress) -> str:
    """A hash of the content of a model, and of the LoRA that goes into it."""
    parts = [hashes(f, progress) for f in (folder, adapter) if f is not None]
    return hashing.digest(parts[0] if adapter is None else parts)


def family(run: Run, progress: zoo.Progress | None = None) -> zoo.Family:
    """The tiny family of the run's seed, built if it has to be."""
    return zoo.open_family(run.model.zoo_seed, progress)


def tasks_folder(run: Run, progress: zoo.Progress | None = None) -> Path | None:
    """The folder of the family's own lm_eval tasks."""
    if run.model.tasks == "zoo:tasks":
        return family(run, progress).tasks
    return Path(run.model.tasks).expanduser().resolve() if run.model.tasks else None


def task_files(run: Run, progress: zoo.Progress | None = None) -> Path | None:
    """The folder of the family's own lm_eval tasks, where the run's evaluation needs it."""
    kind = evaluation.known_kind(run.eval)
    return tasks_folder(run, progress) if kind is not None and kind.uses_task_files else None


def other_findings(run: Run, progress: zoo.Progress | None = None) -> list[Finding]:
    """What evaluation, tracking and the steps themselves have to say before anything starts."""
    found = evaluation.check(run, tasks_path=task_files(run, progress))
    found += tracker.findings(run.tracking)
    if reason := wrong_steps(run.job.steps):
        found.append(error("setting", "job.steps", reason))
    for old, new in renamed(run.job.steps).items():
        message = f"step '{old}' is now '{new}'; the old name will be an error in the next version"
        found.append(warning("renamed", "job.steps", message, f"Write {new}."))
    return found + [f for step in steps_of(run) for f in step.findings(run)]


def check_settings(run: Run, run_dir: RunDir) -> None:
    """For jobs that look at no plan: stop at whatever is wrong with the run's values by themselves.

    Raises:
        InputErrors: with all of it.
    """
    found = [*other_findings(run), *value_checks.check(run, run.overrides, "warning")]
    settled = apply_allow(found, [*run.allow, *run.model.allow])
    for f in settled:
        if f.code == "renamed":
            terminal.finding(f.severity, f.text())
    stop_on_errors(settled)
