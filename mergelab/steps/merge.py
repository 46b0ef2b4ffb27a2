"""merge: write the merged model aside; `check` gives it its final name."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from mergelab import recipe as recipes
from mergelab import zoo
from mergelab.merging import fast, scratch
from mergelab.preflight.resources import human
from mergelab.report import terminal
from mergelab.schema import Run
from mergelab.steps.identify import identify
from mergelab.workspace import Workspace, read_json

EVENTS = 5.0
"""Seconds between two lines on the progress in events.jsonl."""


def execute(run: Run, workspace: Workspace) -> str:
    """Record what goes in, then merge."""
    recipe = yaml.safe_load(workspace.recipe.read_text(encoding="utf-8"))
    plan = read_json(workspace.plan)
    if plan["engine"]["name"] == "fast":
        said = _fast(run, workspace, recipe, plan)
    else:
        said = _by_mergekit(run, workspace, recipe)
    size = sum(f.stat().st_size for f in workspace.partial.glob("*.safetensors"))
    return f"{recipes.method_of(recipe)}, {human(size)}{said}"


def _by_mergekit(run: Run, workspace: Workspace, recipe: dict[str, Any]) -> str:
    from mergelab.merging import by_mergekit, mixture

    mixed = recipes.is_mixture(recipe)
    make = partial(mixture.build, template=run.model.chat_template) if mixed else by_mergekit.merge
    with terminal.progress() as progress, workspace.aside() as out:
        identify(run, workspace, progress)
        make(
            recipe,
            out,
            hardware=run.hardware,
            seed=run.seed,
            trust_remote_code=run.model.trust_remote_code,
            progress=progress,
        )
    if not mixed:
        return ""
    n, k = len(recipe["experts"]), recipe.get("experts_per_token", 2)
    return f", {k} of {n} experts a token, gates {recipe.get('gate_mode', 'hidden')}"


def _fast(run: Run, workspace: Workspace, recipe: dict[str, Any], plan: dict[str, Any]) -> str:
    from mergelab.merging import engine, rates, unfinished

    models = {m["reference"]: (m["name"], scratch.copy_of(Path(m["folder"]))) for m in plan["models"]}
    donor = next(Path(m["folder"]) for m in plan["models"] if m["name"] == plan["donor"])
    merge = engine.prepare(run, recipe, models)
    with (
        terminal.progress(nbytes=True) as progress,
        unfinished.folder(workspace.partial, merge.key, recipe, zoo.home()),
        _meanwhile(lambda told: identify(run, workspace, told), progress) as finish,
    ):
        start = time.monotonic()
        there = engine.merge(merge, recipe, workspace.partial, run, donor, _told(workspace, progress))
        if not there:
            traffic = sum(o.traffic for o in merge.outputs)
            rates.note(zoo.home(), merge.method, run.hardware, traffic, time.monotonic() - start)
        finish()
    return f", of which {human(there)} were there already" if there else ""


class _Cancelled(Exception):
    """What ends work that is of no more use."""


@contextmanager
def _meanwhile(
    work: Callable[[fast.Progress], None], progress: fast.Progress
) -> Iterator[Callable[[], None]]:
    """Do `work` in another thread: to hash the inputs takes as long as to merge them, and reads the
    same bytes. Yields a function that waits for the end, with a bar; without it the work is given up.
    """
    given_up, shown = threading.Event(), threading.Event()

    def told(what: str, done: int, total: int) -> None:
        if given_up.is_set():
            raise _Cancelled
        if shown.is_set():
            progress(what, done, total)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, told)

        def finish() -> None:
            shown.set()
            future.result()

        try:
            yield finish
        finally:
            given_up.set()


def _told(workspace: Workspace, progress: fast.Progress) -> fast.Progress:
    """The bar, and every few seconds a line in events.jsonl."""
    last = time.monotonic()

    def tell(what: str, done: int, total: int) -> None:
        nonlocal last
        progress(what, done, total)
        if time.monotonic() - last >= EVENTS:
            last = time.monotonic()
            workspace.event("progress", step="merge", what=what, bytes=done, of=total)

    return tell
