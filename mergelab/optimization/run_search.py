"""One sweep from the command to the last picture: check everything, find or begin its folder, evolve,
settle the winner."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergelab import __version__, context, evaluation
from mergelab.core import cache_dir, hashing, heartbeat, run_log
from mergelab.core.errors import InputError, InputErrors, StepError, did_you_mean
from mergelab.core.findings import MAY_PASS, stop_on_errors
from mergelab.core.run_dir import RunDir, read_memo, short_path, write_json
from mergelab.core.sizes import format_size
from mergelab.evaluation.task_hash import definition
from mergelab.jobs import offline
from mergelab.jobs.step import merges
from mergelab.methods import registry
from mergelab.optimization import candidate_evaluator, controller_job, optimizer, search_space, space_grammar
from mergelab.optimization.controller import Setup, evolve
from mergelab.optimization.executors.processes import Executor, make_executor
from mergelab.optimization.executors.slurm import SlurmExecutor
from mergelab.optimization.finalize import finalize, show
from mergelab.optimization.journal import NAME, Journal, differences, read
from mergelab.optimization.search_space import Genome
from mergelab.optimization.study import Study
from mergelab.optimization.wandb_client import SweepTracker
from mergelab.preflight import Plan, reads_file
from mergelab.provenance import SCORE_SETTINGS
from mergelab.recipes.recipe import MIXTURE
from mergelab.report import progress_table, terminal
from mergelab.schema import Run, with_overrides
from mergelab.slurm import dry_run
from mergelab.slurm.submission_log import job_name
from mergelab.steps import plan as step
from mergelab.tracking import wandb_sync

log = logging.getLogger(__name__)

VERSIONS = ("torch", "transformers", "lm_eval", "nevergrad", "cma", "numpy")
"""The packages on which fitness and genomes depend."""

BLAMED = ("range", "type", "unknown-parameter", "scope", "setting", "filter")
"""What preflight says of a value by itself; the ends of all ranges are looked at for it."""


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    compose: Callable[[Mapping[str, Any]], Run]
    """The run, with these options of groups."""
    typed_space: Mapping[str, str]
    """Keys and ranges typed on the command line."""
    groups: Mapping[str, str]
    """The chosen option of each group."""
    overrides: list[str]
    command: str
    """The command line that repeats it."""
    folder: Path
    chosen: bool
    """Whether the folder was named; else the sweep of this command that was interrupted goes on."""
    arguments: Sequence[str] = ()
    """The command line as it was typed."""


def run(request: Request) -> Study | None:
    """Evolve; returns what came of it, None where only a plan was asked for or a job steers it unwatched.

    Raises:
        InputError: before anything is measured, for everything that is wrong.
        TooManyFailures, StepError: see `controller` and `settle`.
    """
    with offline.where_local(request.compose({})):
        return _run(request)


def _run(request: Request) -> Study | None:
    terminal.say(_title(request), "bold")  # at once: much has to be imported before the first check
    if request.groups.get("job") == "plan":
        _show_plan(request)
        return None
    setup, plan = prepare(request)
    about = identify(setup, plan)
    folder = place(request, about)
    terminal.say(short_path(folder), "dim")
    run_dir = RunDir(folder, folder / "model")
    if controller_job.wanted(setup.run):
        _tell(setup, plan, folder, read(folder / NAME))
        return _leave_to_a_job(setup, run_dir, request)
    with run_dir.lock(), run_log.written(folder / run_log.NAME):
        log.info("command: %s", request.command)
        journal = Journal(folder)
        _begin(journal, setup, about, request)
        _tell(setup, plan, folder, journal.lines)
        known = len(journal.lines)
        try:
            with (
                controller_job.chained_resubmission(setup.run, folder, request.arguments, known),
                heartbeat.running(folder),
                _tasks_left_on_hangup(setup.run),
            ):
                _evolve(setup, plan, journal, run_dir, request)
        except (Exception, KeyboardInterrupt) as e:
            log.error("the search did not finish: %s", e or type(e).__name__, exc_info=e)
            raise
    return Study.load(folder)


def _leave_to_a_job(setup: Setup, run_dir: RunDir, request: Request) -> Study | None:
    """Have the sweep steered by a job, and look on. The job alone writes the journal."""
    controller_job.start(setup.run, run_dir.folder, request.arguments)
    if setup.run.hardware.detach:
        terminal.say("  python -m mergelab job=monitor   shows it", "dim")
        terminal.say("  the same command without hardware.detach looks on and shows the result", "dim")
        return None
    result = controller_job.follow(run_dir.folder, setup.budget, setup.population)
    show(run_dir, result)
    wandb_sync.finish(run_dir.folder, setup.run.tracking)
    return Study.load(run_dir.folder)


def _evolve(setup: Setup, plan: Plan, journal: Journal, run_dir: RunDir, request: Request) -> None:
    slurm = SlurmExecutor(setup.run, run_dir.folder) if setup.run.hardware.slurm else None
    executor: Executor = slurm or make_executor(setup.run)
    done = len(journal.select("candidate"))
    recorder = SweepTracker(setup.run, run_dir.folder, setup.budget)
    try:
        with progress_table.table(setup.budget, setup.population, done) as shown:
            if slurm is not None:
                slurm.show = shown.note

            def watch(event: str, line: Mapping[str, Any]) -> None:
                shown.tell(event, line)
                heartbeat.report_progress("candidates", shown.done, setup.budget)
                if event == "generation":
                    run_dir.event("generation", generation=line["generation"], of=setup.generations)

            evolve(setup, journal, executor, watch)
        if slurm is not None:
            slurm.show = None
        finalize(setup, plan, journal, run_dir, executor, request.command)
        recorder.finish(0)
        if setup.run.tracking.sync:
            wandb_sync.finish(run_dir.folder, setup.run.tracking)
    except StepError as e:
        recorder.finish(e.exit_status)
        raise
    except KeyboardInterrupt:
        counted = len(journal.select("candidate"))
        raise KeyboardInterrupt(
            f"interrupted; {counted} of {setup.budget} candidates are safe in {short_path(journal.path)}\n"
            "Run the same command again: it goes on from there."
        ) from None
    finally:
        recorder.leave()
        executor.close(at_once=True)


@contextmanager
def _tasks_left_on_hangup(run: Run) -> Iterator[None]:
    """A closed terminal ends this process and not the cluster's work, which the same command adopts."""
    if run.hardware.slurm is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def left(*_: object) -> None:
        log.info("the terminal was closed; what Slurm runs goes on")
        logging.shutdown()
        os._exit(128 + signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, left)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


