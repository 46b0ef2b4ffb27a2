"""The files of a run's models on the hub, and which of them are not on this machine yet."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from mergelab.core.errors import StepError
from mergelab.core.findings import Finding, error, warning
from mergelab.core.machine import existing_parent
from mergelab.core.sizes import format_size
from mergelab.hub import cache, client, repository
from mergelab.hub.download import Wanted
from mergelab.hub.repository import Need, Repository
from mergelab.models import checkpoint, hub_access
from mergelab.models.resolver import Source

REFUSED = {
    "unreachable": "the hub does not answer, or HF_HUB_OFFLINE forbids asking it",
    "gated": "this login has no access",
    "no-repository": "the hub no longer has it, or it is private",
    "no-revision": "the hub no longer has this revision",
}
"""Why the hub cannot confirm what is in the cache."""


@dataclass(frozen=True)
class Model:
    """A model that a run names, or its adapter."""

    source: Source
    adapter: bool = False
    of: Repository | None = None
    """What the hub has; None if it is not a hub model, or if the hub did not answer."""
    wanted: Wanted | None = None
    """The files that are needed; None if they do not exist."""
    findings: tuple[Finding, ...] = ()
    """What is wrong with the repository."""


@dataclass(frozen=True)
class Plan:
    """What has to be downloaded, and what prevents it."""

    models: list[Model]
    findings: list[Finding]
    wanted: list[Wanted]
    """The files that are needed, each commit of a repository once."""
    free: int
    """Free bytes on the disk of the cache."""

    @property
    def left(self) -> int:
        """Bytes that have yet to be downloaded."""
        return sum(left(w) for w in self.wanted)


def left(w: Wanted) -> int:
    """Bytes of a repository that have yet to be downloaded."""
    return sum(f.size - cache.downloaded(w.of, f) for f in w.missing)


def make(sources: Sequence[Source], need: Need, *, gated: bool) -> Plan:
    """Ask the hub about all models at once.

    Args:
        sources: The run's models.
        need: What is needed of each.
        gated: Whether the family is known to require an accepted licence.

    Raises:
        StepError: The hub stopped answering half-way.
    """
    models = [Model(part, i > 0) for s in sources for i, part in enumerate(s.parts)]
    on_hub = [m for m in models if m.source.on_hub]
    answered = list(zip(on_hub, hub_access.answers([m.source for m in on_hub]), strict=True))
    refused = [(m.source, answer) for m, answer in answered if answer[0] != hub_access.READY]
    ready = [m for m, answer in answered if answer[0] == hub_access.READY]
    with ThreadPoolExecutor(8) as pool:
        listed = {m.source.name: m for m in pool.map(lambda m: _listed(m, need), ready)}
    models = [listed.get(m.source.name, m) for m in models]
    findings = hub_access.findings([r for r in refused if r[0].folder is None], "error", gated=gated)
    for s, (reason, _, _) in refused:
        findings += _unasked(s, reason, need.pickled)
    findings += [f for m in models for f in m.findings]
    plan = Plan(models, findings, _once(models), shutil.disk_usage(existing_parent(cache.root())).free)
    return replace(plan, findings=[*findings, *_disk(plan)])


def _listed(m: Model, need: Need) -> Model:
    """A model with its files on the hub and its findings."""
    need = replace(need, adapter=m.adapter)
    try:
        of = repository.ask(m.source.path, m.source.revision)
        index = repository.index(of, need)
        indexed = repository.shards(of, index) if index else set()
    except Exception as e:
        if not client.is_external(e):
            raise
        raise StepError(f"{m.source.path}: {client.line(e)}\nTry again.") from e
    wrong = repository.check(of, indexed, m.source.key, need)
    if wrong:
        return replace(m, of=of, findings=tuple(wrong))
    files = repository.wanted(of, indexed, need)
    return replace(m, of=of, wanted=Wanted(of, tuple(files), (m.source.revision,)))


def _once(models: Sequence[Model]) -> list[Wanted]:
    alike: dict[tuple[str, str], Wanted] = {}
    for w in (m.wanted for m in models if m.wanted):
        first = alike.setdefault((w.of.name, w.of.commit), w)
        if first is not w:
            files = tuple(dict.fromkeys((*first.files, *w.files)))
            revisions = (*first.revisions, *w.revisions)
            alike[w.of.name, w.of.commit] = Wanted(w.of, files, revisions)
    return list(alike.values())


def _unasked(s: Source, reason: str, pickled: bool) -> Iterator[Finding]:
    """Check a model in the cache of which the hub gave no answer."""
    if s.folder is None:
        return
    message = f"in the hub's cache, but possibly incomplete, because {REFUSED[reason]}"
    yield warning("unasked", s.key, message)
    if (s.folder / "config.json").exists():  # not an adapter, which `locate` has checked
        yield from checkpoint.read(s.folder, s.key, s.repair, pickled=pickled).findings


def _disk(plan: Plan) -> Iterator[Finding]:
    if plan.left > plan.free:
        message = f"{cache.root()} needs {format_size(plan.left)}, but only {format_size(plan.free)} are free"
        yield error("disk", "HF_HOME", message, "Free some, or move the cache to another disk: HF_HOME=DIR")
