"""Random faults, one every few seconds, through a whole search: it comes to the right end."""

from __future__ import annotations

import os
import random
import signal
import time

import psutil
import pytest
from patience import until
from slurm_search import Lab, Search, without_cluster
from slurm_together import Ended, after

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SECONDS = float(os.environ.get("CHAOS_SECONDS", 25))
"""How long there are faults at least, as long as the search lasts."""
ENOUGH = 5
"""Faults at least."""
BUDGET = max(24, int(SECONDS / 4) // 4 * 4)
"""Of candidates, four at a time, which take about two seconds each."""
SEED = int(os.environ.get("CHAOS_SEED", random.randrange(1 << 16)))


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
        if (self.process.status or 0) < 0:
            self.process = self.s.start(PACE=2)

    def running(self) -> list[tuple[str, psutil.Process]]:
        """The candidates in work, and their processes."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if "mergelab.slurm.worker" in line and any(str(self.s.folder) in a for a in line):
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
        if going := self.process.status is None:
            self.process.interrupt()
        return going

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


def chaos(lab: Lab) -> tuple[Chaos, str]:
    """What has happened, and what the search said at its end."""
    setup = lab.folder / "setup.pkl"
    lab.labs.longer(setup, BUDGET)
    with lab.labs.frail() as cluster:
        s = Search(lab.folder / "sweep", setup, cluster, lab.labs.forks)
        chaos = Chaos(s, random.Random(SEED))
        end = time.monotonic() + SECONDS
        while chaos.process.status in (None, -signal.SIGKILL):
            if time.monotonic() > end and len(chaos.done) >= ENOUGH:
                break
            time.sleep(chaos.chance.uniform(2, 4))
            chaos.mend()
            chaos.strike()
        chaos.mend()
        chaos.process.wait()
        until(lambda: not chaos.running(), "no process is left", 120, every=0.5)
        return chaos, chaos.process.out.read_text()


@after(chaos)
def test_chaos_ends_with_the_right_result(ended: Ended) -> None:
    print(f"CHAOS_SEED={SEED}")
    found, out = ended()
    told = f"{SEED} {found.done}\n{out}"
    assert found.process.status == 0, told
    assert found.s.lines() == without_cluster(found.s.folder.with_name("whole"), found.s.setup), told
    assert len(found.done) >= ENOUGH, told
    found.s.nothing_twice()