# ---------------------------------------------------------------- before anything is measured


def prepare(request: Request, looking: bool = False) -> tuple[Setup, Plan]:
    """Everything that can be known before a candidate is measured.

    Args:
        looking: nothing will run, so that models and data may be elsewhere.
    Raises:
        InputErrors: all that is wrong, at once.
    """
    run = request.compose({})
    _check_settings(run, looking)
    optimizer.check(run.search)
    if groups := _first_choices(request, run):
        run, request = request.compose(groups), replace(request, groups={**request.groups, **groups})
    s = run.search
    takes = (
        registry.takes(registry.declarations()[run.method.name])
        if run.method.name in registry.declarations()
        else set()
    )
    ranges = _ranges(request, run)
    genes = search_space.genes(ranges, run, takes)
    wrong: list[str] = []
    starts: Genome = {}
    for gene in genes:
        try:
            starts[gene.key] = (
                request.groups[gene.key] if gene.key in request.groups else search_space.start(run, gene)
            )
        except InputError as e:
            wrong.append(str(e))
    if wrong:
        raise InputErrors(wrong)
    compose = _composer(request, run)
    measures = candidate_evaluator.search_measures(run)
    unknown = [n for n in s.objectives if n not in {m.name for m in measures}]
    if unknown:
        names = [m.name for m in measures]
        near = did_you_mean(unknown[0], names)
        raise InputError(
            f"search.objectives: '{unknown[0]}' is not measured.{near} There are {', '.join(names)}."
        )
    default = optimizer.default_population(len(genes))
    population = s.population or default
    if population < 2:
        raise InputError(
            f"search.population: {population} is out of range; 2 or more (CMA's own is {default})"
        )
    setup = Setup(run, genes, starts, population, measures, compose)
    plan = _preflight(run, request, looking)
    _check_ends(setup, request)
    return setup, plan


def _show_plan(request: Request) -> None:
    """job=plan: what would run, and what it needs."""
    setup, plan = prepare(request, looking=True)
    s = setup.run.search
    step.show(setup.run, plan)
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


def _ranges(request: Request, run: Run) -> dict[str, Any]:
    """What evolves, by key: the space's, without those that are null, and those that were typed."""
    return {k: v for k, v in {**run.search.space, **request.typed_space}.items() if v is not None}


