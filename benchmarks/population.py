"""A candidate of a population beside one that goes over the disk: `python -m benchmarks.population`.

Ours: the experts stay in memory and the candidate is merged into a live model. The disk path: mergekit
merges in this very process to disk (`run_merge`), and the result is loaded with transformers. Both have
the same weights and densities, arithmetic in float32 and models in bfloat16; neither is evaluated. They
take turns, in one process that has imported everything before. What ours does once (loading, and what
all candidates share) is told, and shared out among `--candidates`.

The model has the shape of Qwen2-0.5B, with random numbers in it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from hydra import compose, initialize_config_dir

from benchmarks.models import Shape, make
from benchmarks.printing import console, say, table
from mergelab.composition import typed
from mergelab.core.conf_dir import CONF
from mergelab.core.library_output import silence_libraries
from mergelab.core.machine import available_processors
from mergelab.core.sizes import format_size
from mergelab.optimization.candidate_evaluator import CandidateEvaluator
from mergelab.schema import Expert, Run

METHODS = {"task_arithmetic": 15, "dare_ties": 30, "ties": 30}
"""And how many times the disk path's time a candidate of ours may be worth, at least."""

QWEN2 = Shape(vocab=151936, tied=True)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.population", description=(__doc__ or "").partition("\n\n")[2]
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="with commas; default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="of the disk path; default %(default)s")
    parser.add_argument("--turns", type=int, default=5, help="of ours in a round; default %(default)s")
    parser.add_argument(
        "--candidates", type=int, default=50, help="that share the set-up; default %(default)s"
    )
    parser.add_argument("--layers", type=int, default=QWEN2.layers, help="default %(default)s")
    parser.add_argument("--vocab", type=int, default=QWEN2.vocab, help="default %(default)s")
    parser.add_argument("--folder", type=Path, help="keep the models here and use them again")
    options = parser.parse_args()
    shape = Shape(layers=options.layers, vocab=options.vocab, tied=True)
    shown = table("method", "once s", "each s", "CPU s", "with its share s", "disk s", "ratio", "wanted")
    with tempfile.TemporaryDirectory(prefix="mergelab-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        models = make(shape, folder)
        warm = _run("task_arithmetic", models)
        CandidateEvaluator(warm).merge(warm)  # what is imported and compiled for it is not what is measured
        for method in options.methods.split(","):
            shown.add_row(*_row(method, models, Path(temporary), options))
    terminal = console(120)
    terminal.print(shown)
    terminal.print(
        f"Qwen2 of {shape.parameters() / 1e6:.0f}M parameters, bfloat16, tied; a base and {shape.experts} "
        f"experts of {format_size(2 * shape.parameters())}, in the page cache\n"
        f"{available_processors()} cores; mergekit {version('mergekit')}, torch {version('torch')}; medians "
        f"of {options.rounds} rounds in turn; once shared out among {options.candidates} candidates\n"
        "ratio: the disk path's seconds by ours with its share of what is done once"
    )


def _row(method: str, models: list[Path], out: Path, options: argparse.Namespace) -> list[str]:
    rng = random.Random(0)
    run = _run(method, models)
    bench = CandidateEvaluator(run)
    start = time.perf_counter()
    bench.merge(run)
    first = time.perf_counter() - start
    ours: list[float] = []
    cpu: list[float] = []
    disk: list[float] = []
    for n in range(options.rounds):
        for _ in range(options.turns):
            _draw(run, rng)
            with _timed(ours, cpu):
                bench.merge(run)
        with _timed(disk, []):
            _by_disk(run, method, models, out / "merged")
        say(
            f"{method} {n + 1}/{options.rounds}: {ours[-1]:.2f} s, over the disk {disk[-1]:.1f} s",
            style="dim",
        )
    each = statistics.median(ours)
    once = first - each
    shared = each + once / options.candidates
    ratio = statistics.median(disk) / shared
    wanted = METHODS.get(method)
    return [method, f"{once:.2f}", f"{each:.3f}", f"{statistics.median(cpu):.3f}", f"{shared:.3f}",
            f"{statistics.median(disk):.2f}", f"{ratio:.1f}", f"{wanted}" if wanted else ""]  # fmt: skip


def _run(method: str, models: list[Path]) -> Run:
    base, *experts = models
    with initialize_config_dir(str(CONF)):
        run = typed(compose("config", overrides=[f"method={method}", f"model.base.path='{base}'"]))
    run.experts = {e.name: Expert(path=str(e)) for e in experts}
    _draw(run, random.Random(1))
    return run


def _draw(run: Run, rng: random.Random) -> None:
    """Other weights and densities."""
    for expert in run.experts.values():
        expert.weight = round(rng.uniform(0.1, 0.6), 3)
        if run.method.name != "task_arithmetic":
            expert.density = round(rng.uniform(0.2, 0.9), 3)


def _by_disk(run: Run, method: str, models: list[Path], out: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    experts: list[dict[str, Any]] = []
    for e in run.experts.values():
        density = {} if e.density is None else {"density": e.density}
        experts.append({"model": e.path, "parameters": {"weight": e.weight, **density}})
    config = {"merge_method": method, "base_model": str(models[0]), "models": experts,
              "dtype": "float32", "out_dtype": "bfloat16"}  # fmt: skip
    with silence_libraries():
        run_merge(
            MergeConfiguration.model_validate(config),
            str(out),
            MergeOptions(quiet=True, random_seed=0, write_model_card=False),
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
        for p in model.parameters():  # it is mapped, and read when it is used
            p.view(-1)[::1024].sum()


@contextmanager
def _timed(wall: list[float], cpu: list[float]) -> Iterator[None]:
    """Add the seconds of a block."""
    start, used = time.perf_counter(), time.process_time()
    yield
    wall.append(time.perf_counter() - start)
    cpu.append(time.process_time() - used)


if __name__ == "__main__":
    import mergekit.merge  # noqa: F401  (its imports are not what is measured)

    main()
