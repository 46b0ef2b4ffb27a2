"""What a Slurm task runs: the items of its batch that are its own, one after another, in one process.

    python -m mergelab.slurm.worker FOLDER [SCRATCH]

Each item's result is a file of its own the moment it is there, so that whatever happens to the task next
costs the item in work alone. A task that Slurm starts again goes on behind what it had done.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import pickle
import signal
import sys
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from mergelab.core import heartbeat, run_log
from mergelab.core.errors import MergelabError
from mergelab.core.run_dir import write_json
from mergelab.slurm.submission_log import begun, result

log = logging.getLogger("mergelab.slurm")


_time = {"over": False, "working": False}
"""Whether Slurm has warned us, and whether an item is in work, which then ends."""


class TimeLimitReached(BaseException):
    """Slurm has said that the time is nearly over. Not an Exception: what catches those of a candidate
    must not take it for one."""


def main() -> None:
    """Do the items; the exit status is 0 if each of them has a result."""
    place = Path(sys.argv[1])
    index = int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))
    rank, ranks = int(os.environ.get("SLURM_PROCID", 0)), int(os.environ.get("SLURM_NTASKS", 1))
    if (place / "void").exists():  # nobody waits for it any more
        return
    gc.set_threshold(50_000, 20, 50)  # as in the command: much is imported
    _limit_threads()
    _listen()
    items = pickle.loads((place / f"task{index}.pkl").read_bytes())
    try:
        with _scratch(rank):
            for item in items[rank::ranks]:
                if not result(place, item.key).exists():
                    if _time["over"]:
                        sys.exit(1)  # the rest is submitted again, with time of its own
                    begun(place, item.key).touch()
                    _do(place, item)
    except MergelabError as e:  # of the scratch folder
        sys.exit(str(e))


def _scratch(rank: int) -> AbstractContextManager[None]:
    """The node's own disk, where the task was given a folder of it."""
    path = sys.argv[2] if len(sys.argv) > 2 else None
    if path is None:
        return nullcontext()
    from mergelab.merging import node_local_cache

    return node_local_cache.opened(path, f"{os.environ.get('SLURM_JOB_ID', os.getpid())}-{rank}")


def _limit_threads() -> None:
    """Use the processors that were asked for, where Slurm itself does not see to it."""
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
        os.environ.setdefault("OMP_NUM_THREADS", cpus)


def _listen() -> None:
    def warned(*_: object) -> None:
        _time["over"] = True
        if _time["working"]:
            raise TimeLimitReached

    def ended(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)  # with all that cleans up after itself

    signal.signal(signal.SIGUSR2, warned)
    signal.signal(signal.SIGTERM, ended)


def _do(place: Path, item: Any) -> None:
    """One item, and its result on the disk."""
    item.folder.mkdir(parents=True, exist_ok=True)
    _link(place, item.folder)
    _event(item.folder, "started", attempt=item.attempt)
    told: dict[str, Any] = {}
    gpu = "CUDA_VISIBLE_DEVICES" in os.environ
    try:
        with run_log.written(item.folder / run_log.NAME), heartbeat.running(item.folder, gpu):
            log.info("%s: attempt %d in Slurm task %s", item.name, item.attempt, heartbeat.job())
            try:
                _time["working"] = True
                if _time["over"]:
                    raise TimeLimitReached
                told = {"value": item.work()}
            except Exception as e:
                if not isinstance(e, MergelabError):
                    log.exception("%s failed", item.name)
                raise
            finally:
                _time["working"] = False
    except TimeLimitReached:
        told = {"reason": "out of time: Slurm's time limit was near", "lost": True}
    except MergelabError as e:
        told = {"reason": " ".join(str(e).split())}
    except Exception as e:
        told = {"reason": f"{type(e).__name__}: {' '.join(str(e).split())}"[:300]}
    write_json(result(place, item.key), told)
    if "reason" in told:
        _event(item.folder, "failed", reason=told["reason"])
        print(f"{item.name}: {told['reason']}", file=sys.stderr, flush=True)
    else:
        _event(item.folder, "done")


def _link(place: Path, folder: Path) -> None:
    """Put Slurm's own output of this task beside the item's log."""
    for end in ("out", "err"):
        link = folder / f"slurm-{heartbeat.job()}.{end}"
        with suppress(OSError):  # it is there already, or links are not possible here
            link.symlink_to(os.path.relpath(place / f"{heartbeat.job()}.{end}", folder))


def _event(folder: Path, state: str, **data: Any) -> None:
    e = os.environ
    about = {
        "job": heartbeat.job(),
        "node": e.get("SLURMD_NODENAME"),
        "restarts": int(e.get("SLURM_RESTART_COUNT", 0)),
    }
    line = {"time": round(time.time(), 3), "event": "task", "state": state, **about, **data}
    with (folder / "events.jsonl").open("a", encoding="utf-8") as f:
        f.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