def _first_choices(request: Request, run: Run) -> dict[str, str]:
    """Where a group evolves, and the composed option is none of its choices, the first of them: there
    the search starts."""
    out = {}
    for key, text in _ranges(request, run).items():
        if key in request.groups:
            choices = space_grammar.read(str(key), text).choices
            if choices and request.groups[key] not in choices:
                out[str(key)] = str(choices[0])
    return out


def _check_settings(run: Run, looking: bool) -> None:
    s, f = run.search, run.search.fidelity
    bounds = (
        ("search.budget", s.budget, s.budget >= 1, "1 or more"),
        ("search.sigma", s.sigma, 0 < s.sigma <= 1, "above 0, at most 1"),
        ("search.resolution", s.resolution, 0 < s.resolution < 1, "above 0, below 1"),
        ("search.finalists", s.finalists, s.finalists >= 1, "1 or more"),
        ("search.max_failure_rate", s.max_failure_rate, 0 <= s.max_failure_rate <= 1, "0 to 1"),
        ("search.timeout", s.timeout, s.timeout is None or s.timeout > 0, "seconds above 0"),
        ("search.seed", s.seed, 0 <= s.seed < 2**32, "0 to 4294967295"),
        ("search.fidelity.share", f.share, 0 < f.share <= 1, "above 0, at most 1"),
        ("search.fidelity.promote", f.promote, 0 < f.promote <= 1, "above 0, at most 1"),
        ("hardware.workers", run.hardware.workers, run.hardware.workers >= 1, "1 or more"),
    )
    wrong = [f"{key}: {value} is out of range; {right}" for key, value, sound, right in bounds if not sound]
    if len(s.objectives) == 1:
        wrong.append("search.objectives: one objective is a fitness; name two or more, or none")
    if s.objectives and f.share < 1:
        wrong.append(
            "search.fidelity: it ranks by one fitness, and cannot be combined with search.objectives"
        )
    if reads_file(run):
        told = f"search: method={run.method.name} takes everything from its file, so nothing can evolve"
        wrong.append(f"{told}\nCompose the merge: method=ties experts=balanced")
    elif run.method.name == MIXTURE:
        told = "search: method=moe merges nothing, so there are no weights to evolve"
        wrong.append(f"{told}\nCompare mixtures: -m method.parameters.gate_mode=hidden,cheap_embed")
    if not merges(run) and not looking:
        wrong.append(f"search: job={run.job.name} merges nothing, so there is nothing to evolve")
    h = run.hardware
    live = "a search measures a model in memory, into which each candidate is merged"
    if h.quantize in ("int8", "int4"):
        wrong.append(f"hardware.quantize: {h.quantize} is not possible, for {live} in all its bits\n"
                     "Leave it out; job=evaluate evaluate.path=FOLDER measures what it finds.")  # fmt: skip
    if run.eval.backend == "vllm":
        wrong.append(f"eval.backend: {run.eval.backend} is not possible, for {live}\n"
                     "Set it to hf; job=evaluate evaluate.path=FOLDER measures what it finds.")  # fmt: skip
    if s.controller not in ("here", "job"):
        wrong.append(f"search.controller: '{s.controller}' is none of here, job")
    if s.controller == "job" and h.slurm is None:
        wrong.append("search.controller: a job needs a Slurm cluster; set hardware=slurm")
    if h.slurm is not None and h.detach and s.controller == "here":
        wrong.append("hardware.detach: a search needs somebody to steer it; set search.controller=job")
    if h.slurm is not None and not looking and not wrong:
        dry_run.check(h.slurm, h.workers, array=True)
    if s.against and not (Path(s.against).expanduser() / "result.json").is_file():
        wrong.append(f"search.against: {s.against} holds no result.json")
    if wrong:
        raise InputErrors(wrong)


def _composer(request: Request, base: Run) -> Callable[[Genome], Run]:
    """From a genome to a run. Options of groups are composed by Hydra, once each."""
    known: dict[tuple[tuple[str, Any], ...], Run] = {(): base}

    def compose(genome: Genome) -> Run:
        groups = tuple((k, v) for k, v in genome.items() if k in request.groups)
        if groups not in known:
            known[groups] = request.compose(dict(groups))
        return search_space.apply(known[groups], {k: v for k, v in genome.items() if k not in request.groups})

    return compose


