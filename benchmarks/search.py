"""What an evolution is worth, on the tiny family: `python -m benchmarks.search`.

1. `search=cma` with its default budget: the winner's mean on the validation split beside the
   initial point's and the best parent's, seed by seed.
2. The space of `search=cma_layers`: CMA beside random search at the same budget, over more seeds; on the
   search split, which both climb, and on the validation split.
3. What the controller itself costs: the same loop, journal and live table with workers that answer at once.

Every sweep is the command that a user types; the numbers are those of its result.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.printing import console, say, table
from mergelab.evaluation import Score
from mergelab.optimization import run_search
from mergelab.optimization.candidate_evaluator import Outcome
from mergelab.optimization.executors.base import EvaluationRequest
from mergelab.report import score_table

GAIN = 0.10
"""How far the winner has to be above the initial point."""
OVERHEAD = 50.0
"""Milliseconds that the controller may cost a candidate."""
PARENTS = ("base", "math", "physics", "code", "japanese")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search", description=(__doc__ or "").partition("\n\n")[2]
    )
    parser.add_argument("--seeds", type=int, default=3, help="of part 1; default %(default)s")
    parser.add_argument("--layer-seeds", type=int, default=5, help="of part 2; default %(default)s")
    parser.add_argument("--layer-budget", type=int, help="candidates of part 2; default that of cma_layers")
    options = parser.parse_args()
    terminal = console(110)
    with tempfile.TemporaryDirectory(prefix="mergelab-") as folder:
        if options.seeds:
            _initial(Path(folder), options.seeds, terminal)
        if options.layer_seeds:
            _layers(Path(folder), options.layer_seeds, options.layer_budget, terminal)
        _overhead(Path(folder), terminal)


def _sweep(folder: Path, name: str, *arguments: str) -> dict[str, Any]:
    """The result of a sweep."""
    where = folder / name
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "mergelab", "-m", *arguments, f"hydra.sweep.dir={where}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads((where / "result.json").read_text(encoding="utf-8"))
    result["seconds"] = time.perf_counter() - start
    return result


def _mean(result: dict[str, Any], row: str) -> float:
    value, _ = score_table.mean(result["metrics"][row]["validation"], result["shares"])
    assert value is not None
    return float(value)


def _initial(folder: Path, seeds: int, terminal: Console) -> None:
    shown = table("seed", "winner", "initial", "gain", "best parent", "beats all", f"gain >= {GAIN}", "s")
    for seed in range(seeds):
        r = _sweep(folder, f"cma{seed}", "search=cma", f"search.seed={seed}", f"seed={seed}")
        winner, preset = _mean(r, "winner"), _mean(r, "preset")
        parent = max(_mean(r, p) for p in PARENTS)
        said = ["yes" if x else "NO" for x in (winner > parent, winner - preset >= GAIN)]
        shown.add_row(str(seed), f"{winner:.3f}", f"{preset:.3f}", f"{winner - preset:+.3f}", f"{parent:.3f}",
                      *said, f"{r['seconds']:.0f}")  # fmt: skip
        say(f"seed {seed}: {winner - preset:+.3f}", style="dim")
    terminal.print(shown)
    terminal.print("search=cma, default budget, validation split\n")


def _layers(folder: Path, seeds: int, budget: int | None, terminal: Console) -> None:
    more = [f"search.budget={budget}"] if budget else []
    found: dict[str, list[tuple[float, float]]] = {"CMA": [], "RandomSearch": []}
    shape = ""
    for seed in range(seeds):
        for optimizer, values in found.items():
            r = _sweep(folder, f"{optimizer}{seed}", "search=cma_layers", f"search.optimizer={optimizer}",
                       f"search.seed={seed}", f"seed={seed}", *more)  # fmt: skip
            values.append((r["winner"]["fitness"], _mean(r, "winner")))
            shape = f"{r['search']['dimension']} dimensions, {r['search']['budget']} candidates"
            say(f"{optimizer} {seed}: {values[-1][0]:.3f} {values[-1][1]:.3f}", style="dim")
    for split, name in enumerate(("search", "validation")):
        shown = table(f"{name} split", *map(str, range(seeds)), "mean")
        for optimizer, values in found.items():
            numbers = [v[split] for v in values]
            shown.add_row(optimizer, *(f"{n:.3f}" for n in numbers), f"{statistics.mean(numbers):.3f}")
        terminal.print(shown)
    terminal.print(f"space of search=cma_layers, {shape}; the winner's mean by seed\n")


def _overhead(folder: Path, terminal: Console) -> None:
    """Run a sweep in this process whose candidates cost nothing."""
    from mergelab.cli.main import main as command

    seconds: list[float] = []
    evolve = run_search.evolve

    def timed(setup: Any, journal: Any, *rest: Any) -> None:
        start = time.perf_counter()
        evolve(setup, journal, *rest)
        seconds.append((time.perf_counter() - start) / len(journal.select("candidate")))

    replaced = {"evolve": timed, "make_executor": lambda *_: Instant(), "finalize": lambda *_: 0.0}
    kept = {name: getattr(run_search, name) for name in replaced}
    argv = sys.argv
    try:
        for name, stand_in in replaced.items():
            setattr(run_search, name, stand_in)
        sys.argv = ["mergelab", "-m", "search=cma", "search.budget=500", f"hydra.sweep.dir={folder / 'none'}"]
        command()
    finally:
        sys.argv = argv
        for name, original in kept.items():
            setattr(run_search, name, original)
    terminal.print(
        f"controller: {1000 * seconds[0]:.1f} ms a candidate (wanted: under {OVERHEAD:g}), 500 candidates "
        "that cost nothing: asked for, written to the disk, told and shown"
    )


class Instant:
    """An executor that answers at once, with numbers that depend on the candidate."""

    show: Any = None

    def evaluate(self, requests: Sequence[EvaluationRequest]) -> Iterator[tuple[int, Outcome]]:
        """As `Executor` says."""
        for index, request in enumerate(requests):
            value = sum(e.weight for e in request.run.experts.values() if isinstance(e.weight, float)) / 10
            yield (
                index,
                Outcome(
                    {
                        m.name: asdict(Score(value, 0.01, 100, m.metric or "", True, m.task))
                        for m in request.measures
                    }
                ),
            )

    def close(self, at_once: bool = False) -> None:
        """As `Executor` says."""


if __name__ == "__main__":
    main()
