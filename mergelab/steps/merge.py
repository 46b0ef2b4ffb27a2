"""merge: write the merged model aside; `verify` gives it its final name."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import yaml

from mergelab.core import cache_dir
from mergelab.core.plan_file import PlanFile
from mergelab.core.run_dir import RunDir
from mergelab.core.sizes import format_size
from mergelab.jobs import Step, register
from mergelab.merging import node_local_cache
from mergelab.models import checkpoint
from mergelab.preflight import keeps_dtypes
from mergelab.provenance import identify
from mergelab.recipes import recipe as recipes
from mergelab.recipes import tensor_plan
from mergelab.report import terminal
from mergelab.schema import Run

Progress = Callable[[str, int, int], None]

EVENTS = 5.0
"""Seconds between two lines on the progress in events.jsonl."""


def execute(run: Run, run_dir: RunDir) -> str:
    """Record what goes in, then merge."""
    recipe = yaml.safe_load(run_dir.recipe.read_text(encoding="utf-8"))
    plan = PlanFile.load(run_dir.plan)
    fast = plan.engine == "fast"
    said = _fast(run, run_dir, recipe, plan) if fast else _by_mergekit(run, run_dir, recipe, plan)
    size = sum(f.stat().st_size for f in run_dir.partial.glob("*.safetensors"))
    return f"{recipes.method_of(recipe)}, {format_size(size)}{said}"


def _by_mergekit(run: Run, run_dir: RunDir, recipe: dict[str, Any], plan: PlanFile) -> str:
    from mergelab.merging import mergekit_backend, moe_builder

    mixed = recipes.is_mixture(recipe)
    if mixed:
        make = partial(moe_builder.build, template=run.model.chat_template)
    else:
        base = checkpoint.read(plan.models[0].at, "", pickled=True)
        own_dtypes = tensor_plan.own_dtypes(base) if keeps_dtypes(run) else {}
        make = partial(mergekit_backend.merge, own_dtypes=own_dtypes)
    with terminal.progress() as progress, run_dir.staging() as out:
        identify(run, run_dir, progress)
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


def _fast(run: Run, run_dir: RunDir, recipe: dict[str, Any], plan: PlanFile) -> str:
    from mergelab.merging import fast_backend, resume, throughput_cache

    models = {m.reference: (m.name, node_local_cache.copy_of(m.at)) for m in plan.models}
    config_source = plan.model(plan.config_source).at
    merge = fast_backend.prepare(run, recipe, models)
    with (
        terminal.progress(nbytes=True) as progress,
        resume.resumable_folder(run_dir.partial, merge.key, recipe, cache_dir.home()),
        _meanwhile(lambda told: identify(run, run_dir, told), progress) as finish,
    ):
        start = time.monotonic()
        there = fast_backend.merge(
            merge, recipe, run_dir.partial, run, config_source, _told(run_dir, progress)
        )
        if not there:
            traffic = sum(o.traffic for o in merge.outputs)
            throughput_cache.note(
                cache_dir.home(), merge.method, run.hardware, traffic, time.monotonic() - start
            )
        finish()
    return f" ({format_size(there)} were there already)" if there else ""


class _Cancelled(Exception):
    """What ends work that is of no more use."""


@contextmanager
def _meanwhile(work: Callable[[Progress], None], progress: Progress) -> Iterator[Callable[[], None]]:
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


def _told(run_dir: RunDir, progress: Progress) -> Progress:
    """The bar, and every few seconds a line in events.jsonl."""
    last = time.monotonic()

    def tell(what: str, done: int, total: int) -> None:
        nonlocal last
        progress(what, done, total)
        if time.monotonic() - last >= EVENTS:
            last = time.monotonic()
            run_dir.event("progress", step="merge", what=what, bytes=done, of=total)

    return tell


STEP = register(Step("merge", execute, needs="preflight", merges=True))
