"""The end of a sweep: the best few on the validation split, the winner merged through the ordinary
path, and in plain words what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergelab import evaluation
from mergelab.core.errors import StepError
from mergelab.core.run_dir import RunDir, read_json, short_path, write_json
from mergelab.optimization import search_space
from mergelab.optimization.controller import Setup, best, evaluate_with_retry, fitness, front
from mergelab.optimization.executors.processes import EvaluationRequest, Executor
from mergelab.optimization.journal import Journal, OutOfOrderResults
from mergelab.optimization.search_space import Genome
from mergelab.preflight import Plan
from mergelab.report import progress_table, score_table, terminal
from mergelab.schema import Run, with_overrides
from mergelab.steps.evaluate import MERGED

WINNER, PRESET = "winner", "preset"
NOISE = 2.0
"""Standard errors that a difference has to exceed to be more than noise."""


def finalize(
    setup: Setup, plan: Plan, journal: Journal, run_dir: RunDir, executor: Executor, command: str
) -> float | None:
    """Bring a sweep whose budget is spent to its result; goes on where an earlier end was cut short.

    Returns:
        the winner's fitness, None of several objectives.
    Raises:
        StepError: when no candidate could be measured, or the winner on disk is not what it was in memory.
    """
    ranked = [line for line in best(journal) if line["number"] < setup.budget]
    if not ranked:
        raise StepError("no candidate could be measured")
    objectives = setup.run.search.objectives
    preset = journal.select("preset")[0]
    several = bool(objectives)
    leading = front(ranked, objectives) if several else ranked
    winner = None if several else (ranked[0] if ranked[0]["fitness"] > preset["fitness"] else preset)
    finalists = _distinct([preset, *([winner] if winner else []), *leading[: setup.run.search.finalists]])
    with terminal.step("validate") as done:
        validated = _validate(setup, journal, executor, finalists)
        done(f"{len(finalists)} models on the validation split")
    on_disk = _finish(setup, journal, run_dir, executor, winner, command)
    metrics = _metrics(setup, on_disk, finalists, validated, winner, plan)
    shares = {m.name: m.share for m in evaluation.measures(setup.run, "validation")}
    result = _result(setup, journal, run_dir, metrics, shares, winner, leading, command)
    write_json(run_dir.result, result)
    with terminal.step("report") as done:
        from mergelab.report.evolution import write_report  # late: matplotlib takes seconds

        write_report(run_dir.folder, journal.lines, result)
        done("report/index.html")
    show(run_dir, result)
    if winner is not None and result["on_disk"] != result["winner"]["fitness"]:
        raise StepError(
            f"the winner's fitness is {winner['fitness']:.4f} in memory and {result['on_disk']:.4f} when "
            "merged to disk\nDo not trust this sweep before you know why; mergelab.log has what was logged."
        )
    return None if winner is None else float(winner["fitness"])


def _distinct(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each line once, in order."""
    return list({line.get("number", PRESET): line for line in lines}.values())


def row_name(line: Mapping[str, Any]) -> str:
    """What a model of the sweep is called in tables."""
    return PRESET if line["event"] == PRESET else f"candidate {line['number']}"


