"""Random faults, one every few seconds, through a whole search: it comes to the right end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import cloudpickle
import psutil
import pytest
import slurm_candidates as candidates
from patience import until
from searching import Pretended, setup_of
from slurm_cluster import Cluster
from slurm_driver import search
from slurm_search import Search

from mergelab.optimization.journal import read

pytestmark = pytest.mark.slurm

SECONDS = 75.0
"""How long there are faults."""


class Chaos:
    """Faults, and who suffers them. A candidate is killed at most once: twice is a failure, and told."""

    def __init__(self, s: Search, chance: random.Random):
        self.s, self.chance, self.cluster = s, chance, s.cluster
        self.process = s.start(PACE=2)
        self.blamed: set[str] = set()
        self.down: list[str] = []
        self.done: list[str] = []

    def strike(self) -> None:
        """One fault."""
        fault = self.chance.choice(
            [self.kill_task, self.cancel_task, self.requeue, self.kill_sweeper, self.slurmctld, self.node]
        )
        if fault():
            self.done.append(fault.__name__)

    def mend(self) -> None:
        """Start what is down, and the search if it was killed."""
        while self.down:
            self.cluster.start(self.down.pop())
        if self.process.poll() is not None and self.process.returncode < 0:
            self.process = self.s.start(PACE=2)

    def running(self) -> list[tuple[str, psutil.Process]]:
        """The candidates in work, and their processes."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if "mergelab.slurm.task" in line and any(str(self.s.folder) in a for a in line):
                found.append(process)
        names = {x["number"] for x in self.s.lines()}
        calls = sorted((self.s.folder / "calls").glob("candidate*")) if found else []
        waiting = [c.name for c in calls if int(c.name.removeprefix("candidate")) not in names]
        return [(name, p) for p in found for name in waiting if self._is(p, name)]

    def _is(self, process: psutil.Process, name: str) -> bool:
        try:
            env = process.environ()
        except psutil.Error:
            return False
        last = (self.s.calls(name) or [""])[-1].split()
        return bool(last) and last[0] == f"{env.get('SLURM_ARRAY_JOB_ID')}_{env.get('SLURM_ARRAY_TASK_ID')}"

    def _victim(self) -> tuple[str, psutil.Process] | None:
        fresh = [(n, p) for n, p in self.running() if n not in self.blamed]
        if not fresh:
            return None
        self.blamed.add((chosen := self.chance.choice(fresh))[0])
        return chosen

    def kill_task(self) -> bool:
        """SIGKILL to a candidate's process."""
        if victim := self._victim():
            victim[1].kill()
        return victim is not None

    def cancel_task(self) -> bool:
        """As an administrator would."""
        if victim := self._victim():
            self.cluster.call("scancel", self.s.calls(victim[0])[-1].split()[0], check=False)
        return victim is not None

    def requeue(self) -> bool:
        """Start a task again from its beginning."""
        if found := self.running():
            name = self.chance.choice(found)[0]
            self.cluster.call("scontrol", "requeue", self.s.calls(name)[-1].split()[0], check=False)
        return bool(found)

    def kill_sweeper(self) -> bool:
        """SIGKILL to the process that submits."""
        self.process.kill()
        self.process.wait()
        return True

    def slurmctld(self) -> bool:
        """Slurm does not answer for a while."""
        self.cluster.stop("slurmctld")
        self.down.append("slurmctld")
        return True

    def node(self) -> bool:
        """A node fails, with what runs on it."""
        name = self.chance.choice(["slurmd-n3", "slurmd-n4"])
        self.cluster.kill(name)
        self.down.append(name)
        return True


def test_chaos_ends_with_the_right_result(cluster: Cluster, tmp_path: Path) -> None:
    setup = setup_of("hardware=slurm", population=4, budget=16)
    path = tmp_path / "setup.pkl"
    path.write_bytes(cloudpickle.dumps(setup))
    search(tmp_path / "whole", setup, Pretended(candidates.smooth))
    whole = [x for x in read(tmp_path / "whole" / "journal.jsonl") if x["event"] == "candidate"]

    seed = int(os.environ.get("CHAOS_SEED", random.randrange(1 << 16)))
    print(f"CHAOS_SEED={seed}")
    chaos = Chaos(Search(tmp_path / "sweep", path, cluster), random.Random(seed))
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and (chaos.process.poll() is None or chaos.process.returncode < 0):
        time.sleep(chaos.chance.uniform(2, 4))
        chaos.mend()
        chaos.strike()
    chaos.mend()
    out = finished(chaos)
    assert chaos.s.lines() == whole, f"{seed} {chaos.done}\n{out}"
    assert len(chaos.done) >= 5, chaos.done
    chaos.s.nothing_twice()
    until(lambda: not chaos.running(), "no process is left", 120)


def finished(chaos: Chaos) -> str:
    """Wait for the end, or go on to it."""
    try:
        out, _ = chaos.process.communicate(timeout=500)
    except subprocess.TimeoutExpired:
        chaos.process.send_signal(signal.SIGKILL)
        raise
    assert chaos.process.returncode == 0, out
    return out
