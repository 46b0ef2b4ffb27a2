"""What is shown before a search begins: its title, what will happen, and the page of `job=plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergelab import plan_page
from mergelab.core.sizes import format_size
from mergelab.optimization.prepare import live_model_bytes
from mergelab.optimization.request import Request, Setup
from mergelab.preflight import Plan
from mergelab.report import terminal
from mergelab.scheduling.scheduler import scheduler_of
from mergelab.scheduling.submission_log import job_name


def title(request: Request) -> str:
    """The search in a few words."""
    chosen = [request.groups.get(g, "") for g in ("search", "model", "experts", "method", "eval")]
    return "mergelab  " + " · ".join(["search", *(c for c in chosen if c)])


def show_plan(setup: Setup, plan: Plan) -> None:
    """The page of `job=plan`: what would run, and what it needs."""
    s = setup.run.search
    plan_page.show(setup.run, plan)
    terminal.table("search", ["", ""], [
        ["optimizer", f"{s.optimizer}, seed {s.seed}, first steps {s.sigma:g} of each range"],
        ["candidates", f"{setup.budget}: {setup.generations} generations of {setup.population}"],
        ["workers", str(setup.run.hardware.workers)],
        *_cluster_rows(setup, plan),
        ["fitness", ", ".join(f"{m.name} ({m.task})" for m in setup.measures)],
        *([["objectives", ", ".join(s.objectives)]] if s.objectives else []),
    ])  # fmt: skip
    terminal.gap()
    genes = [[g.key, g.text, str(setup.starts[g.key])] for g in setup.genes]
    terminal.table("space", ["", "range", "starts at"], genes, texts=3)
    terminal.say("nothing was run")


def show_header(setup: Setup, plan: Plan, folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """What is about to happen, in two lines, and how far an earlier process came."""
    s = setup.run.search
    if setup.budget != s.budget:
        terminal.say(
            f"· budget {s.budget} becomes {setup.budget}: {setup.generations} whole populations "
            f"of {setup.population}",
            "dim",
        )
    total = sum(f.nbytes for f in plan.facts.values())
    terminal.say(
        f"· {len(setup.genes)} genes, {setup.generations} generations of {setup.population} by "
        f"{s.optimizer}, {_where(setup, folder)}; {format_size(total)} of models",
        "dim",
    )
    e = plan.estimate
    on_cpu = setup.run.hardware.device == "cpu"
    if e is not None and e.ram_free and on_cpu and total + live_model_bytes(plan) > e.ram_free:
        terminal.finding(
            "warning",
            f"{format_size(total)} of models do not fit into the {format_size(e.ram_free)} of free memory: "
            "they are read again for each candidate",
        )
    done = sum(line["event"] == "candidate" for line in lines)
    if done:
        terminal.say(f"· resumes: {min(done, setup.budget)} candidates are in the journal", "dim")


def _cluster_rows(setup: Setup, plan: Plan) -> list[list[str]]:
    """What is requested of a cluster, and how much reading `hardware.candidates_per_task` saves."""
    h = setup.run.hardware
    scheduler = scheduler_of(setup.run)
    if scheduler is None:
        return []
    tasks = -(-setup.population // h.candidates_per_task)
    size = sum(f.nbytes for f in plan.facts.values()) or (plan.estimate.read if plan.estimate else 0)
    rows = [
        [
            scheduler.title,
            f"{setup.generations} arrays of {tasks} tasks, {h.candidates_per_task} candidates a task",
        ]
    ]
    read = f"{format_size(size)} of models are read {tasks} times a generation"
    if h.candidates_per_task > 1:
        read += f" instead of {setup.population}, so {format_size(size * (setup.population - tasks))} less"
    elif setup.population > 1:
        read += "; hardware.candidates_per_task=2 would halve that"
    return [*rows, ["", read]]


def _where(setup: Setup, folder: Path) -> str:
    h = setup.run.hardware
    if (scheduler := scheduler_of(setup.run)) is not None:
        tasks = -(-setup.population // h.candidates_per_task)
        return f"on {scheduler.title} as {job_name(folder)}, {tasks} tasks an array"
    return "in this process" if h.workers == 1 else f"in {h.workers} processes"
