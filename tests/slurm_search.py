"""One cluster a test process, and a search on it whose candidates cost nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import slurm_candidates as candidates
from patience import until
from searching import Pretended, setup_of
from slurm_cluster import Cluster, absent
from slurm_driver import search

from mergelab.optimization.journal import read
from mergelab.slurm import ledger

HERE = Path(__file__).parent


def port() -> int:
    """The first of some ports that no other test process uses."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    return 26800 + 200 * int(worker)


def started(folder: Path, **knobs: Any) -> Cluster:
    """A cluster that is up, if this machine has the programs."""
    if absent():
        pytest.skip("needs a Slurm cluster")
    return Cluster(folder, **knobs).up()


@pytest.fixture(scope="session")
def session_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster of this test process: 4 nodes of 16 processors and 8 GPUs."""
    cluster = started(tmp_path_factory.mktemp("cluster"), port=port())
    yield cluster
    cluster._tool("wipe")


@pytest.fixture
def cluster(session_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, in order, and our own commands talking to it."""
    session_cluster.heal()
    monkeypatch.setenv("SLURM_CONF", session_cluster.env["SLURM_CONF"])
    return session_cluster


@dataclass
class Search:
    """A search in a folder, as a process."""

    folder: Path
    setup: Path
    cluster: Cluster
    settings: list[str] = field(default_factory=list)

    def fault(self, name: str, *lines: str) -> None:
        """What is to happen when a candidate is measured: a line each time, the last one from then on."""
        path = self.folder / "faults" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines))

    def start(self, **env: Any) -> subprocess.Popen[str]:
        """Begin, or go on."""
        env = {k: str(v) for k, v in env.items()}
        driver = [sys.executable, str(HERE / "slurm_driver.py")]
        path = [str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        return subprocess.Popen(
            [*driver, str(self.folder), str(self.setup), *self.settings],
            env=self.cluster.env | {"PYTHONPATH": os.pathsep.join(path)} | env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def end(self, process: subprocess.Popen[str], status: int = 0) -> str:
        """Wait for it; returns what it said."""
        out, _ = process.communicate(timeout=500)
        assert process.returncode == status, out
        return out

    def run(self, status: int = 0, **env: Any) -> str:
        """From where it is to its end."""
        return self.end(self.start(**env), status)

    def lines(self) -> list[dict[str, Any]]:
        """The candidates in the journal."""
        return [x for x in read(self.folder / "journal.jsonl") if x["event"] == "candidate"]

    def calls(self, name: str) -> list[str]:
        """How often a candidate was measured, and where: job, rank, node."""
        path = self.folder / "calls" / name
        return path.read_text().splitlines() if path.exists() else []

    def measured(self, name: str) -> Any:
        """Wait until a candidate is being measured; returns where."""
        return until(lambda: self.calls(name), f"{name} is measured", 120)[-1].split()

    @property
    def name(self) -> str:
        """Of its Slurm jobs."""
        return ledger.job_name(self.folder)

    def submitted(self) -> list[list[str]]:
        """The items of each batch that became a job."""
        found = ledger.read(self.folder)
        jobs = {x["batch"] for x in found if x["event"] == "submitted"}
        return [[name for task in x["tasks"] for name, _ in task] for x in found
                if x["event"] == "submitting" and x["batch"] in jobs]  # fmt: skip

    def nothing_twice(self) -> None:
        """Slurm has seen each batch once, and nothing of it is left."""
        found = ledger.read(self.folder)
        jobs = [x["job"] for x in found if x["event"] == "submitted"]
        assert len(jobs) == len(set(jobs))
        tasks = self.cluster.tasks(self.name, set(jobs))
        assert {t["id"].partition("_")[0] for t in tasks} == set(jobs)
        scripts = {t["line"].split()[-1] for t in tasks}
        assert len(scripts) == len(jobs)  # a script is submitted once
        assert self.cluster.call("squeue", "-h", f"--name={self.name}", "--states=R,PD,CG,CF") == ""


@pytest.fixture(scope="session")
def setup_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two generations of four, composed once."""
    setup = setup_of("hardware=slurm", population=4, budget=8)
    path = tmp_path_factory.mktemp("setup") / "setup.pkl"
    path.write_bytes(cloudpickle.dumps(setup))
    return path


@pytest.fixture(scope="session")
def undisturbed(setup_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The candidates of the same search without a cluster."""
    import pickle

    folder = tmp_path_factory.mktemp("undisturbed")
    search(folder, pickle.loads(setup_file.read_bytes()), Pretended(candidates.smooth))
    return [x for x in read(folder / "journal.jsonl") if x["event"] == "candidate"]


@pytest.fixture
def searching(cluster: Cluster, setup_file: Path, tmp_path: Path) -> Iterator[Callable[..., Search]]:
    """`searching("workers=2")`: a search on the cluster, not begun yet."""
    made: list[Search] = []

    def make(*settings: str, on: Cluster | None = None) -> Search:
        made.append(Search(tmp_path / f"sweep{len(made)}", setup_file, on or cluster, list(settings)))
        return made[-1]

    yield make
    for one in made:
        if one.cluster is cluster:  # another is gone by now
            one.cluster.call("scancel", f"--name={one.name}", check=False)


def interrupt(process: subprocess.Popen[str], how: signal.Signals = signal.SIGKILL) -> None:
    """End a process by a signal."""
    process.send_signal(how)
    process.wait(timeout=60)
