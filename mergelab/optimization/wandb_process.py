"""A search in Weights & Biases: one run for each candidate, and one parent for all of them.

This is a process of its own, which `wandb_client` starts. It reads its settings from its standard input, and
the journal as it grows. A candidate is a run of `job_type=candidate` with its genome as the configuration.
The parent, `job_type=search`, has a point for each generation, and at the end the table of the population,
the report's pictures and the winner's recipe as an artifact. All are in one group. Run ids follow from the
search's folder, so that a resumed search resumes in W&B as well.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergelab import search_history
from mergelab.core import hashing
from mergelab.core.errors import INTERRUPTED
from mergelab.core.run_dir import read_json, read_memo, write_json
from mergelab.optimization import journal
from mergelab.optimization.wandb_client import STATE
from mergelab.report import score_table
from mergelab.schema import Tracking
from mergelab.tracking.base import Tracker
from mergelab.tracking.tracker import track
from mergelab.tracking.wandb_mode import decided

INTERVAL = 0.2
"""Seconds between two reads of the journal."""


class Sweep:
    """Records a search, and keeps on the disk how far it is.

    Args:
        folder: of the search.
        settings: of the tracking, as `decided` returns them.
        config: the composed run.
    """

    def __init__(self, folder: Path, settings: Tracking, config: Mapping[str, Any]):
        self._folder, self._config, self._settings = folder, config, settings
        before = read_memo(folder / STATE)
        begin = journal.read(folder / journal.NAME)[0]
        self._id = before.get("id") or hashing.digest([begin["id"], str(folder)])[:12]
        self._done: int = before.get("candidates", 0)
        self._missing: list[int] = before.get("missing", [])
        self._complete = False
        self._population: int = begin["search"]["population"]
        name = f"{begin['search']['name']}-{self._id[:6]}"
        self._settings = replace(self._settings, group=self._settings.group or name)
        self._stack = ExitStack()
        self._parent = self._stack.enter_context(
            track(
                self._settings, config, folder, name=name, job_type="search", run_id=self._id
            )
        )  # fmt: skip
        self._fall_back(self._parent)
        logging.getLogger("mergelab.tracking").setLevel(logging.WARNING)  # the first run has logged where
        self._save_state()

    def follow(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Record what is new in the journal."""
        candidates = [line for line in lines if line["event"] == "candidate"]
        again = [line for line in candidates if line["number"] in self._missing]
        self._missing = []
        for line in again:
            self._candidate(line)
        for line in candidates[self._done :]:
            self._candidate(line)
            self._done += 1
            if self._done % self._population == 0:
                self._generation(candidates[: self._done])
            self._save_state()

    def finish(self, status: int) -> None:
        """Record how the search has ended.

        Args:
            status: 0, or that of an error.
        """
        if status == 0:
            self._outcome()
        self._parent.finish(status)
        self._stack.close()
        self._complete = self._parent.recorded and not self._missing
        self._save_state()

    def _candidate(self, line: Mapping[str, Any]) -> None:
        """One run."""
        number = line["number"]
        config = {**line["genome"], "number": number, "generation": line["generation"]}
        failed = line["status"] == "failed"
        with track(
            self._settings, config, self._folder, name=f"candidate {number}", job_type="candidate",
            run_id=f"{self._id}-{number}", one_of_many=True,
        ) as tracker:  # fmt: skip
            if row := _row(line):
                tracker.log(row)
            tracker.summary({k: line[k] for k in ("status", "reason", "of") if line.get(k) is not None})
            tracker.finish(int(failed))
        self._fall_back(tracker)
        if not tracker.recorded:
            self._missing.append(number)

    def _generation(self, candidates: Sequence[Mapping[str, Any]]) -> None:
        """A point of the parent's curves."""
        outcomes = ((c["generation"], c["fitness"], c["status"]) for c in candidates)
        last = search_history.generations(outcomes)[-1]
        point: dict[str, float] = {"failed": last.failed, "candidates": len(candidates)}
        if last.best is not None and last.mean is not None and last.best_so_far is not None:
            point |= {"best": last.best, "mean": last.mean, "best_so_far": last.best_so_far}
        self._parent.log(point, step=last.number)

    def _outcome(self) -> None:
        """The population as a table, the pictures of the report, the result, the recipe."""
        folder, parent = self._folder, self._parent
        lines = [x for x in journal.read(folder / journal.NAME) if x["event"] == "candidate"]
        result = read_json(folder / "result.json")
        genes, scores = list(result["search"]["space"]), list(result["shares"])
        heads = ["number", "generation", "status", "fitness", *scores, *genes]
        body = [
            [c["number"], c["generation"], c["status"], c["fitness"],
             *((c["scores"] or {}).get(s, {}).get("value") for s in scores),
             *(c["genome"][g] for g in genes)]
            for c in lines
        ]  # fmt: skip
        parent.table("population", heads, body)
        if result["metrics"]:
            parent.table("validation", *score_table.rows(result["metrics"], "validation", result["shares"]))
        summary = {k: result[k] for k in ("verdict", "command", "model", "genome") if result.get(k)}
        if result.get("fitness"):
            summary["fitness"] = result["fitness"]["value"]
        for row, splits in result["metrics"].items():
            value, _ = score_table.mean(splits.get("validation") or {}, result["shares"])
            if value is not None and not row.startswith("candidate "):
                summary[f"validation/{row}"] = value
        parent.summary(summary)
        for picture in sorted((folder / "report").glob("*.png")):
            parent.image(f"report/{picture.stem}", picture)
        for file, kind in ((folder / "recipe.yaml", "recipe"), (folder / "result.json", "result")):
            if file.exists():
                parent.file(file, kind)

    def _fall_back(self, tracker: Tracker) -> None:
        """Record offline from now on where the server did not accept a run."""
        if tracker.mode == "offline" and self._settings.mode == "online":
            self._settings = replace(self._settings, mode="offline")

    def _save_state(self) -> None:
        write_json(
            self._folder / STATE,
            {
                "id": self._id, "candidates": self._done, "missing": self._missing,
                "mode": self._parent.mode, "url": self._parent.url, "complete": self._complete,
            },
        )  # fmt: skip