def _preflight(run: Run, request: Request, looking: bool) -> Plan:
    """The plan of the composed run; raises InputErrors for what is wrong with it."""
    output = Path(run.output).expanduser().resolve() if run.output else request.folder.resolve() / "model"
    if output.exists():  # the winner of a sweep that goes on
        output = output.with_name(f"{output.name}.next")
    fixed = [o for o in request.overrides if o.partition("=")[0] not in request.typed_space]
    typed = with_overrides(run, fixed)
    plan = context.plan_of(typed, output, merges=True, missing_severity="warning" if looking else "error")
    if not looking:
        context.tell(plan, "warning")
    stop_on_errors(plan.findings)
    candidate_evaluator.check_engine(run, plan)
    if not looking:
        context.read_tasks(run)
        _check_memory(run, plan)
    return plan


def _check_memory(run: Run, plan: Plan) -> None:
    e = plan.estimate
    if e is None or e.ram_free is None or run.hardware.device != "cpu":
        return
    needed = _live_bytes(plan) * run.hardware.workers
    if needed > e.ram_free:
        raise InputError(
            f"hardware.memory: {run.hardware.workers} live models need {format_size(needed)}, "
            f"{format_size(e.ram_free)} are available\n"
            "Lower hardware.workers, or take a machine with more memory."
        )


def _live_bytes(plan: Plan) -> int:
    """Memory of a live model and of what its evaluation needs, roughly."""
    return int(plan.estimate.write * 1.2) if plan.estimate else 0


def _check_ends(setup: Setup, request: Request) -> None:
    """That both ends of every range, and every choice, are values that the method can take."""
    wrong: dict[str, None] = {}
    ends: list[Genome] = [{g.key: g.low for g in setup.genes if not g.choices},
                          {g.key: g.high for g in setup.genes if not g.choices}]  # fmt: skip
    for gene in setup.genes:
        ends += [{gene.key: choice} for choice in gene.choices]
    for genome in ends:
        run = setup.compose({**setup.starts, **genome})
        plan = context.plan_of(with_overrides(run, []), request.folder.resolve() / "model.next", merges=True)
        group = next((k for k in genome if k in request.groups), None)
        for f in plan.findings:
            if f.severity == "error" and (f.code in BLAMED or (group and f.code not in MAY_PASS)):
                what = f"{group}={genome[group]}" if group else "an end of a range"
                wrong[f"search.space: {what} is not possible: {f.text()}"] = None
    if wrong:
        raise InputErrors(list(wrong))


# ---------------------------------------------------------------- which sweep it is


def identify(setup: Setup, plan: Plan) -> dict[str, Any]:
    """Everything that decides what a sweep comes to, but for its budget."""
    run, s = setup.run, setup.run.search
    catalogue = context.evaluator(run).catalogue
    reported = evaluation.measures(run, "validation")
    return {
        "search": {
            "optimizer": s.optimizer, "population": setup.population, "seed": s.seed, "sigma": s.sigma,
            "resolution": s.resolution, "fidelity": asdict(s.fidelity), "objectives": list(s.objectives),
            "space": {g.key: g.text for g in setup.genes}, "start": setup.starts,
        },
        "method": asdict(run.method),
        "experts": {name: asdict(e) for name, e in run.experts.items()},
        "models": {source.name: _stamp(source) for source in plan.sources},
        "hardware": {"dtype": run.hardware.dtype, "compute_dtype": run.hardware.compute_dtype,
                     "device": run.hardware.device.partition(":")[0]},
        "seed": run.seed,
        "eval": {k: getattr(run.eval, k) for k in SCORE_SETTINGS},
        "measures": {m.name: [m.task, m.metric, m.share] for m in setup.measures},
        "validation": {m.name: [m.task, m.metric, m.share] for m in reported},
        "tasks": {m.task: hashing.digest(_definition(run, catalogue, m.task))[:16]
                  for m in [*setup.measures, *reported]},
        "versions": {"mergelab": __version__} | {p: version(p) for p in VERSIONS},
    }  # fmt: skip


def _definition(run: Run, catalogue: Any, task: str) -> Any:
    if run.eval.kind == "perplexity":
        return hashing.file_hash(Path(run.eval.text or "").expanduser())
    return definition(catalogue, task)


def _stamp(source: Any) -> str:
    """A model as the hub's commit, or by the sizes and times of its files: to hash 260 GB before the
    first candidate would be the wrong price."""
    if source.commit:
        return str(source.commit)
    files = sorted(f for f in Path(source.folder).iterdir() if f.is_file())
    return hashing.digest([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files])[:16]


