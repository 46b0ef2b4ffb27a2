"""Slurm's own commands, and what they say. The only module that runs them.

What they print is read in Slurm's stable, documented formats (`squeue -o`, `sacct -P`, `scontrol show`);
errors are told apart by their texts, which have no codes. See https://slurm.schedmd.com/sbatch.html,
squeue.html, sacct.html.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mergelab.core.errors import MergelabError

log = logging.getLogger("mergelab.slurm")

PATIENCE = 60.0
"""Seconds that a command may take. Slurm's own patience with its controller is about 30."""

ENDED = {
    "BOOT_FAIL": "the node failed to boot",
    "CANCELLED": "cancelled",
    "COMPLETED": "ended",
    "DEADLINE": "past its deadline",
    "FAILED": "failed",
    "NODE_FAIL": "the node failed",
    "OUT_OF_MEMORY": "out of memory",
    "PREEMPTED": "preempted",
    "REVOKED": "revoked",
    "TIMEOUT": "out of time",
}
"""The states from which a task does not come back by itself, in words."""


class SlurmUnavailable(MergelabError):
    """Slurm does not answer now. It may all the same have done what was asked."""


class SlurmLimitReached(MergelabError):
    """Slurm takes no more jobs of this size, or of this user, now."""


class SlurmRejected(MergelabError):
    """Slurm will never take this job."""

    exit_status = 2


@dataclass(frozen=True)
class Task:
    """One task of a job, as Slurm sees it."""

    job: str
    """The number of the job or array."""
    index: int
    """In its array; 0 of a plain job."""
    state: str
    """Slurm's long form: PENDING, RUNNING, FAILED ..."""
    reason: str = ""
    """Why it waits, or how it ended."""
    node: str = ""
    exit: str = ""
    """STATUS:SIGNAL, where it is known."""
    comment: str = ""
    """What the job was submitted with as its comment."""
    name: str = ""
    array: bool = False

    @property
    def number(self) -> str:
        """As Slurm writes it: `57_3`, or `57` of a plain job."""
        return f"{self.job}_{self.index}" if self.array else self.job

    @property
    def stuck(self) -> bool:
        """Whether Slurm could not launch it and holds it now, for somebody to look into."""
        return self.state == "PENDING" and "launch failed" in self.reason.lower()

    @property
    def over(self) -> bool:
        """Whether it has ended and Slurm will not start it again."""
        return self.state in ENDED

    def words(self) -> str:
        """How it ended: `out of time`, `killed by signal 9`, `cancelled`."""
        status, _, number = self.exit.partition(":")
        if self.state == "FAILED" and (killed := _signal(status, number)):
            return f"killed by {killed}"
        told = ENDED.get(self.state, self.state.lower())
        if self.state == "FAILED" and status not in ("", "0"):
            told += f" with exit status {status}"
        return told


def _signal(status: str, number: str) -> str:
    """The signal of an exit code: the second number, or that which a shell adds to 128."""
    n = int(number) if number.isdigit() else 0
    if not n and status.isdigit() and int(status) > 128:
        n = int(status) - 128
    known = {s.value: s.name for s in signal.Signals}
    return known.get(n, f"signal {n}" if number.isdigit() and int(number) else "")


def missing() -> str | None:
    """The first of Slurm's commands that is not here, or None."""
    return next((c for c in ("sbatch", "squeue", "scancel") if shutil.which(c) is None), None)


