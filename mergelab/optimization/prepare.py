"""Everything that can be known of a search before a candidate is measured: `prepare` finds what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergelab import context
from mergelab.core.errors import InputError, InputErrors, did_you_mean
from mergelab.core.findings import MAY_PASS, stop_on_errors
from mergelab.core.registry import use_extensions
from mergelab.core.sizes import format_size
from mergelab.evaluation import Measure
from mergelab.jobs.step import merges
from mergelab.methods import registry
from mergelab.optimization import candidate_evaluator, optimizer, search_space, space_grammar
from mergelab.optimization.gene import Gene, Genome
from mergelab.optimization.request import Compose, Request, Setup
from mergelab.preflight import Plan, reads_file
from mergelab.scheduling.scheduler import dry_run as ask_cluster
from mergelab.scheduling.scheduler import scheduler_of
from mergelab.schema import Run, with_overrides
from mergelab.schema.conditions import MIXTURE
from mergelab.schema.validation import check_section

VALUE_CODES = ("range", "type", "unknown-parameter", "scope", "setting", "filter")
"""Finding codes about a single value; both bounds of every search range are checked for them."""


def prepare(request: Request, dry_run: bool = False) -> tuple[Setup, Plan]:
    """Check a search, and make what it needs.

    Args:
        request: what is asked for.
        dry_run: whether nothing will run, so that models and data may be elsewhere.
    Raises:
        InputErrors: with everything that is wrong.
    """
    use_extensions(request.run.composition)
    _check_settings(request.run, dry_run)
    optimizer.check(request.run.search)
    if options := _first_choices(request):
        request = request.starting_at(options)
    run = request.run
    genes = search_space.genes(_ranges(request), run, _parameters(run))
    starts = _starts(genes, request)
    measures = candidate_evaluator.search_measures(run)
    _check_objectives(run, measures)
    population = run.search.population or optimizer.default_population(len(genes))
    setup = Setup(run, genes, starts, population, measures, _composer(request))
    plan = _preflight(request, dry_run)
    _check_bounds(setup, request)
    return setup, plan


def _parameters(run: Run) -> set[str]:
    """What the method takes; nothing where it is not known, which preflight reports."""
    known = registry.methods()
    return known[run.method.name].used if run.method.name in known else set()


def _starts(genes: list[Gene], request: Request) -> Genome:
    """The genome of the initial point."""
    wrong: list[str] = []
    starts: Genome = {}
    for gene in genes:
        try:
            chosen = request.groups.get(gene.key)
            starts[gene.key] = search_space.start(request.run, gene) if chosen is None else chosen
        except InputError as e:
            wrong.append(str(e))
    if wrong:
        raise InputErrors(wrong)
    return starts


def _check_objectives(run: Run, measures: list[Measure]) -> None:
    names = [m.name for m in measures]
    unknown = [n for n in run.search.objectives if n not in names]
    if unknown:
        near = did_you_mean(unknown[0], names)
        raise InputError(
            f"search.objectives: '{unknown[0]}' is not measured.{near} There are {', '.join(names)}."
        )


def _ranges(request: Request) -> dict[str, Any]:
    """What is searched, by key: the run's space without null entries, and what was typed."""
    space = {**request.run.search.space, **request.typed_space}
    return {k: v for k, v in space.items() if v is not None}


def _first_choices(request: Request) -> dict[str, str]:
    """Where a group is searched and the composed option is not one of its choices: the first of them, which
    is where the search starts."""
    out = {}
    for key, text in _ranges(request).items():
        if key in request.groups:
            choices = space_grammar.read(str(key), text).choices
            if choices and request.groups[key] not in choices:
                out[str(key)] = str(choices[0])
    return out