def place(request: Request, about: Mapping[str, Any]) -> Path:
    """The sweep's folder: the one that was named, else where this very sweep was begun.

    Raises:
        InputError: where the named folder holds another sweep, or something else.
    """
    key = hashing.digest([about, str(Path.cwd())])[:32]
    memo = cache_dir.home() / "sweeps" / f"{key}.json"
    folder = request.folder.resolve()
    earlier = read_memo(memo).get("folder")
    if not request.chosen and earlier and (Path(earlier) / "journal.jsonl").exists():
        folder = Path(earlier)
    folder.mkdir(parents=True, exist_ok=True)
    if lines := read(folder / NAME):  # it may be being written
        changed = differences(lines[0]["identity"], _plain(about))
        if changed:
            told = "\n".join(changed[:8]) + (f"\nand {len(changed) - 8} more" if len(changed) > 8 else "")
            raise InputError(
                f"{short_path(folder)} holds another sweep\n{told}\n"
                "Set it back to go on there, or start anew elsewhere: hydra.sweep.dir=DIR"
            )
    elif (folder / "result.json").exists():
        raise InputError(
            f"{short_path(folder)} holds a run, not a sweep\nChoose another: hydra.sweep.dir=DIR"
        )
    write_json(memo, {"folder": str(folder)})
    return folder


def _plain(about: Mapping[str, Any]) -> Any:
    import json

    return json.loads(json.dumps(about))


def _begin(journal: Journal, setup: Setup, about: Mapping[str, Any], request: Request) -> None:
    if journal.begin is not None:
        return
    s = setup.run.search
    journal.append(
        "begin",
        schema=1,
        id=hashing.digest(about)[:16],
        command=request.command,
        search={"name": s.name, "optimizer": s.optimizer, "population": setup.population,
                "space": {g.key: g.text for g in setup.genes}},
        identity=_plain(about),
    )  # fmt: skip


def _title(request: Request) -> str:
    chosen = [request.groups.get(g, "") for g in ("search", "model", "experts", "method", "eval")]
    return "mergelab  " + " · ".join(["search", *(c for c in chosen if c)])


def _tell(setup: Setup, plan: Plan, folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """What is about to happen, in two lines."""
    s = setup.run.search
    if setup.budget != s.budget:
        terminal.say(
            f"· budget {s.budget} becomes {setup.budget}: {setup.generations} whole populations "
            f"of {setup.population}",
            "dim",
        )
    total = sum(f.nbytes for f in plan.facts.values())
    where = _where(setup, folder)
    terminal.say(
        f"· {len(setup.genes)} genes, {setup.generations} generations of {setup.population} by "
        f"{s.optimizer}, {where}; {format_size(total)} of models",
        "dim",
    )
    e = plan.estimate
    if (
        e is not None
        and e.ram_free
        and setup.run.hardware.device == "cpu"
        and total + _live_bytes(plan) > e.ram_free
    ):
        terminal.finding(
            "warning",
            f"{format_size(total)} of models do not fit into the {format_size(e.ram_free)} of free memory: "
            "they are read again for each candidate",
        )
    done = sum(line["event"] == "candidate" for line in lines)
    if done:
        terminal.say(f"· goes on: {min(done, setup.budget)} candidates are in the journal", "dim")


def _cluster_rows(setup: Setup, plan: Plan) -> list[list[str]]:
    """What a cluster is asked for, and what it saves that a task measures several candidates."""
    h = setup.run.hardware
    if h.slurm is None:
        return []
    tasks = -(-setup.population // h.candidates_per_task)
    size = sum(f.nbytes for f in plan.facts.values()) or (plan.estimate.read if plan.estimate else 0)
    rows = [
        ["Slurm", f"{setup.generations} arrays of {tasks} tasks, {h.candidates_per_task} candidates a task"]
    ]
    read = f"{format_size(size)} of models are read {tasks} times a generation"
    if h.candidates_per_task > 1:
        read += f" instead of {setup.population}, so {format_size(size * (setup.population - tasks))} less"
    elif setup.population > 1:
        read += "; hardware.candidates_per_task=2 would halve that"
    return [*rows, ["", read]]


def _where(setup: Setup, folder: Path) -> str:
    h = setup.run.hardware
    if h.slurm is not None:
        tasks = -(-setup.population // h.candidates_per_task)
        return f"on Slurm as {job_name(folder)}, {tasks} tasks an array"
    return "in this process" if h.workers == 1 else f"in {h.workers} processes"
