"""Slurm's own commands and their output. The only module that runs them.

The output is read in Slurm's stable, documented formats (`squeue -o`, `sacct -P`, `scontrol show`). Errors
are classified by their texts, because they have no codes. See https://slurm.schedmd.com/sbatch.html,
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
from pathlib import Path

from mergelab.core.errors import MergelabError
from mergelab.core.slurm_time import parse_minutes
from mergelab.scheduling.scheduler import (
    SchedulerLimitReached,
    SchedulerRejected,
    SchedulerUnavailable,
    Task,
)

log = logging.getLogger("mergelab.slurm")

COMMAND_TIMEOUT_S = 60.0
"""Seconds that a command may take. Slurm itself waits about 30 for its controller."""


def missing() -> str | None:
    """The first of Slurm's commands that is not here, or None."""
    return next((c for c in ("sbatch", "squeue", "scancel") if shutil.which(c) is None), None)


def _die_with_parent() -> None:
    """End a command together with this process, so that a killed submitter does not submit later."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _call(*command: str) -> str:
    """The output of a command.

    Raises:
        SchedulerUnavailable, SchedulerLimitReached, SchedulerRejected: by its error output.
    """
    # Without the formats that a user has set for the terminal, and the options of the job we run in.
    ours = ("SQUEUE_", "SACCT_", "SBATCH_", "SLURM_", "SRUN_")
    kept = ("SLURM_CONF", "SLURM_JWT")
    env = {k: v for k, v in os.environ.items() if k in kept or not k.startswith(ours)} | {"LC_ALL": "C"}
    try:
        with _started(command, env) as process:
            out, err = process.communicate(timeout=COMMAND_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise SchedulerUnavailable(f"{command[0]}: no answer for {COMMAND_TIMEOUT_S:g} s") from None
    except FileNotFoundError as e:
        raise SchedulerRejected(f"{command[0]}: {e.strerror}") from None
    except OSError as e:  # no more processes or memory for now
        raise SchedulerUnavailable(f"{command[0]}: {e.strerror}") from None
    if command[0] in ("sbatch", "scancel"):
        answer = " ".join((out + err).split())
        log.info("%s: %s", shlex.join(command), answer or f"exit status {process.returncode}")
    if process.returncode == 0:
        return out
    raise classify_error(command[0], err or out)


@contextmanager
def _started(command: Sequence[str], env: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A command, which ends when this process is interrupted. Python loses a Ctrl-C that arrives during a
    fork: it is kept until the fork is over."""
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


UNAVAILABLE = (
    "unable to contact slurm controller", "socket timed out", "connection refused", "connect failure",
    "connection reset", "communication connection failure", "zero bytes were transmitted",
    "protocol authentication error", "munge", "slurmctld", "slurm temporarily unable", "not responding",
    "connection timed out", "transport endpoint", "slurmdbd", "database connection",
)  # fmt: skip
LIMITS = (
    "max(submit|job)", "job submit limit", "invalid job array specification",
    "resource temporarily unavailable",
    "too many",
)  # fmt: skip
PERMANENT_LIMITS = ("wall", "perjob", "pernode", "qosmin", "time limit is invalid")
"""Limits that waiting does not lift: on the time or the size of a single job."""


def classify_error(
    command: str, output: str
) -> SchedulerUnavailable | SchedulerLimitReached | SchedulerRejected:
    """The kind of error that a command's error output stands for."""
    lines = [
        re.sub(r"^(\w+: (error|fatal)|allocation failure): ", "", x).strip()
        for x in output.splitlines()
        if x.strip()
    ]
    text = "; ".join(dict.fromkeys(lines)) or "it failed without a message"
    low = text.lower()
    if any(w in low for w in UNAVAILABLE):
        return SchedulerUnavailable(f"{command}: {text}")
    if any(re.search(w, low) for w in LIMITS) and not any(w in low for w in PERMANENT_LIMITS):
        return SchedulerLimitReached(f"{command}: {text}")
    return SchedulerRejected(f"{command}: {text}")


