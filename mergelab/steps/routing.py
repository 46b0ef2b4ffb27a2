"""routing: which experts of a mixture the tokens of each task are routed to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mergelab import evaluation
from mergelab.context import evaluator
from mergelab.core.plan_file import PlanFile, PlannedModel
from mergelab.core.run_dir import RunDir, read_json, read_memo
from mergelab.evaluation import routing
from mergelab.jobs import Step, register
from mergelab.measured_models import MERGED, models
from mergelab.recipes import references
from mergelab.report import routing as report
from mergelab.report import terminal
from mergelab.schema import Run
from mergelab.schema.experts import RANDOM_GATES

OWN_RECIPE = "mergekit_moe_config.yml"
"""The recipe that mergekit-moe writes into a mixture's folder."""


def applies(run: Run, run_dir: RunDir) -> bool:
    """Whether the run's model is a mixture of experts, and there are prompts to route."""
    folder, _ = models(run, run_dir).get(MERGED, (None, None))
    if folder is None or routing.experts_in(read_memo(folder / "config.json")) < 2:
        return False
    return _has_prompts(run) or bool(_experts(run, run_dir, folder)[1])


def execute(run: Run, run_dir: RunDir) -> str:
    """Record, show and plot where the routers send the tokens of each task's prompts.

    The prompts are those of the validation tasks or, where there are none, those by which the recipe
    describes its experts. Answers are not evaluated.

    Raises:
        StepError: when the model cannot be loaded or run.
    """
    folder, _ = models(run, run_dir)[MERGED]
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in routing.MODEL_TYPES:
        return f"not supported for {kind}, only for {', '.join(routing.MODEL_TYPES)}"
    names, prompts, prompts_of = _experts(run, run_dir, folder)
    with terminal.progress() as progress:
        progress("loading", 0, 0)
        model, tokenizer = evaluation.load(
            folder, run.hardware, trust_remote_code=run.model.trust_remote_code
        )
        if _has_prompts(run):
            measures = evaluation.measures(run)
            prompts_of = "tasks"
            prompts = evaluator(run).prompts(model, tokenizer, measures, most=routing.MOST_PROMPTS)
        found = routing.follow(
            model, tokenizer, prompts, names,
            hardware=run.hardware, batch_size=run.eval.batch_size, max_length=run.eval.max_length,
            progress=progress,
        )  # fmt: skip
    summary = {"prompts_of": prompts_of, **found.summary()}
    report.write(run_dir.folder / "report", summary, found.layers, found.shares, found.weights)
    run_dir.record({"routing": summary})
    report.show(summary)
    return report.line(summary)


def _has_prompts(run: Run) -> bool:
    return evaluation.kind_of(run.eval).has_prompts


def _experts(run: Run, run_dir: RunDir, folder: Path) -> tuple[list[str], dict[str, list[str]], str]:
    """The experts' names in the model's order, their own prompts by name, and the origin of the prompts.

    Names are known where the run that made the model, or mergekit-moe, left its recipe; else they are
    numbers.
    """
    plan = PlanFile.of(_plan(run, run_dir, folder))
    recipe = plan.recipe or _recipe_in(folder / OWN_RECIPE)
    n = routing.experts_in(read_json(folder / "config.json"))
    experts = recipe.get("experts") or []
    if len(experts) != n:  # the recipe of another model, or none
        return [f"expert {i}" for i in range(n)], {}, ""
    sources = [references.read(e["source_model"]) for e in experts]
    names = _names([s.text if s else "expert" for s in sources], plan.models)
    own = (
        (name, [p for p in e.get("positive_prompts") or [] if p])
        for name, e in zip(names, experts, strict=True)
    )
    prompts = {name: texts[: routing.MOST_PROMPTS] for name, texts in own if texts}
    return names, prompts, "recipe" if recipe.get("gate_mode") in RANDOM_GATES else "gates"


def _plan(run: Run, run_dir: RunDir, folder: Path) -> Mapping[str, Any]:
    """plan.json of the run that made the model in `folder`; empty where there is none."""
    if not run.evaluate.path:
        return dict(read_json(run_dir.plan))
    for made_in in (Path(run.evaluate.path).expanduser().resolve(), folder.parent):
        made = read_memo(made_in / "result.json").get("model")
        if made and Path(made).resolve() == folder.resolve():
            return read_memo(made_in / "plan.json")
    return {}


def _recipe_in(file: Path) -> Mapping[str, Any]:
    """The recipe in a file. Empty where it cannot be read, because only names depend on it."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _names(sources: Sequence[str], models: Sequence[PlannedModel]) -> list[str]:
    """The names of a recipe's experts: those of the models with the same reference in plan.json, in order,
    else the last part of the path; with a number where a name occurs again."""
    known: dict[str, list[str]] = {}
    for m in models:
        known.setdefault(m.reference, []).append(m.name)
    out: list[str] = []
    for source in sources:
        of = known.get(source) or [source.rstrip("/").rpartition("/")[2]]
        of = [n for n in of if n != "base"] or of
        name = next((n for n in of if n not in out), of[0])
        again = sum(n == name or n.startswith(f"{name} ") for n in out)
        out.append(f"{name} {again + 1}" if again else name)
    return out


STEP = register(Step("routing", execute, needs="evaluate", applies=applies))
