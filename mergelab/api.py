"""The Python face of mergelab; `import mergelab` offers all of it.

A run is composed as on the command line, and does what it does there. Errors are exceptions: `InputError`
for what is wrong with the request, before anything has started; `StepError` for a step that could not be
finished. The process is left as it was found: its environment, its loggers, Hydra's state. One run at a
time is in progress in a process; `compose` and `plan` may be called from any thread at any time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import chain, count
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mergelab import composition, execution
from mergelab.composition import compose
from mergelab.core.errors import InputError
from mergelab.core.run_dir import find_model, write_text
from mergelab.jobs import offline, steps_of
from mergelab.jobs.step import merges
from mergelab.report import terminal
from mergelab.result import Result, Score
from mergelab.schema import Evaluation, Job, Run

if TYPE_CHECKING:
    from mergelab.optimization.study import Study
    from mergelab.preflight import Plan

__all__ = ["compose", "evaluate", "merge", "plan", "run", "search"]

AnyPath = str | PathLike[str]


def plan(run: Run, folder: AnyPath | None = None) -> Plan:
    """What a run would do, without reading a weight: its models, the recipe, the findings, the estimate.

    Raises nothing for what is wrong with the run: that is in `plan.findings`, those of severity `error` are
    `plan.errors`. Writes nothing; the tiny family, if the run is of it, is built at its first use.

    Args:
        run: as `compose` returns it.
        folder: where the run would work, as in `run`; its disk has to have room.
    """
    from mergelab import context

    elsewhere = any(s.elsewhere for s in steps_of(run))
    place = execution.model_folder(run, _folder(folder, "outputs"))
    with offline.where_local(run), terminal.shown_on(False):
        return context.plan_of(
            run,
            place,
            merges=elsewhere or merges(run),
            missing_severity="warning" if elsewhere else "error",
        )


def run(run: Run, folder: AnyPath | None = None, *, console: Console | bool = True) -> Result:
    """Do what a run asks for: the steps of its job, in a folder.

    Args:
        run: as `compose` returns it, or changed since.
        folder: where it is recorded; None: `outputs/DATE/TIME` in the working directory. Everything the
            command leaves there is left there: result.json, the recipe, the log, the model.
        console: where it narrates: a rich Console, True: the terminal, False: nowhere but in its log.
    Raises:
        InputError: for all that is wrong with it, before anything starts, or where the folder holds a
            finished run; of several things an InputErrors with `messages`.
        StepError: when a step cannot be finished; result.json in the folder says which and why.
    """
    if run.search.name != "none":
        raise InputError(f"search={run.search.name} is for many runs: mergelab.search(run)")
    if run.hardware.on_cluster:
        raise InputError("hardware: a run in this process cannot be a task on a cluster\n"
                         "Start it by the command, or choose hardware=cpu, gpu or gpus.")  # fmt: skip
    place = _folder(folder, "outputs")
    with terminal.shown_on(console):
        return execution.execute(composition.recomposed(run), place, save_composition=True)


def merge(
    what: Run | Mapping[str, Any] | AnyPath,
    output: AnyPath | None = None,
    *,
    folder: AnyPath | None = None,
    console: Console | bool = True,
) -> Result:
    """Merge, and check what was written; nothing is evaluated.

    Args:
        what: a composed run; or a recipe of mergekit's, as a mapping or as the path of its YAML file.
        output: the folder that the model gets; None: `model` in the run's folder.
        folder, console: as in `run`.
    Returns:
        the run's result; `.model` is the model's folder.
    Raises:
        InputError, StepError: as `run` does.
    """
    if not isinstance(what, Run):
        folder = _folder(folder, "outputs")
        path = composition.value_text(str(_recipe_file(what, folder)))
        asked = compose("method=mergekit", "eval=none", f"method.path={path}")
        return merge(asked, output, folder=folder, console=console)
    job = Job(name="merge", steps=["preflight", "merge", "verify", "report"])
    asked = replace(what, job=job, eval=replace(what.eval, kind="none", tasks=[], text=None, options={}))
    if output is not None:
        asked = replace(asked, output=str(Path(output).expanduser().absolute()))
    return run(asked, folder, console=console)


def evaluate(
    model: AnyPath | Result,
    tasks: str | Sequence[str],
    *,
    limit: float | None = None,
    num_fewshot: int | None = None,
    metrics: Mapping[str, str] | None = None,
    include_path: AnyPath | None = None,
    batch_size: int = 16,
    device: str = "cpu",
    seed: int = 0,
    console: Console | bool = True,
) -> dict[str, Score]:
    """Scores of a model on tasks of lm_eval, by the tasks' names. Writes nothing but its cache.

    Args:
        model: a folder, that of the run that made it, that run's result, a model in the hub's cache
            (`org/name`), either with `+adapter` for a LoRA, or one of the tiny family (`zoo:math`).
        tasks: names of lm_eval tasks or groups; those of the tiny family, such as `tiny_math`, among them.
        limit: the first N prompts of each task, or, below 1, that share of them; None: all.
        num_fewshot: examples in a prompt; None: what each task says.
        metrics: by task, where it should not be the first metric that the task declares.
        include_path: a folder of task files of your own.
        batch_size: prompts at a time.
        device: `cpu`, `cuda`, or one device such as `cuda:1`.
        seed: of few-shot examples.
        console: as in `run`.
    Raises:
        InputError: for a model that is not there, an unknown task or a setting that is wrong.
        StepError: where the model cannot be loaded or measured.
    """
    from mergelab import context, evaluation
    from mergelab.core.findings import stop_on_errors

    names = [tasks] if isinstance(tasks, str) else list(tasks)
    asked = compose("job=evaluate", "eval=lm_eval")
    asked = replace(
        asked,
        model=replace(
            asked.model,
            name="model",
            base=replace(asked.model.base, path=_model_path(model), revision=None),
            roles={},
            skills={},
            tasks="zoo:tasks" if any(n.startswith("tiny_") for n in names) else None,
        ),
        experts={},
        eval=Evaluation(
            kind="tasks", tasks=names, limit=limit, num_fewshot=num_fewshot, metrics=dict(metrics or {}),
            include_path=None if include_path is None else str(include_path), batch_size=batch_size,
        ),
        hardware=replace(asked.hardware, device=device),
        seed=seed,
    )  # fmt: skip
    with execution.exclusively(), terminal.shown_on(console), offline.where_local(asked):
        found = context.plan_of(asked, Path.cwd() / "model", merges=False)
        stop_on_errors(
            replace(f, place=f.place.replace("model.base", "model"))
            for f in found.findings
            if f.code != "inputs"  # no expert takes part
        )
        context.read_tasks(asked)
        (source,) = found.sources
        assert source.folder is not None
        with terminal.progress() as progress:
            content = context.fingerprint(source.folder, source.adapter, progress)
            return context.evaluator(asked).evaluate(
                source.folder,
                evaluation.measures(asked),
                adapter=source.adapter,
                fingerprint=content,
                progress=progress,
            )


def search(
    run: Run,
    *,
    space: Mapping[str, Any] | None = None,
    budget: int | None = None,
    folder: AnyPath | None = None,
    console: Console | bool = True,
) -> Study:
    """Evolve a run's own parameters; resumes where the same search was interrupted.

    Args:
        run: as `compose` returns it; one without a search is searched by CMA-ES, as `search=cma` says.
        space: from keys to ranges: `{"experts.*.weight": (0, 1.5)}`; a list are choices, a text is in the
            grammar of Hydra's Nevergrad sweeper. None: that of the run.
        budget: candidates in all; None: as the run says. A larger one continues the same search.
        folder: the sweep's; None: where this very search was begun, else `multirun/DATE/TIME`.
        console: as in `run`.
    Returns:
        the study: the best candidate, all of them, and the result.
    Raises:
        InputError: for all that is wrong with it, before anything is measured, or where the folder holds
            another search.
        StepError: when too many candidates fail, or the winner cannot be merged.
    """
    from mergelab.optimization import run_search
    from mergelab.optimization.request import Request

    if run.search.name == "none":
        run = _with_groups(composition.recomposed(run), {"search": "cma"})
    if space is not None:
        run = replace(run, search=replace(run.search, space=_space(run, space)))
    if budget is not None:
        run = replace(run, search=replace(run.search, budget=budget))
    if run.hardware.on_cluster and run.search.controller == "job":
        raise InputError("search.controller: a job is started by the command; set search.controller=here")
    told = composition.recomposed(run)
    c = told.composition
    assert c is not None
    with execution.exclusively(), terminal.shown_on(console):
        study = run_search.run(
            Request(
                compose=lambda groups: _with_groups(told, groups),
                typed_space={},
                command=composition.command(told, "-m"),
                folder=_folder(folder, "multirun"),
                folder_named=folder is not None,
                arguments=["-m", *c.overrides],
            )
        )
    if study is None:
        raise InputError(f"job={run.job.name}: it starts no search\nTake job=merge, or mergelab.plan(run).")
    return study


# ---------------------------------------------------------------- from what is given to what is meant


def _folder(folder: AnyPath | None, kind: str) -> Path:
    """The folder that was named, or a new one in outputs/ or multirun/, as the command has it."""
    if folder is not None:
        return Path(folder).expanduser().absolute()
    now = datetime.now()
    first = Path.cwd() / kind / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}"
    others = (first.with_name(f"{first.name}-{n}") for n in count(2))
    return next(p for p in chain([first], others) if not p.exists())


def _with_groups(run: Run, groups: Mapping[str, Any]) -> Run:
    if not groups:
        return run
    assert run.composition is not None
    options = [f"{k}={v}" for k, v in groups.items()]
    return compose(*run.composition.overrides, *options, config_dir=run.composition.config_dir)


def _space(run: Run, space: Mapping[str, Any]) -> dict[str, Any]:
    """A space in the place of the run's own."""
    from mergelab.optimization.search_space import braces

    new = {key: _range(value) for pattern, value in space.items() for key in braces(pattern)}
    return {**dict.fromkeys(run.search.space), **new}


def _range(value: Any) -> Any:
    """A range of a search in the grammar of its space."""
    if isinstance(value, tuple):
        if len(value) != 2:
            raise InputError(f"space: {value!r} is not a range; (low, high), a list of choices, or a text")
        return {"lower": value[0], "upper": value[1]}
    return value


def _model_path(model: AnyPath | Result) -> str:
    """A model as `model.base.path` names it."""
    if isinstance(model, Result):
        if model.model is None:
            raise InputError("model: this result has no model")
        return str(model.model)
    text = str(model)
    if Path(text).expanduser().is_dir():
        try:
            return str(find_model(text))
        except LookupError as e:
            raise InputError(f"model: {e.args[0]}") from None
    return text


def _recipe_file(recipe: Mapping[str, Any] | AnyPath, folder: Path) -> Path:
    """The file of a recipe; one that is given as a mapping is kept in the run's folder."""
    if not isinstance(recipe, Mapping):
        return Path(recipe).expanduser().absolute()
    from mergelab.recipes.recipe import dump

    path = folder / "given.yaml"
    write_text(path, dump(recipe))
    return path
