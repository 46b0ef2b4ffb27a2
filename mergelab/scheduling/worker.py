"""What a task runs: its work items of the batch, one after another, in one process.

    python -m mergelab.scheduling.worker FOLDER [SCRATCH]

Each item's result is written to a file of its own as soon as it is there. Whatever happens to the task next
then costs only the item in progress. A task that the scheduler starts again skips what it had done.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import signal
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from mergelab.core import heartbeat, run_log
from mergelab.core.errors import MergelabError, flattened
from mergelab.core.run_dir import append_event, write_json
from mergelab.scheduling.batch_dir import result_file, revoked_mark, started_mark, work_file

log = logging.getLogger("mergelab.scheduling")


_time = {"over": False, "working": False}
"""Whether the scheduler has warned us, and whether an item is in progress, which then ends."""


class TimeLimitReached(BaseException):
    """The scheduler has warned that the time limit is near. Not an Exception: code that catches those of a
    candidate must not catch this."""


def main() -> None:
    """Do the items; the exit status is 0 if each of them has a result."""
    folder = Path(sys.argv[1])
    index, rank, ranks = (int(os.environ.get(f"MERGELAB_{name}") or default)
                          for name, default in (("TASK_INDEX", 0), ("RANK", 0), ("RANKS", 1)))  # fmt: skip
    if revoked_mark(folder).exists():  # nobody waits for it any more
        return
    gc.set_threshold(50_000, 20, 50)  # as in the command: much is imported
    _install_signal_handlers()
    items = pickle.loads(work_file(folder, index).read_bytes())
    try:
        with _scratch(rank):
            for item in items[rank::ranks]:
                if not result_file(folder, item.key).exists():
                    if _time["over"]:
                        sys.exit(1)  # the rest is submitted again, with a time limit of its own
                    started_mark(folder, item.key).touch()
                    _do(folder, item)
    except MergelabError as e:  # of the scratch folder
        sys.exit(str(e))


def _scratch(rank: int) -> AbstractContextManager[None]:
    """The node's own disk, where the task was given a folder of it."""
    path = sys.argv[2] if len(sys.argv) > 2 else None
    if path is None:
        return nullcontext()
    from mergelab.merging import node_local_cache

    return node_local_cache.for_task(path, f"{heartbeat.job() or os.getpid()}-{rank}")


def _install_signal_handlers() -> None:
    def warned(*_: object) -> None:
        _time["over"] = True
        if _time["working"]:
            raise TimeLimitReached

    def ended(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)  # so that everything cleans up after itself

    signal.signal(signal.SIGUSR2, warned)
    signal.signal(signal.SIGTERM, ended)


def _do(folder: Path, item: Any) -> None:
    """Run one item, and write its result."""
    item.folder.mkdir(parents=True, exist_ok=True)
    _link_output(folder, item.folder)
    _event(item.folder, "started", attempt=item.attempt)
    result: dict[str, Any] = {}
    gpu = "CUDA_VISIBLE_DEVICES" in os.environ
    try:
        with run_log.written(item.folder / run_log.NAME), heartbeat.running(item.folder, gpu):
            log.info("%s: attempt %d in task %s", item.name, item.attempt, heartbeat.job())
            try:
                _time["working"] = True
                if _time["over"]:
                    raise TimeLimitReached
                result = {"value": item.work()}
            except Exception as e:
                if not isinstance(e, MergelabError):
                    log.exception("%s failed", item.name)
                raise
            finally:
                _time["working"] = False
    except TimeLimitReached:
        result = {"reason": "out of time: the task's time limit was near", "lost": True}
    except MergelabError as e:
        result = {"reason": " ".join(str(e).split())}
    except Exception as e:
        result = {"reason": flattened(e)[:300]}
    write_json(result_file(folder, item.key), result)
    if "reason" in result:
        _event(item.folder, "failed", reason=result["reason"])
        print(f"{item.name}: {result['reason']}", file=sys.stderr, flush=True)
    else:
        _event(item.folder, "done")


def _link_output(folder: Path, item_folder: Path) -> None:
    """Link the task's own output beside the item's log."""
    for end in ("out", "err"):
        link = item_folder / f"{folder.parent.name}-{heartbeat.job()}.{end}"
        with suppress(OSError):  # it is there already, or links are not possible here
            link.symlink_to(os.path.relpath(folder / f"{heartbeat.job()}.{end}", item_folder))


def _event(folder: Path, state: str, **data: Any) -> None:
    about = {
        "job": heartbeat.job(),
        "node": heartbeat.node(),
        "restarts": int(os.environ.get("MERGELAB_RESTARTS") or 0),
    }
    append_event(folder, "task", state=state, **about, **data)


if __name__ == "__main__":
    main()
