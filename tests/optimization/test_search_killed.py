"""A search that is killed at random moments, and its workers, ends with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
from test_search import command
from weights import same_bits


def test_killed_ten_times_it_ends_as_if_undisturbed(family: Any, tmp_path: Path) -> None:
    folder, whole = tmp_path / "sweep", tmp_path / "whole"
    start = command(folder, "search.timeout=100")
    began = time.monotonic()
    done = subprocess.run(start, capture_output=True, text=True, check=False)
    took = min(time.monotonic() - began, 15)
    assert done.returncode == 0, done.stderr
    folder.rename(whole)

    chance = random.Random(0)
    for kill in range(10):
        # In turn in one process and in two: neither does what comes out depend on that.
        several = kill % 2 == 1
        workers = ["hardware.workers=2"] if several else []
        process = subprocess.Popen([*start, *workers], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait = chance.uniform(0.3, 1.0) * took
        if several and kill % 4 == 1:  # a worker first, whose candidate is then done again
            time.sleep(wait / 2)
            kill_a_worker(process.pid, chance)
            wait /= 2
        time.sleep(wait)
        # Sometimes all of it, as a machine that fails; else the workers have to notice by themselves.
        others = psutil.Process(process.pid).children(recursive=True) if chance.random() < 0.5 else []
        process.kill()
        for other in others:
            other.kill()
        process.wait()
    last = subprocess.run(start, capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stderr

    assert journal(folder) == journal(whole)
    files = ["recipe.yaml", *(f"report/{f.name}" for f in (whole / "report").iterdir())]
    assert [f for f in files if (folder / f).read_bytes() != (whole / f).read_bytes()] == []
    assert without_times(folder) == without_times(whole)
    assert same_bits(folder / "model", whole / "model")


def journal(folder: Path) -> list[dict[str, Any]]:
    """Its lines, but for the words of the command that came to write the first one."""
    lines = [json.loads(x) for x in (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    del lines[0]["command"]
    return lines


def kill_a_worker(parent: int, chance: random.Random) -> None:
    """SIGKILL to one of the processes that measure candidates, if there are any yet."""
    try:
        children = psutil.Process(parent).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    if children:
        chance.choice(children).kill()


def without_times(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return {k: v for k, v in result.items() if k not in ("timings", "started", "finished")}
