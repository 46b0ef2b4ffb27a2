"""slurmctld is away, and comes back: a search in any of its phases comes to the end of an undisturbed one."""

from __future__ import annotations

import time

import pytest
from forks import Fork
from patience import until
from slurm_search import Lab, Lines, Search
from slurm_together import Ended, after

pytestmark = pytest.mark.slurm

SECONDS = 8.0
"""How long it is away: tasks that are to end meanwhile do so by their faults."""


def outages(lab: Lab) -> dict[str, tuple[Search, Fork]]:
    """Two of them: slurmctld is killed while the tasks of a search are running, and it is ended while another
    is about to submit and the tasks of a third end."""
    found: dict[str, tuple[Search, Fork]] = {}
    with lab.labs.frail() as cluster:

        def begin(phase: str, **faults: str) -> Search:
            s = lab.labs.lab(f"away-{phase}").search(on=cluster)
            for name, fault in faults.items():
                s.fault(name, *fault.split(", "))
            found[phase] = s, s.start()
            return s

        def come_back() -> None:
            time.sleep(SECONDS)
            cluster.start("slurmctld")
            until(lambda: cluster.call("sinfo", check=False), "slurmctld answers", 120, every=0.2)

        running = begin("run", candidate2="sleep 12", candidate3="kill 8, ok")
        for name in ("candidate2", "candidate3"):
            running.measured(name)
        time.sleep(6)  # what slurmctld knows is on its disk after five seconds
        cluster.kill("slurmctld")
        come_back()

        submitting = begin("submit", **{"preset-1": "sleep 8"}, candidate2="sleep 4", candidate3="kill, ok")
        collecting = begin("collect", candidate2="sleep 6", candidate3="kill, ok")
        submitting.measured("preset-1")
        for name in ("candidate2", "candidate3"):
            collecting.measured(name)
        cluster.stop("slurmctld")
        come_back()
        for _, process in found.values():
            process.wait()
    return found


@after(outages)
@pytest.mark.parametrize("when", ["submit", "run", "collect"])
def test_slurmctld_away(ended: Ended, undisturbed: Lines, when: str) -> None:
    s, process = ended()[when]
    s.end(process)
    assert s.lines() == undisturbed
    s.nothing_twice()
