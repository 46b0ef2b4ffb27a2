"""All runs of a sweep beside each other, when the sweep ends."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergelab.core.run_dir import read_json, write_text
from mergelab.report import score_table, terminal

Result = Mapping[str, Any]
"""result.json, with the run's `number`."""

CLEAR = 2.0
"""Standard errors of a difference above which two scores count as different."""


def compare_runs(folder: Path) -> None:
    """Print the comparison of every run below a sweep's folder, best first, which is best on what, and
    leave the table as CSV."""
    runs = collect(folder)
    if not any(r.get("metrics") or r.get("model") or r.get("error") for r in runs):
        return  # nothing was made or measured, as by job=generate
    heads, body = table(runs)
    terminal.gap()
    words = 1 + len(varied(runs))
    terminal.table(f"{len(runs)} runs, best first", heads, body, first_bold=True, texts=words)
    best = [*leaders(runs)]
    if len(runs) > 1 and best:
        terminal.gap()
        terminal.table("best on", ["", "run", "", "not clearly worse"], best)
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


def _order(result: Result) -> tuple[bool, float, int, str]:
    """The fittest first, 0 and less among them; without a fitness last; else by number."""
    fitness, number = _fitness(result), result["number"]
    return fitness is None, -(fitness or 0.0), int(number) if number.isdigit() else 1 << 30, number


def _fitness(result: Result) -> float | None:
    value = (result.get("fitness") or {}).get("value")
    return float(value) if value is not None else None


def varied(runs: Sequence[Result]) -> list[str]:
    """The keys in which runs differ, in the order in which they were typed."""
    if len(runs) < 2:
        return []
    everywhere = set.intersection(*(set(r.get("overrides", [])) for r in runs))
    keys = (o.partition("=")[0] for r in runs for o in r.get("overrides", []) if o not in everywhere)
    return list(dict.fromkeys(keys))


def _value(result: Result, key: str) -> str:
    """What a run has for a key, a number rounded to what fits a table; empty where it has none."""
    given = [o.partition("=")[2] for o in result.get("overrides", []) if o.partition("=")[0] == key]
    try:
        return f"{float(given[-1]):.4g}" if given else ""
    except ValueError:
        return str(given[-1])


def _short(keys: Sequence[str]) -> list[str]:
    """The keys by their last parts, as many as it takes to tell them apart."""
    parts = [k.split(".") for k in keys]
    for n in range(1, max((len(p) for p in parts), default=1) + 1):
        names = [".".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return list(keys)


def _merged(result: Result) -> Mapping[str, Any]:
    """The validation scores of a run's model, by measure."""
    found: Mapping[str, Any] = ((result.get("metrics") or {}).get("merged") or {}).get("validation") or {}
    return found


def _measures(runs: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(n for r in runs for n in _merged(r)))


def _shares(runs: Sequence[Result]) -> Mapping[str, float]:
    return next((r["shares"] for r in runs if r.get("shares")), {})


def table(runs: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows: the run, what is particular to it, its validation scores, its fitness.

    Below the runs stand their parents, measured on the same prompts.
    """
    keys, names, shares = varied(runs), _measures(runs), _shares(runs)
    parents = {
        name: splits for r in runs for name, splits in (r.get("metrics") or {}).items() if name != "merged"
    }

    def cells(found: Mapping[str, Any]) -> list[str]:
        own = [score_table.number(found[n]["value"]) if n in found else "–" for n in names]
        return [*own, score_table.number(*score_table.mean(found, shares))]

    out = []
    for r in runs:
        number = r["number"] if r.get("status") == "done" else f"{r['number']} ({r.get('status')})"
        out.append(
            [number, *(_value(r, k) for k in keys), *cells(_merged(r)), score_table.number(_fitness(r))]
        )
    pad = [""] * (len(keys) - 1)
    for name, splits in parents.items():
        label = ["", f"parent {name}", *pad] if keys else [f"parent {name}"]
        out.append([*label, *cells(splits.get("validation") or {}), ""])
    return ["run", *_short(keys), *names, "mean", "fitness"], out


def leaders(runs: Sequence[Result]) -> Iterator[list[str]]:
    """For each measure and their mean: its name, the best run, the score, and the runs that are not
    clearly worse.

    Two scores count as different where they differ by more than two standard errors of their difference,
    sqrt(se_a^2 + se_b^2); prompts that both runs share make the true error smaller.
    """
    shares, names, keys = _shares(runs), _measures(runs), varied(runs)
    labels = {r["number"]: " ".join([r["number"], *(_value(r, k) for k in keys)]) for r in runs}
    for name in [*names, *(["mean"] if len(names) > 1 else [])]:
        found = []
        for r in runs:
            own = _merged(r)
            if name == "mean":
                value, stderr = score_table.mean(own, shares)
                better = all(s["higher_is_better"] for s in own.values())
            elif name in own:
                value, stderr, better = (own[name].get(k) for k in ("value", "stderr", "higher_is_better"))
            else:
                continue
            if value is not None:
                found.append((value if better else -value, stderr, r["number"], value))
        if not found:
            continue
        top = max(found, key=lambda f: f[0])
        near = [
            f[2]
            for f in found
            if f is not top and top[0] - f[0] <= CLEAR * math.hypot(top[1] or 0.0, f[1] or 0.0)
        ]
        yield [name, labels[top[2]], score_table.number(top[3], top[1]), ", ".join(near)]
