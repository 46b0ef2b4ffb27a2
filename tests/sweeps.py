"""One small sweep of the tiny family, run by the command once for all tests, and what is read of sweeps."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from composing import composed
from filelock import FileLock
from hydra.core.override_parser.overrides_parser import OverridesParser

from mergelab.core.jsonl_log import read
from mergelab.optimization import fingerprint, prepare, search_folder
from mergelab.optimization.request import Request, Setup

SMALL = [
    "-m", "search=cma", "experts=math_code", "search.budget=8", "search.population=4", "search.finalists=2",
    "eval.limit=16",
]  # fmt: skip
"""A search that takes a few seconds."""


def command(folder: Path, *more: str) -> list[str]:
    """The words that run it in a folder."""
    return [sys.executable, "-m", "mergelab", *SMALL, *more, f"hydra.sweep.dir={folder}"]


@pytest.fixture(scope="session")
def swept(family: Any, mergelab_home: Path) -> Path:
    """The folder of `SMALL` that has ended, for all workers. Nobody writes into it: see `copied`."""
    folder = mergelab_home.parent / "swept"
    with FileLock(f"{folder}.lock"):
        if not (folder / "said.txt").exists():
            done = subprocess.run(command(folder), capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            (folder / "said.txt").write_text(done.stdout, encoding="utf-8")
    return folder


def copied(swept: Path, folder: Path, candidates: int | None = None) -> Path:
    """A copy to go on with.

    Args:
        candidates: how far it has come; else it has ended.
    """
    shutil.copytree(swept, folder)
    if candidates is not None:
        kept = [x for x in lines(folder) if x["event"] in ("begin", "preset") or in_first(x, candidates)]
        text = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in kept)
        (folder / "journal.jsonl").write_text(text, encoding="utf-8")
        for path in (folder / "model", folder / "report"):
            shutil.rmtree(path)
        (folder / "result.json").unlink()
    return folder


def in_first(line: dict[str, Any], count: int) -> bool:
    """Whether it is that of one of the first candidates."""
    return line["event"] == "candidate" and line["number"] < count


def lines(folder: Path) -> list[dict[str, Any]]:
    """The journal."""
    return read(folder / "journal.jsonl")  # which may still be written


def candidates(folder: Path) -> list[dict[str, Any]]:
    """Those in the journal."""
    return [line for line in lines(folder) if line["event"] == "candidate"]


# ---------------------------------------------------------------- before anything is measured


def request_of(folder: Path, *arguments: str) -> Request:
    """What the sweeper makes of these arguments."""
    parsed = OverridesParser.create().parse_overrides(list(arguments))
    ranges = {o.get_key_element(): str(o.get_value_string()) for o in parsed if o.is_sweep_override()}
    fixed = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
    return Request(
        compose=lambda groups: composed(*fixed, *(f"{k}={v}" for k, v in groups.items())),
        typed_space=ranges,
        command="",
        folder=folder,
        folder_named=True,
    )


def checked(folder: Path, *arguments: str) -> Setup:
    """All that is checked before a sweep begins in a folder, or goes on there."""
    request = request_of(folder, *arguments)
    setup, plan = prepare.prepare(request)
    search_folder.find(request, fingerprint.identify(setup, plan))
    return setup
