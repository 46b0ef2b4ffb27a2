"""Writes the winner's model: the ordinary steps of a merge, in the search's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergelab.core.run_dir import RunDir, read_json, short_path, write_json
from mergelab.optimization import search_space
from mergelab.optimization.executors.base import Executor
from mergelab.optimization.journal import Journal
from mergelab.optimization.request import Setup
from mergelab.report import terminal
from mergelab.schema import Run, with_overrides
from mergelab.search_history import INITIAL


def candidate_run(setup: Setup, line: Mapping[str, Any]) -> Run:
    """The run of a line of the journal."""
    return setup.run if line["event"] == INITIAL else setup.compose(line["genome"])


def write_winner(
    setup: Setup,
    journal: Journal,
    run_dir: RunDir,
    executor: Executor,
    winner: Mapping[str, Any] | None,
    command: str,
) -> dict[str, Any]:
    """Merge the winner to disk, verify it, and measure it and its parents; the metrics.

    Args:
        setup: of the search.
        journal: of the search, which tells what an earlier process has done of this.
        run_dir: where the model and result.json go.
        executor: runs the steps.
        winner: its line; None with several objectives, where the parents alone are measured.
        command: the command line that is recorded.
    """
    genome = winner["genome"] if winner else None
    before = journal.select("merged")
    if before and before[-1]["genome"] == genome and (winner is None or run_dir.model.exists()):
        return dict(before[-1]["metrics"])
    run = candidate_run(setup, winner) if winner else setup.run
    started = journal.select("merging")
    begun = bool(started) and started[-1]["genome"] == genome
    merged = run_dir.model.exists() and begun
    if run_dir.model.exists() and not merged:
        _set_aside(journal, run_dir.model)
    if winner is None:
        steps, path = ["preflight", "evaluate"], None
    elif merged:  # complete and verified, or the folder would not have its name
        steps, path = ["preflight", "evaluate"], str(run_dir.model)
    else:
        steps, path = ["preflight", "merge", "verify", "evaluate"], None
        if not begun:
            journal.append("merging", genome=genome)
    run = replace(
        run,
        job=replace(run.job, name="search", steps=steps),
        evaluate=replace(run.evaluate, path=path),
        tracking=replace(run.tracking, name="none"),
    )
    run = with_overrides(run, search_space.overrides(run, genome or {}))
    write_json(run_dir.result, {"status": "settling"})  # the name of this state on the disk
    run_dir.begin({"command": command, "overrides": run.overrides, "seed": run.seed, "choices": {}})
    executor.run_winner(run, run_dir, turn=len(before))
    metrics: dict[str, Any] = read_json(run_dir.result).get("metrics", {})
    journal.append("merged", genome=genome, metrics=metrics)
    return metrics


def _set_aside(journal: Journal, model: Path) -> None:
    """Keep the model of an earlier winner under another name."""
    n = len(journal.select("merged"))
    while (aside := model.with_name(f"{model.name}.earlier{n}")).exists():
        n += 1
    model.rename(aside)
    terminal.say(f"· the model of the earlier winner is now {short_path(aside)}", "dim")
