"""One cluster a test process, and a search on it whose candidates cost nothing."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cloudpickle
from forks import Fork, Forks
from patience import until
from searching import Pretended, setup_of
from slurm_cluster import Cluster
from slurm_driver import search

from mergelab.optimization.journal import read
from mergelab.scheduling import submission_log

HERE = Path(__file__).parent
Lines = list[dict[str, Any]]


def port() -> int:
    """The first of some ports that no other test process uses."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    return 26800 + 200 * int(worker)


@dataclass
class Search:
    """A search in a folder, as a process."""

    folder: Path
    setup: Path
    cluster: Cluster
    forks: Forks
    settings: list[str] = field(default_factory=list)
    runs: int = 0

    def fault(self, name: str, *lines: str) -> None:
        """What is to happen when a candidate is measured: a line each time, the last one from then on."""
        path = self.folder / "faults" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines))

    def start(self, **env: Any) -> Fork:
        """Begin, or go on."""
        self.runs += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        path = [str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        return self.forks.start(
            [str(self.folder), str(self.setup), *self.settings],
            self.cluster.env | {"PYTHONPATH": os.pathsep.join(path)} | {k: str(v) for k, v in env.items()},
            self.folder.with_name(f"{self.folder.name}-said{self.runs}"),
        )

    def end(self, process: Fork, status: int = 0) -> str:
        """Wait for it; returns what it said."""
        assert process.wait() == status, process.out.read_text()
        return process.out.read_text()

    def run(self, status: int = 0, **env: Any) -> str:
        """From where it is to its end."""
        return self.end(self.start(**env), status)

    def lines(self) -> Lines:
        """The candidates in the journal."""
        return measured(self.folder)

    def calls(self, name: str) -> list[str]:
        """How often a candidate was measured, and where: job, rank, node, place on the node's disk."""
        path = self.folder / "calls" / name
        return path.read_text().splitlines() if path.exists() else []

    def measured(self, name: str) -> Any:
        """Wait until a candidate is being measured; returns job, rank, node."""
        found = until(lambda: self.calls(name), f"{name} is measured", 200, every=0.1)
        return found[-1].split()[:3]

    @property
    def name(self) -> str:
        """Of its Slurm jobs."""
        return submission_log.job_name(self.folder)

    def submitted(self) -> list[list[str]]:
        """The items of each batch that became a job."""
        found = submission_log.read(self.folder / "slurm")
        jobs = {x["batch"] for x in found if x["event"] == "submitted"}
        return [[name for task in x["tasks"] for name, _ in task] for x in found
                if x["event"] == "submitting" and x["batch"] in jobs]  # fmt: skip

    def nothing_twice(self) -> None:
        """Slurm has seen each batch once, and nothing of it is left."""
        found = submission_log.read(self.folder / "slurm")
        jobs = [x["job"] for x in found if x["event"] == "submitted"]
        assert len(jobs) == len(set(jobs))
        tasks = self.cluster.tasks(self.name, set(jobs))
        assert {t["id"].partition("_")[0] for t in tasks} == set(jobs)
        scripts = {t["line"].split()[-1] for t in tasks}
        assert len(scripts) == len(jobs)  # a script is submitted once
        assert self.cluster.call("squeue", "-h", f"--name={self.name}", "--states=R,PD,CG,CF") == ""


def measured(folder: Path) -> Lines:
    """The candidates in a search's journal."""
    return [x for x in read(folder / "journal.jsonl") if x["event"] == "candidate"]


@dataclass
class Lab:
    """Where things are done to searches and commands: a folder, and the clusters."""

    folder: Path
    cluster: Cluster
    labs: Labs

    def search(self, *settings: str, on: Cluster | None = None) -> Search:
        """`search("workers=2")`: one on the cluster, not begun yet."""
        return Search(self.folder / "sweep", self.labs.setup, on or self.cluster, self.labs.forks,
                      list(settings))  # fmt: skip

    def typed(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """What a user types on the login node, in the folder."""
        return subprocess.Popen(
            [sys.executable, "-m", "mergelab", *arguments], env=self.cluster.env | env, cwd=self.folder,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def command(self, *arguments: str, status: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        """The same, and what came of it."""
        with self.labs.turn:
            n = self.labs.commands = self.labs.commands + 1
        files = [self.labs.folder / f"command{n}.{end}" for end in ("out", "err")]
        typed = [str(self.folder), "", *arguments]
        code = self.labs.warm.start(typed, self.cluster.env | env, *files).wait(700)
        out, err = (f.read_text(encoding="utf-8") for f in files)
        assert code == status, out + err
        return subprocess.CompletedProcess(arguments, status, out, err)


class Labs:
    """What all labs of a test process have in common."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.forks = Forks("warm_search.py")
        self.warm = Forks("warm_command.py", "lm_eval.evaluator", "nevergrad", "cma")
        self.turn, self.commands = threading.Lock(), 0
        self.cluster = Cluster(folder / "cluster", port(), nodes=7, apart=3)
        self.setup = folder / "setup.pkl"
        self._small = Cluster(folder / "small", port() + 50, nodes=2, accounting=False, array=4)
        self._frail = Cluster(folder / "frail", port() + 100)
        self._first, self._alone = threading.Lock(), threading.Lock()

    def begin(self) -> None:
        """Start the cluster, and meanwhile compose two generations of four."""
        with ThreadPoolExecutor(1) as aside:
            starting = aside.submit(self.cluster.up)
            self.setup.write_bytes(cloudpickle.dumps(setup_of("hardware=slurm", population=4, budget=8)))
            starting.result()

    def longer(self, path: Path, budget: int) -> None:
        """The same search with another budget."""
        setup = pickle.loads(self.setup.read_bytes())
        run = replace(setup.run, search=replace(setup.run.search, budget=budget))
        path.write_bytes(cloudpickle.dumps(replace(setup, run=run)))

    @property
    def small(self) -> Cluster:
        """A cluster without accounting, whose arrays have at most three tasks."""
        with self._first:
            return self._small if self._small.begun else self._small.up()

    @contextmanager
    def frail(self) -> Iterator[Cluster]:
        """A cluster in order, whose daemons may be ended and killed: one deed has it at a time."""
        with self._alone:
            if self._frail.begun:
                self._frail.heal()
            yield self._frail.up()

    def lab(self, name: str) -> Lab:
        """One with a folder of its own."""
        folder = self.folder / name
        folder.mkdir()
        return Lab(folder, self.cluster, self)

    def close(self) -> None:
        """The end of all."""
        self.forks.close()
        self.warm.close()
        for cluster in (self.cluster, self._small, self._frail):
            cluster.wipe()


def without_cluster(folder: Path, setup: Path) -> Lines:
    """The candidates of a search in this process."""
    search(folder, pickle.loads(setup.read_bytes()), Pretended())
    return measured(folder)
