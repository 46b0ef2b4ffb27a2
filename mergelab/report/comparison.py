"""All runs of a sweep beside each other, when the sweep ends."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from mergelab.report import scores, terminal
from mergelab.workspace import read_json, write_text


def compare_runs(folder: Path) -> None:
    """Print the comparison of every run below a sweep's folder, best first, and leave it as CSV."""
    runs = collect(folder)
    if not runs:
        return
    heads, body = table(runs)
    terminal.console.print()
    terminal.table(f"{len(runs)} runs, best first", heads, body, first_bold=True, texts=2)
    text = io.StringIO()
    csv.writer(text).writerows([heads, *body])
    write_text(folder / "comparison.csv", text.getvalue())
    terminal.say(f"{folder}/comparison.csv", "dim")


def collect(folder: Path) -> list[dict[str, Any]]:
    """result.json of every run, the fittest first, failed ones last."""
    found = []
    for file in folder.glob("*/result.json"):
        found.append(read_json(file) | {"number": file.parent.name})
    return sorted(found, key=_order)


def _order(result: dict[str, Any]) -> tuple[bool, float, int, str]:
    """The fittest first, 0 and less among them; without a fitness last; else by number."""
    fitness, number = _fitness(result), result["number"]
    return fitness is None, -(fitness or 0.0), int(number) if number.isdigit() else 1 << 30, number


def _short(override: str) -> str:
    """An override with its number rounded to what fits a table."""
    key, _, value = override.partition("=")
    try:
        return f"{key}={float(value):.4g}"
    except ValueError:
        return override


def _fitness(result: dict[str, Any]) -> float | None:
    value = (result.get("fitness") or {}).get("value")
    return float(value) if value is not None else None


def table(runs: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows: the run, what is particular to it, its validation scores, its fitness.

    Below the runs stand their parents, measured on the same prompts.
    """
    everywhere = set.intersection(*(set(r.get("overrides", [])) for r in runs)) if len(runs) > 1 else set()
    shares: dict[str, float] = next((r["shares"] for r in runs if r.get("shares")), {})
    measured: dict[str, Any] = {r["number"]: (r.get("metrics") or {}).get("merged", {}) for r in runs}
    parents = {
        name: splits for r in runs for name, splits in (r.get("metrics") or {}).items() if name != "merged"
    }
    names = list(dict.fromkeys(n for m in measured.values() for n in m.get("validation", {})))

    def cells(of: Any) -> list[str]:
        found = of.get("validation", {})
        own = [scores.number(found[n]["value"]) if n in found else "–" for n in names]
        return [*own, scores.number(*scores.mean(found, shares))]

    out = []
    for r in runs:
        own = " ".join(_short(o) for o in r.get("overrides", []) if o not in everywhere)
        what = own if r.get("status") == "done" else f"{own} ({r.get('status')})"
        out.append([r["number"], what, *cells(measured[r["number"]]), scores.number(_fitness(r))])
    out += [["", f"parent {name}", *cells(splits), ""] for name, splits in parents.items()]
    return ["run", "", *names, "mean", "fitness"], out
