"""What a generation costs on a Slurm cluster when its candidates cost nothing.

    python -m benchmarks.slurm [ROUNDS]

On the cluster that this machine belongs to, or else (SLURM_CONF is not set) on a throw-away one on
loopback. In turn, with eight tasks each: an empty job array; one whose tasks start Python and load what
ours load; and a generation of a search, from the optimizer's question to its answer. Only ratios of what
was timed in the same run are printed as results.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import printing

ROOT = Path(__file__).parents[1]
TASKS = 8


@contextmanager
def a_cluster(folder: Path) -> Iterator[None]:
    """The machine's own, or one for the occasion."""
    if "SLURM_CONF" in os.environ or Path("/etc/slurm/slurm.conf").exists():
        yield
        return
    tool = ["bash", str(ROOT / "tests" / "slurm" / "cluster.sh")]
    env = {**os.environ, "SLURM_LAB_NODES": "4", "SLURM_LAB_PORT": "28800"}
    subprocess.run([*tool, "up", str(folder)], check=True, env=env, stdout=subprocess.DEVNULL)
    os.environ["SLURM_CONF"] = str(folder / "etc" / "slurm.conf")
    try:
        yield
    finally:
        subprocess.run([*tool, "wipe", str(folder)], check=True, env=env, stdout=subprocess.DEVNULL)


def bare(folder: Path, work: str) -> float:
    """Seconds from sbatch to the last sign of an array whose tasks do `work` and leave a file."""
    folder.mkdir(parents=True)
    script = folder / "job.sh"
    script.write_text(f"#!/bin/bash\n{work}\ntouch {folder}/done.$SLURM_ARRAY_TASK_ID\n")
    start = time.monotonic()
    subprocess.run(
        ["sbatch", "--parsable", f"--array=0-{TASKS - 1}", f"--output={folder}/%a.out", str(script)],
        check=True, stdout=subprocess.DEVNULL, cwd=ROOT,
    )  # fmt: skip
    while len(list(folder.glob("done.*"))) < TASKS:
        time.sleep(0.02)
    return time.monotonic() - start


class Search:
    """A search whose candidates are empty, a generation at a time."""

    def __init__(self, folder: Path, generations: int):
        sys.path.insert(0, str(ROOT / "tests"))
        os.environ["PYTHONPATH"] = str(ROOT / "tests")
        from searching import setup_of

        self.folder = folder
        self.setup = setup_of("hardware=slurm", population=TASKS, budget=TASKS * generations)
        self.told: list[float] = []

    def run(self) -> None:
        """All of it; `told` has the time at which each generation was over."""
        from slurm_driver import search

        from mergelab.optimization.executors.cluster import ClusterExecutor
        from mergelab.slurm.slurm_scheduler import SlurmScheduler

        def watch(event: str, line: Any) -> None:
            if event == "generation":
                self.told.append(time.time())

        executor = ClusterExecutor(
            self.setup.run, self.folder, SlurmScheduler(self.setup.run.hardware.slurm), measure=empty
        )
        search(self.folder, self.setup, executor, watch)

    def batches(self) -> list[Path]:
        """Of the populations, in their order."""
        return sorted((self.folder / "slurm").glob("b*"))[1:]


def empty(order: Any, timeout: float | None) -> dict[str, Any]:
    """A candidate that costs nothing."""
    from dataclasses import asdict

    import slurm_candidates as candidates

    from mergelab.optimization.candidate_evaluator import Outcome

    return asdict(Outcome(scores=candidates.smooth(order)))


def main() -> None:
    """Time all three, and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as temporary, a_cluster(Path(temporary) / "cluster"):
        top = Path(temporary)
        # What a task of ours loads before its first candidate.
        loads = "import mergelab.slurm.worker, mergelab.optimization.executors.cluster, slurm_candidates"
        python = f"PYTHONPATH={ROOT}/tests {sys.executable} -c '{loads}'"
        arrays = [bare(top / f"empty{i}", "true") for i in range(rounds)]
        started = [bare(top / f"python{i}", python) for i in range(rounds)]
        search = Search(top / "sweep", rounds)
        search.run()
        again = [bare(top / f"empty_again{i}", "true") for i in range(rounds)]
        batches = search.batches()
        submits = [(b / "job.sh").stat().st_mtime for b in batches]
        ours = [told - at for told, at in zip(search.told, submits, strict=True)]
        first = [min(f.stat().st_mtime for f in (b / "begun").iterdir()) - at
                 for b, at in zip(batches, submits, strict=True)]  # fmt: skip
        last = [max(f.stat().st_mtime for f in (b / "results").iterdir()) for b in batches]
        turn = [at - end for at, end in zip(submits[1:], last, strict=False)]
    base, with_python = median([*arrays, *again]), median(started)
    rows = [
        ("an empty job array", f"{base:.2f}"),
        ("the same, and Python with what ours load", f"{with_python:.2f}"),
        ("a generation of empty candidates", f"{median(ours):.2f}"),
        ("  of it: submit to the first line of our code", f"{median(first):.2f}"),
        ("last result to the next submit", f"{median(turn):.3f}"),
        ("generation / (empty array + start of Python)", f"{median(ours) / with_python:.2f}"),
    ]
    shown = printing.table(f"{TASKS} tasks, {rounds} rounds, medians", "seconds")
    for row in rows:
        shown.add_row(*row)
    printing.console(80).print(shown)


if __name__ == "__main__":
    main()
