"""What a search leaves in result.json, and how it is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergelab import evaluation
from mergelab.core.run_dir import RunDir, read_json, short_path
from mergelab.measured_models import MERGED
from mergelab.optimization import search_space
from mergelab.optimization.journal import Journal
from mergelab.optimization.population_evaluator import fitness
from mergelab.optimization.request import Setup
from mergelab.optimization.verdict import verdict
from mergelab.optimization.winner import candidate_run
from mergelab.report import progress_table, score_table, terminal
from mergelab.search_history import INITIAL, WINNER, rank_correlation, row_label

Line = Mapping[str, Any]
"""A line of the journal."""


def row(line: Line) -> str:
    """What a model of the search is called in the metrics."""
    return INITIAL if line["event"] == INITIAL else f"candidate {line['number']}"


def metrics(
    setup: Setup,
    on_disk: Mapping[str, Any],
    finalists: Sequence[Line],
    validated: Mapping[str, Any],
    winner: Line | None,
) -> dict[str, Any]:
    """Scores by row and split: the winner on the disk, the initial point, the other finalists, the parents,
    and the winner of the search in `search.against`."""
    rows: dict[str, Any] = {}
    if winner is not None and MERGED in on_disk:
        rows[WINNER] = on_disk[MERGED]
    for line in finalists:
        if winner is None or line is not winner or line["event"] == INITIAL:
            rows[row(line)] = {"validation": validated[row(line)], "search": line["scores"]}
    rows |= {name: splits for name, splits in on_disk.items() if name != MERGED}
    if setup.run.search.against:
        other = read_json(Path(setup.run.search.against).expanduser() / "result.json")
        found = (other.get("metrics") or {}).get(WINNER)
        if found:
            rows[other.get("search", {}).get("name", "other")] = found
    return rows


def build(
    setup: Setup,
    journal: Journal,
    run_dir: RunDir,
    metrics: Mapping[str, Any],
    winner: Line | None,
    leading: Sequence[Line],
    command: str,
) -> dict[str, Any]:
    """The content of result.json.

    Args:
        setup: of the search.
        journal: of the search.
        run_dir: with the result.json of the winner's job.
        metrics: see `metrics`.
        winner: its line; None with several objectives.
        leading: the lines on the Pareto front, with several objectives.
        command: the command line that is recorded.
    """
    s = setup.run.search
    lines = [x for x in journal.select("candidate") if x["number"] < setup.budget]
    before = read_json(run_dir.result)
    initial = journal.select(INITIAL)[0]
    shares = {m.name: m.share for m in evaluation.measures(setup.run, "validation")}
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
        INITIAL: {"genome": initial["genome"], "fitness": initial["fitness"]},
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
    same = not evaluation.measures(setup.run, "search")
    split = "validation" if same else "search"
    text, gain = verdict(metrics, shares, moved=winner["event"] != INITIAL, same=same)
    return result | {
        "winner": {"number": winner.get("number"), "generation": winner.get("generation"),
                   "genome": winner["genome"], "fitness": winner["fitness"]},
        "genome": winner["genome"],
        "fitness": {"value": winner["fitness"], "split": split},
        "on_disk": fitness(metrics[WINNER][split], setup.measures),
        "overrides": _arguments(setup, winner),
        "model": str(run_dir.model),
        "gain": gain,
        "verdict": text,
    }  # fmt: skip


def _arguments(setup: Setup, line: Line) -> list[str]:
    """The arguments that compose a candidate: those of the run that is searched, and its genome."""
    fixed = [o for o in setup.run.overrides if not o.startswith(("search=", "search."))]
    return [*fixed, *search_space.overrides(candidate_run(setup, line), line["genome"])]


def fidelity(setup: Setup, lines: Sequence[Line]) -> dict[str, Any]:
    """What measuring on few prompts first has saved, and how well few prompts predict all.

    `cost` is the share of all prompts' measurements that was made; `agreement` is Spearman's rank
    correlation between few and all prompts over the candidates that were measured on both.
    """
    f = setup.run.search.fidelity
    screened = [x for x in lines if x.get("screen") is not None and x["status"] != "repeated"]
    both = [x for x in screened if x["fitness"] is not None]
    made = len(screened) * f.share + len(both)
    agreement = None
    if len(both) > 2:
        agreement = rank_correlation([x["screen"] for x in both], [x["fitness"] for x in both])
    cost = made / len(screened) if screened else None
    return {"cost": cost, "measured_on_all": len(both), "agreement": agreement}


def show(run_dir: RunDir, result: Mapping[str, Any]) -> None:
    """Print the table, the winner's genome and the verdict."""
    heads, body = score_table.rows(result["metrics"], "validation", result["shares"])
    terminal.gap()
    if body:
        body = [[row_label(r[0]).replace("candidate ", "#"), *r[1:]] for r in body]  # for 80 columns
        terminal.table("validation", heads, body, first_bold=WINNER in result["metrics"], texts=1)
        terminal.gap()
    if result["winner"] is None:
        terminal.say("Pareto front: " + ", ".join(f"candidate {n}" for n in result["pareto"]))
    else:
        terminal.say("winner  " + progress_table.genome_text(result["winner"]["genome"]))
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