def submit(script: Path, *, test: bool = False) -> str:
    """Submit a batch script; returns the job's number.

    Args:
        test: only ask whether the cluster would accept it.
    Raises:
        SchedulerUnavailable, SchedulerLimitReached, SchedulerRejected: by sbatch's error output.
    """
    out = _call("sbatch", "--parsable", *(["--test-only"] if test else []), str(script))
    return out.strip().splitlines()[-1].partition(";")[0] if out.strip() else ""


def cancel(tasks: Iterable[str]) -> None:
    """End jobs, arrays or tasks: `57`, `57_3`.

    Raises:
        SchedulerUnavailable: when Slurm does not answer.
    """
    if numbers := list(tasks):
        _call("scancel", "--quiet", *numbers)


def queue(name: str | None = None) -> list[Task]:
    """The user's tasks, including those that ended a few minutes ago.

    Args:
        name: of the jobs; None: all.
    Raises:
        SchedulerUnavailable: when Slurm does not answer.
    """
    shape = "%i|%T|%r|%N|%j|%k"
    out = _query("squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}",
                 *([f"--name={name}"] if name else []), "--format", shape)  # fmt: skip
    found = []
    for line in out.splitlines():
        if not re.match(r"\d+(_\d+)?\|.*\|.*\|.*\|.*\|", line):
            continue  # the rest of a comment of several lines
        number, state, reason, node, named, note = (x.strip() for x in line.split("|", 5))
        job, _, index = number.partition("_")
        if index.isdigit() or not index:
            comment = "" if note in ("(null)", "N/A") else note
            found.append(Task(job, int(index or 0), state, reason, node, "", comment, named, bool(index)))
    return found


def accounting(jobs: Sequence[str]) -> list[Task]:
    """The accounting's record of jobs that squeue has forgotten; empty where there is no accounting.

    Raises:
        SchedulerUnavailable: when the accounting does not answer.
    """
    return _sacct("--jobs", ",".join(jobs)) if jobs else []


def accounting_by_name(name: str) -> list[Task]:
    """The accounting's record of all jobs of a name, of the last month.

    Raises:
        SchedulerUnavailable: when the accounting does not answer.
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
        raise SchedulerUnavailable(str(e)) from None
    found = []
    for line in out.splitlines():
        number, state, code, node, submitted = line.split("|", 4)
        job, _, index = number.partition("_")
        note = Path(submitted.split()[-1]).parent.name if submitted.split() else ""
        for i in _indices(index):
            found.append(Task(job, i, state.split()[0], "", node, code, note, "", bool(index)))
    return found


def _indices(text: str) -> list[int]:
    """The indices in `3`, or in that of tasks that have never run: `[0-2,6%2]`; 0 for a plain job."""
    out: list[int] = []
    for part in re.sub(r"[\[\]]|%\d+", "", text).split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            out += range(int(first), int(last if last.isdigit() else first) + 1)
    return out or [0]


def _query(*command: str) -> str:
    """The output of a command that only reads. Every error of it is temporary: nothing follows from it."""
    try:
        return _call(*command)
    except MergelabError as e:
        raise SchedulerUnavailable(str(e)) from None


def longest(partition: str | None) -> tuple[str, str]:
    """The partition, the cluster's default where None is named, and its time limit, as Slurm writes it.

    Raises:
        SchedulerUnavailable: when Slurm does not answer.
    """
    named = [f"--partition={partition}"] if partition else []
    out = _call("sinfo", "--noheader", "--format", "%P|%l", *named)
    found = [line.split("|") for line in out.split()]
    candidates = [x for x in found if partition or x[0].endswith("*")]
    name, limit = max(candidates, key=lambda x: minutes(x[1]), default=("", "infinite"))
    return name.rstrip("*"), limit


def minutes(time: str) -> float:
    """A time limit that Slurm reports; infinite where it is not a time, as `NOT_SET`."""
    try:
        return parse_minutes(time)
    except ValueError:
        return float("inf")


def array_limit() -> int:
    """The most tasks of an array: one less than Slurm's MaxArraySize, which bounds the index.

    Raises:
        SchedulerUnavailable: when Slurm does not answer.
    """
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _query("scontrol", "show", "config"), re.MULTILINE)
    return max(1, int(found[1]) - 1) if found else 1000
