"""What looking at the command costs: `python -m benchmarks.startup [REPEATS]`.

Whole processes, interleaved, wall seconds, medians; the ratio is to a Python that only imports
hydra, timed in the same run.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

CASES = {
    "import hydra": ["-c", "import hydra"],
    "--version": ["-m", "mergelab", "--version"],
    "--help": ["-m", "mergelab", "--help"],
    "--cfg job": ["-m", "mergelab", "--cfg", "job"],
}


def main(repeats: int) -> None:
    """Print a row for each case."""
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(repeats):
        for name, arguments in CASES.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    floor = medians["import hydra"]
    for name, median in medians.items():
        print(f"{name:<14}{median:7.3f} s   {median / floor:5.2f} x import hydra")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
