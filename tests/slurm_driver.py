"""A search on a cluster, with candidates that cost nothing:

    python slurm_driver.py FOLDER SETUP.pkl [hardware key=value ...]

Everything but the measuring is what a user's search has: controller, journal, workers, batches, tasks.
STOP_AT=intended or STOP_AT=submitted kills it at its second submission, before or after sbatch.
"""

from __future__ import annotations

import copyreg
import os
import pickle
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import slurm_candidates as candidates
import yaml

from mergelab.optimization.controller import TooManyFailures, evolve
from mergelab.optimization.executors.base import EvaluationRequest
from mergelab.optimization.executors.cluster import ClusterExecutor
from mergelab.optimization.journal import Journal
from mergelab.optimization.population_evaluator import Watch
from mergelab.optimization.request import Setup
from mergelab.report import terminal
from mergelab.schema import Hardware, Slurm
from mergelab.slurm import client
from mergelab.slurm.slurm_scheduler import SlurmScheduler


def stop_at(where: str) -> None:
    """Kill this process around its second submission."""
    count, submit = 0, client.submit

    def submitting(script: Path, *, test: bool = False) -> str:
        nonlocal count
        count += 1
        if count == 2 and where == "intended":
            os.kill(os.getpid(), signal.SIGKILL)
        job = submit(script, test=test)
        if count == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return job

    client.submit = submitting


def light(order: EvaluationRequest) -> tuple[type, tuple[Any, ...]]:
    """How an order travels to its task."""
    weights = [e.weight for e in order.run.experts.values() if isinstance(e.weight, float)]
    return candidates.Asked, (order.name, weights)


def hardware(settings: list[str]) -> Hardware:
    """That of hardware=slurm, with these settings, `slurm.KEY` among them."""
    given = {k: yaml.safe_load(v) for k, _, v in (s.partition("=") for s in settings)}
    task = {k.removeprefix("slurm."): v for k, v in given.items() if k.startswith("slurm.")}
    rest = {k: v for k, v in given.items() if not k.startswith("slurm.")}
    return Hardware(**rest, slurm=Slurm(**{"memory": "200MB", **task}))


def search(folder: Path, setup: Setup, executor: Any, watch: Watch = lambda event, line: None) -> None:
    """Begin or go on with it."""
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder)
    if journal.begin is None:
        about = {"name": "cma", "optimizer": "CMA", "population": setup.population, "space": {}}
        journal.append("begin", schema=1, search=about)
    evolve(setup, journal, executor, watch)


def main(arguments: list[str]) -> None:
    """The command."""
    folder, setup = Path(arguments[0]).resolve(), pickle.loads(Path(arguments[1]).read_bytes())
    if where := os.environ.get("STOP_AT"):
        stop_at(where)
    setup = replace(setup, run=replace(setup.run, hardware=hardware(arguments[2:])))
    copyreg.pickle(EvaluationRequest, light)
    scheduler = SlurmScheduler(setup.run.hardware.slurm)
    measure = partial(candidates.measure, str(folder))
    executor = ClusterExecutor(setup.run, folder, scheduler, measure=measure)
    try:
        search(folder, setup, executor)
    except TooManyFailures as e:
        print(e)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        executor.close(at_once=True)
    terminal.say("the search is done")


if __name__ == "__main__":
    main(sys.argv[1:])
