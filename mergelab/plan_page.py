"""A plan as text: what would run, the models, the recipe, what it needs, what there is to say."""

from __future__ import annotations

from rich.syntax import Syntax

from mergelab import evaluation
from mergelab.context import tell
from mergelab.core import cache_dir
from mergelab.core.sizes import format_size
from mergelab.merging import throughput_cache
from mergelab.preflight import Plan, Source, reads_file
from mergelab.preflight.engine_selection import Engine
from mergelab.preflight.resources import Estimate
from mergelab.recipes.recipe import dump
from mergelab.report import score_table, terminal
from mergelab.scheduling.scheduler import scheduler_of
from mergelab.schema import Run


def show(run: Run, plan: Plan) -> None:
    """The plan as text."""
    rows = [[s.name, s.label, _where(s)] for s in plan.sources]
    terminal.table("run", ["", ""], run_rows(run, plan.engine))
    terminal.gap()
    terminal.table("models", ["", "", ""], rows)
    terminal.gap()
    if plan.recipe:
        terminal.say("recipe.yaml", "bold")
        terminal.console.print(Syntax(dump(plan.recipe), "yaml", background_color="default"))
    if plan.estimate:
        terminal.gap()
        terminal.table("estimate", ["", ""], [*estimate_rows(plan.estimate), *time_rows(run, plan)])
    terminal.gap()
    tell(plan, "warning", "note")


def run_rows(run: Run, engine: Engine | None) -> list[list[str]]:
    """What the composition comes to, besides the recipe."""
    h = run.hardware
    scheduler = scheduler_of(run)
    dtypes = f"{h.compute_dtype or 'the files'} arithmetic, written as {h.dtype or 'the base is'}"
    rows = [
        ["model", run.model.name],
        ["experts", ", ".join(run.experts)],
        ["method", run.method.name],
        ["hardware", f"{h.device}, {dtypes}, files of at most {h.shard_size}"],
        *([[f"{scheduler.title} task", scheduler.describe()]] if scheduler else []),
        ["engine", engine_text(engine)],
        ["evaluation", evaluation_text(run)],
        ["tracking", run.tracking.name],
        ["seed", str(run.seed)],
        ["output", run.output or "model/ in the run's folder"],
    ]
    return [r for r in rows if not (reads_file(run) and r[0] in ("model", "experts"))]


def _where(s: Source) -> str:
    """Where a model was found, if that is not what the configuration says."""
    if s.folder is None:
        return "not here"
    return "" if str(s.folder) == s.path else str(s.folder)


def engine_text(engine: Engine | None) -> str:
    """What merges, and why."""
    if engine is None:
        return "decided once the models are downloaded"
    if engine.name == "fast":
        return "fast: our own kernels, straight to disk"
    return f"{engine.name}: {engine.why}"


def evaluation_text(run: Run) -> str:
    """What would be measured."""
    measured = evaluation.measures(run, "validation")
    models = 1 + (1 + len(run.experts) if run.eval.baselines else 0)
    tasks = ", ".join(f"{m.name} ({m.task})" for m in measured)
    how = score_table.how({"quantize": run.hardware.quantize, "backend": run.eval.backend})
    return f"{models} models on {tasks}{how}" if tasks else "none"


def time_rows(run: Run, plan: Plan) -> list[list[str]]:
    """How long the merge would take, if one like it has run here."""
    if plan.engine is None or plan.engine.name != "fast" or plan.recipe is None or plan.estimate is None:
        return []
    method = plan.recipe["merge_method"]
    rate = throughput_cache.known(cache_dir.home(), method, run.hardware)
    if rate is None:
        return []
    seconds = (plan.estimate.read + plan.estimate.write) / rate
    told = f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
    return [["time of the merge", f"about {told}, at the {format_size(rate)}/s of the last {method} here"]]


def estimate_rows(e: Estimate) -> list[list[str]]:
    """The numbers that somebody with a cluster wants to know."""
    about = "" if e.exact else "about "
    rows = [
        ["read", f"{about}{format_size(e.read)}"],
        ["write", f"{about}{format_size(e.write)}"],
        ["disk free", format_size(e.disk_free)],
        [
            "memory at peak",
            f"about {format_size(e.ram)}"
            + (f" of {format_size(e.ram_free)} available" if e.ram_free else ""),
        ],
    ]
    if e.disk_there:
        rows.append(["written already", f"{format_size(e.disk_there)}, by a merge that was interrupted"])
    if e.vram:
        rows.append(["GPU memory at peak", f"about {format_size(e.vram)}"])
    return rows