def _row(line: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a candidate."""
    out = {k: line[k] for k in ("fitness", "screen") if line.get(k) is not None}
    return out | {name: score["value"] for name, score in (line["scores"] or {}).items()}


def main() -> None:
    """Record a search until its controller reports how it ended, or is gone."""
    with suppress(OSError):
        os.nice(10)  # candidates have priority
    logging.basicConfig(
        level=logging.INFO, format="[%(asctime)s][%(name)s][%(levelname)s] - %(message)s", stream=sys.stderr
    )
    given = json.loads(sys.stdin.readline())
    folder = Path(given["folder"])
    settings = decided(Tracking(**given["tracking"]))
    if settings.name == "none":
        write_json(folder / STATE, read_memo(folder / STATE) | {"mode": "disabled", "complete": True})
        sys.stdin.read()
        return
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(ended,), daemon=True).start()
    path = folder / journal.NAME
    sweep = Sweep(folder, settings, given["config"])
    size = -1
    while ended.empty():
        if (now := path.stat().st_size) != size:
            size = now
            sweep.follow(journal.read(path))
        time.sleep(INTERVAL)
    status = ended.get()
    if status != INTERRUPTED:
        sweep.follow(journal.read(path))
    sweep.finish(status)


def _listen(ended: queue.SimpleQueue[int]) -> None:
    """Put the exit status into the queue when the controller reports it, or has died."""
    line = sys.stdin.readline()
    ended.put(json.loads(line)["end"] if line.strip() else INTERRUPTED)


if __name__ == "__main__":
    main()