def _check_settings(run: Run, dry_run: bool) -> None:
    s = run.search
    sections = {"search": s, "hardware": run.hardware}
    wrong = [f.text() for key, section in sections.items() for f in check_section(section, key)]
    if len(s.objectives) == 1:
        wrong.append("search.objectives: one objective is a fitness; name two or more, or none")
    if s.objectives and s.fidelity.share < 1:
        wrong.append(
            "search.fidelity: it ranks by one fitness, and cannot be combined with search.objectives"
        )
    wrong += _no_merge(run, dry_run)
    h = run.hardware
    live = "cannot be combined with a search, because candidates are merged in place into a full-precision"
    if h.quantize in ("int8", "int4"):
        wrong.append(f"hardware.quantize: {h.quantize} {live} model\n"
                     "Leave it out; job=evaluate evaluate.path=FOLDER measures the result.")  # fmt: skip
    if run.eval.backend == "vllm":
        wrong.append(f"eval.backend: {run.eval.backend} {live} transformers model\n"
                     "Set it to hf; job=evaluate evaluate.path=FOLDER measures the result.")  # fmt: skip
    if s.controller == "job" and not h.on_cluster:
        wrong.append("search.controller: job needs a cluster; set hardware=slurm")
    if h.on_cluster and h.detach and s.controller == "here":
        wrong.append("hardware.detach: true needs search.controller=job, because nothing would drive a "
                     "detached search")  # fmt: skip
    if not dry_run and not wrong and (scheduler := scheduler_of(run)) is not None:
        ask_cluster(scheduler, h.workers, array=True)
    if s.against and not (Path(s.against).expanduser() / "result.json").is_file():
        wrong.append(f"search.against: {s.against} holds no result.json")
    if wrong:
        raise InputErrors(wrong)


def _no_merge(run: Run, dry_run: bool) -> list[str]:
    """Why the run merges nothing that a search could vary; empty where it does."""
    wrong = []
    if reads_file(run):
        wrong.append(
            f"search: method={run.method.name} takes everything from its file, so nothing can be searched\n"
            "Compose the merge: method=ties experts=balanced"
        )
    elif run.method.name == MIXTURE:
        wrong.append(
            f"search: method={MIXTURE} merges nothing, so there are no weights to search\n"
            "Compare mixtures: -m method.parameters.gate_mode=hidden,cheap_embed"
        )
    if not merges(run) and not dry_run:
        wrong.append(f"search: job={run.job.name} merges nothing, so there is nothing to search")
    return wrong


def _composer(request: Request) -> Compose:
    """From a genome to a run. Hydra composes each combination of groups' options once."""
    known: dict[tuple[tuple[str, Any], ...], Run] = {(): request.run}

    def compose(genome: Genome) -> Run:
        groups = tuple((k, v) for k, v in genome.items() if k in request.groups)
        if groups not in known:
            known[groups] = request.compose(dict(groups))
        return search_space.apply(known[groups], {k: v for k, v in genome.items() if k not in request.groups})

    return compose


def _preflight(request: Request, dry_run: bool) -> Plan:
    """The plan of the composed run.

    Raises:
        InputErrors: for what is wrong with it.
    """
    run = request.run
    output = Path(run.output).expanduser().resolve() if run.output else request.folder.resolve() / "model"
    if output.exists():  # the winner of a search that resumes
        output = output.with_name(f"{output.name}.next")
    plan = context.plan_of(run, output, merges=True, missing_severity="warning" if dry_run else "error")
    if not dry_run:
        context.tell(plan, "warning")
    stop_on_errors(plan.findings)
    candidate_evaluator.check_engine(run, plan)
    if not dry_run:
        context.read_tasks(run)
        _check_memory(run, plan)
    return plan


def _check_memory(run: Run, plan: Plan) -> None:
    e = plan.estimate
    if e is None or e.ram_free is None or run.hardware.device != "cpu":
        return
    needed = live_model_bytes(plan) * run.hardware.workers
    if needed > e.ram_free:
        raise InputError(
            f"hardware.workers: {run.hardware.workers} live models need {format_size(needed)}, "
            f"{format_size(e.ram_free)} are available\nLower it, or use a machine with more memory."
        )


def live_model_bytes(plan: Plan) -> int:
    """Memory of a live model and of what its evaluation needs, roughly."""
    return int(plan.estimate.write * 1.2) if plan.estimate else 0


def _check_bounds(setup: Setup, request: Request) -> None:
    """Check that the method takes both bounds of every range, and every choice."""
    wrong: dict[str, None] = {}
    bounds: list[Genome] = [{g.key: g.low for g in setup.genes if not g.choices},
                            {g.key: g.high for g in setup.genes if not g.choices}]  # fmt: skip
    for gene in setup.genes:
        bounds += [{gene.key: choice} for choice in gene.choices]
    for genome in bounds:
        run = setup.compose({**setup.starts, **genome})
        plan = context.plan_of(with_overrides(run, []), request.folder.resolve() / "model.next", merges=True)
        group = next((k for k in genome if k in request.groups), None)
        for f in plan.findings:
            if f.severity == "error" and (f.code in VALUE_CODES or (group and f.code not in MAY_PASS)):
                what = f"{group}={genome[group]}" if group else "a bound of a range"
                wrong[f"search.space: {what} is not accepted: {f.text()}"] = None
    if wrong:
        raise InputErrors(list(wrong))