def _die_with_parent() -> None:
    """Let a command end with us: what is killed in the middle of submitting must not submit later."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _call(*command: str) -> str:
    """What a command prints.

    Raises:
        Away, Limited, Refused: by what it says when it fails.
    """
    # Formats that a user has set for their own eyes, and the options of a job that we are in.
    ours = ("SQUEUE_", "SACCT_", "SBATCH_", "SLURM_", "SRUN_")
    kept = ("SLURM_CONF", "SLURM_JWT")
    env = {k: v for k, v in os.environ.items() if k in kept or not k.startswith(ours)} | {"LC_ALL": "C"}
    try:
        with _started(command, env) as process:
            out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise SlurmUnavailable(f"{command[0]}: no answer for {PATIENCE:g} s") from None
    except FileNotFoundError as e:
        raise SlurmRejected(f"{command[0]}: {e.strerror}") from None
    except OSError as e:  # no more processes, no more memory: for now
        raise SlurmUnavailable(f"{command[0]}: {e.strerror}") from None
    if command[0] in ("sbatch", "scancel"):
        answer = " ".join((out + err).split())
        log.info("%s: %s", shlex.join(command), answer or f"exit status {process.returncode}")
    if process.returncode == 0:
        return out
    raise classify_error(command[0], err or out)


@contextmanager
def _started(command: Sequence[str], env: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A command, which ends where we are interrupted. Python loses a Ctrl-C that comes in the middle of a
    fork: it is kept until that is over."""
    kept: list[int] = []
    ours = threading.current_thread() is threading.main_thread()
    if ours := ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, _: kept.append(number))
    try:
        process = subprocess.Popen(
            command, text=True, env=env, preexec_fn=_die_with_parent,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    with process:
        try:
            if kept:
                raise KeyboardInterrupt
            yield process
        except BaseException:
            process.kill()
            raise


AWAY = (
    "unable to contact slurm controller", "socket timed out", "connection refused", "connect failure",
    "connection reset", "communication connection failure", "zero bytes were transmitted",
    "protocol authentication error", "munge", "slurmctld", "slurm temporarily unable", "not responding",
    "connection timed out", "transport endpoint", "slurmdbd", "database connection",
)  # fmt: skip
LIMITED = (
    "max(submit|job)", "job submit limit", "invalid job array specification",
    "resource temporarily unavailable",
    "too many",
)  # fmt: skip
NEVER = ("wall", "perjob", "pernode", "qosmin", "time limit is invalid")
"""Of limits those that no waiting lifts: on the time or the size of a single job."""


def classify_error(command: str, said: str) -> SlurmUnavailable | SlurmLimitReached | SlurmRejected:
    """The kind of error that a command's words stand for."""
    lines = [
        re.sub(r"^(\w+: (error|fatal)|allocation failure): ", "", x).strip()
        for x in said.splitlines()
        if x.strip()
    ]
    text = "; ".join(dict.fromkeys(lines)) or "failed without a word"
    low = text.lower()
    if any(w in low for w in AWAY):
        return SlurmUnavailable(f"{command}: {text}")
    if any(re.search(w, low) for w in LIMITED) and not any(w in low for w in NEVER):
        return SlurmLimitReached(f"{command}: {text}")
    return SlurmRejected(f"{command}: {text}")


def submit(script: Path, *, test: bool = False) -> str:
    """Submit a batch script; returns the job's number.

    Args:
        test: only ask whether the cluster would take it.
    Raises:
        Away, Limited, Refused: see there.
    """
    out = _call("sbatch", "--parsable", *(["--test-only"] if test else []), str(script))
    return out.strip().splitlines()[-1].partition(";")[0] if out.strip() else ""


def cancel(tasks: Iterable[str]) -> None:
    """End jobs, arrays or tasks: `57`, `57_3`.

    Raises:
        Away: when Slurm does not answer.
    """
    if wanted := list(tasks):
        _call("scancel", "--quiet", *wanted)


def queue(name: str | None = None) -> list[Task]:
    """The user's tasks, those that ended a few minutes ago included.

    Args:
        name: of the jobs; None: all.
    Raises:
        Away: when Slurm does not answer.
    """
    shape = "%i|%T|%r|%N|%j|%k"
    out = _asked("squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}",
                 *([f"--name={name}"] if name else []), "--format", shape)  # fmt: skip
    found = []
    for line in out.splitlines():
        if not re.match(r"\d+(_\d+)?\|.*\|.*\|.*\|.*\|", line):
            continue  # the rest of somebody's comment
        number, state, reason, node, named, note = (x.strip() for x in line.split("|", 5))
        job, _, index = number.partition("_")
        if index.isdigit() or not index:
            told = "" if note in ("(null)", "N/A") else note
            found.append(Task(job, int(index or 0), state, reason, node, "", told, named, bool(index)))
    return found


def accounting(jobs: Sequence[str]) -> list[Task]:
    """What the accounting knows of jobs that squeue has forgotten; nothing where there is none.

    Raises:
        Away: when the accounting does not answer.
    """
    return _sacct("--jobs", ",".join(jobs)) if jobs else []


def accounting_by_name(name: str) -> list[Task]:
    """What the accounting knows of all jobs of a name, of the last month.

    Raises:
        Away: when the accounting does not answer.
    """
    return _sacct("--name", name, "--starttime", "now-31days")


def _sacct(*which: str) -> list[Task]:
    if shutil.which("sacct") is None:
        return []
    try:
        out = _call("sacct", "--allocations", "--noheader", "--parsable2", *which,
                    "--format", "JobID,State,ExitCode,NodeList,SubmitLine")  # fmt: skip
    except MergelabError as e:
        if "disabled" in str(e):  # "Slurm accounting storage is disabled"
            return []
        raise SlurmUnavailable(str(e)) from None
    found = []
    for line in out.splitlines():
        number, state, code, node, submitted = line.split("|", 4)
        job, _, index = number.partition("_")
        note = Path(submitted.split()[-1]).parent.name if submitted.split() else ""
        for i in _indices(index):
            found.append(Task(job, i, state.split()[0], "", node, code, note, "", bool(index)))
    return found


def _indices(text: str) -> list[int]:
    """Of `3`, or of tasks that have never run: `[0-2,6%2]`; 0 of a plain job."""
    out: list[int] = []
    for part in re.sub(r"[\[\]]|%\d+", "", text).split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            out += range(int(first), int(last if last.isdigit() else first) + 1)
    return out or [0]


def _asked(*command: str) -> str:
    """What a command prints that only looks: whatever is wrong with it now, it may be right later."""
    try:
        return _call(*command)
    except MergelabError as e:
        raise SlurmUnavailable(str(e)) from None


def longest(partition: str | None) -> tuple[str, str]:
    """The partition, the cluster's default where None is named, and its time limit, as Slurm writes it.

    Raises:
        Away: when Slurm does not answer.
    """
    named = [f"--partition={partition}"] if partition else []
    out = _call("sinfo", "--noheader", "--format", "%P|%l", *named)
    found = [line.split("|") for line in out.split()]
    there = [x for x in found if partition or x[0].endswith("*")]
    name, limit = max(there, key=lambda x: minutes(x[1]), default=("", "infinite"))
    return name.rstrip("*"), limit


def minutes(time: str) -> float:
    """A time as Slurm writes it: `90`, `90:30`, `12:00:00`, `2-12`, `infinite`."""
    if not time[:1].isdigit():
        return float("inf")
    days, _, rest = time.rpartition("-")
    parts = [int(x) for x in rest.split(":")]
    if days:
        hours, mins, secs = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, mins, secs = parts
    else:
        hours, (mins, secs) = 0, [*parts, 0][:2]
    return int(days or 0) * 1440 + hours * 60 + mins + secs / 60


def array_limit() -> int:
    """The most tasks of an array: one less than Slurm's MaxArraySize, which bounds the index.

    Raises:
        Away: when Slurm does not answer.
    """
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _asked("scontrol", "show", "config"), re.MULTILINE)
    return max(1, int(found[1]) - 1) if found else 1000
