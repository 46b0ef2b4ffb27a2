"""The tests' own Slurm cluster, and what is done to it."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patience import until

TOOL = Path(__file__).parent / "slurm" / "cluster.sh"
COMMANDS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "slurmdbd", "mariadbd")


def absent() -> list[str]:
    """Which of the programs are not on this machine."""
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin" + os.pathsep + "/sbin"
    return [c for c in COMMANDS if shutil.which(c, path=path) is None]


@dataclass
class Cluster:
    """A cluster in a folder of its own."""

    folder: Path
    port: int
    nodes: int = 4
    accounting: bool = True
    array: int = 1001
    apart: int = 0
    """So many of the nodes, the last ones, are each in a partition of their own name only."""

    def up(self) -> Cluster:
        """Start it; it is up when all its nodes answer."""
        self._tool("up")
        return self

    @property
    def begun(self) -> bool:
        """Whether it was ever up."""
        return self.folder.exists()

    def wipe(self) -> None:
        """End it, and leave nothing of it."""
        self._tool("wipe")

    def _tool(self, *arguments: str) -> None:
        knobs = {
            "SLURM_LAB_NODES": self.nodes, "SLURM_LAB_PORT": self.port,
            "SLURM_LAB_ACCT": int(self.accounting), "SLURM_LAB_APART": self.apart,
            "SLURM_LAB_NODE_TIMEOUT": 8, "SLURM_LAB_JOB_AGE": 60, "SLURM_LAB_ARRAY": self.array,
        }  # fmt: skip
        done = subprocess.run(
            ["bash", str(TOOL), arguments[0], str(self.folder), *arguments[1:]], text=True,
            capture_output=True,
            check=False, timeout=180, env=os.environ | {k: str(v) for k, v in knobs.items()},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    @property
    def env(self) -> dict[str, str]:
        """What a process needs to talk to it. Its many tasks compile a module once."""
        env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        return {**env, "SLURM_CONF": str(self.folder / "etc" / "slurm.conf")}

    def kill(self, daemon: str) -> None:
        """SIGKILL to `slurmctld`, `slurmdbd`, or a `slurmd-n1` with all that runs on that node."""
        self._tool("kill", daemon)

    def stop(self, daemon: str) -> None:
        """End a daemon in an orderly way."""
        self._tool("stop", daemon)

    def start(self, daemon: str) -> None:
        """Start a daemon again."""
        self._tool("start", daemon)

    def heal(self) -> None:
        """All daemons up, all nodes idle, no jobs, no limits: as a test finds it."""
        daemons = ["slurmctld", *(f"slurmd-n{i + 1}" for i in range(self.nodes))]
        for daemon in (["slurmdbd"] if self.accounting else []) + daemons:
            self.start(daemon)
        until(lambda: self.call("sinfo", check=False), "slurmctld answers", 120, every=0.2)
        self.call("scancel", "--user", str(os.getuid()))
        until(self._idle, "all nodes are idle", 180, every=0.2)
        until(lambda: not self.call("squeue", "--noheader"), "the queue is empty", 120, every=0.2)

    def _idle(self) -> bool:
        states = self.call("sinfo", "-h", "-N", "-o", "%N %T").split("\n")
        for line in {s for s in states if s.endswith(("down", "drained", "draining"))}:
            self.call("scontrol", "update", f"nodename={line.split()[0]}", "state=resume", check=False)
        return bool(states) and all(s.endswith("idle") for s in states if s)

    def call(self, *command: str, check: bool = True) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self.env, timeout=60)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def tasks(self, name: str, jobs: set[str]) -> list[dict[str, Any]]:
        """All tasks of the jobs of a name that were ever submitted, by the accounting, as soon as it has
        heard of these jobs."""
        self.settle(name, jobs)
        out = self.call("sacct", "-X", "-n", "-P", "--duplicates", f"--name={name}",
                        "-o", "JobID,State,SubmitLine,Start,NodeList")  # fmt: skip
        keys = ("id", "state", "line", "start", "node")
        return [dict(zip(keys, line.split("|"), strict=True)) for line in out.splitlines()]

    def settle(self, name: str, jobs: set[str]) -> None:
        """Until the accounting has heard the end of all jobs of a name."""
        self.emptied(name)

        def ended() -> bool:
            out = self.call("sacct", "-X", "-n", "-P", f"--name={name}", "-o", "JobID,State").splitlines()
            known = {line.partition("|")[0].partition("_")[0] for line in out}
            return jobs <= known and not any(line.endswith(("RUNNING", "PENDING")) for line in out)

        until(ended, "the accounting knows of the end", 120, every=0.3)

    def emptied(self, name: str) -> None:
        """Until no task of a name waits or runs."""
        until(lambda: not self.call("squeue", "-h", f"--name={name}"), "no task is left", 120, every=0.3)