def _validate(
    setup: Setup, journal: Journal, executor: Executor, lines: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Scores on the validation split by row name; what is in the journal is not measured again."""
    known = {line["name"]: line["scores"] for line in journal.select("validated")}
    measures = evaluation.measures(setup.run, "validation")
    left = {line.get("number", -1): line for line in lines if row_name(line) not in known}
    orders = [
        EvaluationRequest(n, _candidate(setup, line), measures, kind="validate") for n, line in left.items()
    ]
    early = OutOfOrderResults(journal.path.parent)
    for order, outcome in evaluate_with_retry(executor, early, orders):
        name = row_name(left[order.number])
        if outcome.scores is None:
            raise StepError(f"{name} cannot be measured on the validation split: {outcome.reason}")
        known[name] = journal.append("validated", name=name, scores=outcome.scores)["scores"]
    early.end()
    return {row_name(line): known[row_name(line)] for line in lines}


def _candidate(setup: Setup, line: Mapping[str, Any]) -> Run:
    return setup.run if line["event"] == PRESET else setup.compose(line["genome"])


def _arguments(setup: Setup, line: Mapping[str, Any]) -> list[str]:
    """The arguments that compose a candidate: those of the run that is searched, and its genome."""
    fixed = [o for o in setup.run.overrides if not o.startswith(("search=", "search."))]
    return [*fixed, *search_space.overrides(_candidate(setup, line), line["genome"])]


# ---------------------------------------------------------------- the winner's folder


def _finish(
    setup: Setup,
    journal: Journal,
    run_dir: RunDir,
    executor: Executor,
    winner: Mapping[str, Any] | None,
    command: str,
) -> dict[str, Any]:
    """Merge the winner through the ordinary path, and measure it and its parents; the metrics."""
    genome = winner["genome"] if winner else None
    before = journal.select("merged")
    if before and before[-1]["genome"] == genome and (winner is None or run_dir.model.exists()):
        return dict(before[-1]["metrics"])
    run = _candidate(setup, winner) if winner else setup.run
    started = journal.select("merging")
    begun = bool(started) and started[-1]["genome"] == genome
    there = run_dir.model.exists() and begun
    if run_dir.model.exists() and not there:
        _set_aside(journal, run_dir.model)
    if winner is None:
        steps, path = ["preflight", "evaluate"], None
    elif there:  # whole and checked, or it would not have its name
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
    write_json(run_dir.result, {"status": "settling"})
    run_dir.begin({"command": command, "overrides": run.overrides, "seed": run.seed, "choices": {}})
    executor.finish(run, run_dir, turn=len(before))
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


# ---------------------------------------------------------------- what came of it


def _metrics(
    setup: Setup,
    on_disk: Mapping[str, Any],
    finalists: Sequence[Mapping[str, Any]],
    validated: Mapping[str, Any],
    winner: Mapping[str, Any] | None,
    plan: Plan,
) -> dict[str, Any]:
    """Scores by row and split: the winner as it lies on the disk, the preset, the other finalists, the
    parents, and what another search found."""
    rows: dict[str, Any] = {}
    if winner is not None and MERGED in on_disk:
        rows[WINNER] = on_disk[MERGED]
    for line in finalists:
        if winner is None or line is not winner or line["event"] == PRESET:
            rows[row_name(line)] = {"validation": validated[row_name(line)], "search": line["scores"]}
    rows |= {name: splits for name, splits in on_disk.items() if name != MERGED}
    if setup.run.search.against:
        other = read_json(Path(setup.run.search.against).expanduser() / "result.json")
        found = (other.get("metrics") or {}).get(WINNER)
        if found:
            rows[other.get("search", {}).get("name", "other")] = found
    return rows


def _result(
    setup: Setup,
    journal: Journal,
    run_dir: RunDir,
    metrics: Mapping[str, Any],
    shares: Mapping[str, float],
    winner: Mapping[str, Any] | None,
    leading: Sequence[Mapping[str, Any]],
    command: str,
) -> dict[str, Any]:
    s = setup.run.search
    lines = [x for x in journal.select("candidate") if x["number"] < setup.budget]
    before = read_json(run_dir.result)
    preset = journal.select("preset")[0]
    same = not evaluation.measures(setup.run, "search")
    result: dict[str, Any] = {
        **{k: before[k] for k in ("schema", "inputs", "versions", "merge_method", "engine", "key", "check")
           if k in before},
        "status": "done",
        "command": command,
        "seed": setup.run.seed,
        "search": {
            "name": s.name, "optimizer": s.optimizer, "budget": setup.budget, "population": setup.population,
            "generations": setup.generations, "dimension": len(setup.genes), "seed": s.seed, "sigma": s.sigma,
            "resolution": s.resolution, "objectives": list(s.objectives),
            "space": {g.key: g.text for g in setup.genes},
        },
        "candidates": {
            "evaluated": sum(x["status"] in ("done", "failed", "screened") for x in lines),
            "repeated": sum(x["status"] == "repeated" for x in lines),
            "failed": sum(x["status"] == "failed" for x in lines),
        },
        "preset": {"genome": preset["genome"], "fitness": preset["fitness"]},
        "metrics": metrics,
        "shares": shares,
    }  # fmt: skip
    if s.fidelity.share < 1:
        result["fidelity"] = fidelity(setup, lines)
    if s.against:
        other = read_json(Path(s.against).expanduser() / "result.json")
        if other.get("winner"):
            result["random"] = {"fitness": other["winner"]["fitness"], "budget": other["search"]["budget"],
                                "name": other["search"]["name"]}  # fmt: skip
    if winner is None:
        return result | {
            "winner": None,
            "pareto": [x["number"] for x in leading],
            "overrides": {str(x["number"]): _arguments(setup, x) for x in leading},
            "verdict": f"{len(leading)} of {len(lines)} candidates are on the Pareto front of "
                       f"{' and '.join(s.objectives)}: each is better than any other in something.",
        }  # fmt: skip
    split = "validation" if same else "search"
    on_disk = fitness(metrics[WINNER][split], setup.measures)
    told, gain = verdict(metrics, shares, moved=winner["event"] != PRESET, same=same)
    return result | {
        "winner": {"number": winner.get("number"), "generation": winner.get("generation"),
                   "genome": winner["genome"], "fitness": winner["fitness"]},
        "genome": winner["genome"],
        "fitness": {"value": winner["fitness"], "split": split},
        "on_disk": on_disk,
        "overrides": _arguments(setup, winner),
        "model": str(run_dir.model),
        "gain": gain,
        "verdict": told,
    }  # fmt: skip


def verdict(
    metrics: Mapping[str, Any], shares: Mapping[str, float], *, moved: bool, same: bool
) -> tuple[str, dict[str, Any] | None]:
    """Whether the winner's gain on the validation split is more than noise, in plain words.

    The errors of two means are taken as independent, which for the same prompts is cautious: what two
    models answer alike does not blur their difference.

    Args:
        metrics: scores by row and split.
        shares: of the measures.
        moved: whether the winner is another than the preset.
        same: whether the search climbed the validation prompts themselves.
    """
    value, error = score_table.mean(metrics[WINNER]["validation"], shares)
    other, other_error = score_table.mean(metrics[PRESET]["validation"], shares)
    if not moved:
        return (
            "No candidate was better on the search split than the preset, which is therefore the winner.",
            None,
        )
    if value is None or other is None:
        return "The measures point in different directions, so their mean says nothing; see the table.", None
    gain = value - other
    caution = (" The search climbed these very prompts, so this is too good: measure the model on others."
               if same else "")  # fmt: skip
    if error is None or other_error is None:
        text = f"On the validation split the winner is {gain:+.3f} from the preset, with an unknown error."
        return text + caution, {"against": PRESET, "value": gain, "stderr": None}
    spread = math.sqrt(error**2 + other_error**2)
    parents = [n for n in metrics if n not in (WINNER, PRESET) and not n.startswith("candidate ")]
    means = {
        n: score_table.mean(metrics[n]["validation"], shares)[0]
        for n in parents
        if metrics[n].get("validation")
    }
    above = [n for n, m in means.items() if m is not None and m >= value]
    text = f"On the validation split the winner's mean is {value:.3f}, {abs(gain):.3f} ±{spread:.3f} "
    text += "above the preset's: " if gain >= 0 else "below the preset's: "
    if abs(gain) > NOISE * spread:
        text += "more than noise." if gain > 0 else "the search has fitted its own prompts, take the preset."
    else:
        text += f"within {NOISE:g} standard errors, so it may be noise; more prompts would tell."
    if means:
        text += f" Not better than {', '.join(above)}." if above else " It beats every parent."
    return text + caution, {"against": PRESET, "value": gain, "stderr": spread}


def fidelity(setup: Setup, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What measuring on few prompts first has saved, and how well few prompts foretold all.

    `cost` is the share of all prompts' measurements that was made; `agreement` is Spearman's rank
    correlation between few and all prompts over the candidates that were measured on both.
    """
    f = setup.run.search.fidelity
    screened = [x for x in lines if x.get("screen") is not None and x["status"] != "repeated"]
    both = [x for x in screened if x["fitness"] is not None]
    made = len(screened) * f.share + len(both)
    out: dict[str, Any] = {"cost": made / len(screened) if screened else None, "measured_on_all": len(both),
                           "agreement": None}  # fmt: skip
    if len(both) > 2:
        from scipy.stats import spearmanr

        value = float(spearmanr([x["screen"] for x in both], [x["fitness"] for x in both]).statistic)
        out["agreement"] = None if math.isnan(value) else value
    return out


def show(run_dir: RunDir, result: Mapping[str, Any]) -> None:
    """Print the table, the genome, the verdict."""
    heads, body = score_table.rows(result["metrics"], "validation", result["shares"])
    terminal.gap()
    if body:
        body = [[row[0].replace("candidate ", "#"), *row[1:]] for row in body]  # for 80 columns
        terminal.table("validation", heads, body, first_bold=WINNER in result["metrics"], texts=1)
        terminal.gap()
    if result["winner"] is None:
        terminal.say("Pareto front: " + ", ".join(f"candidate {n}" for n in result["pareto"]))
    else:
        genome: Genome = result["winner"]["genome"]
        terminal.say("winner  " + progress_table.words(genome))
    if result.get("fidelity", {}).get("cost") is not None:
        f = result["fidelity"]
        agreement = f"{f['agreement']:.2f}" if f["agreement"] is not None else "unknown"
        terminal.say(
            f"few prompts first: {1 - f['cost']:.0%} of the measuring saved; rank correlation with all "
            f"prompts {agreement}"
        )
    terminal.say(result["verdict"], "bold")
    terminal.say(short_path(run_dir.folder) + "/  report/index.html  result.json"
                 + ("  model/" if result["winner"] else ""), "dim")  # fmt: skip
