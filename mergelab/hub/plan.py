"""What a run's models come to on the hub, and what of them is not on this machine yet."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from mergelab.core.errors import StepError
from mergelab.core.findings import Finding, error, warning
from mergelab.core.machine import existing
from mergelab.core.sizes import format_size
from mergelab.hub import cache, client, repository
from mergelab.hub.download import Wanted
from mergelab.hub.repository import Need, Repository
from mergelab.models import checkpoint, hub_access
from mergelab.models.resolver import Source

REFUSED = {
    "unreachable": "the hub does not answer, or HF_HUB_OFFLINE forbids to ask it",
    "gated": "this login has no access",
    "no-repository": "the hub has it no more, or keeps it private",
    "no-revision": "the hub has this revision no more",
}
"""Why the hub does not tell of what is in the cache."""


@dataclass(frozen=True)
class Model:
    """A model that a run names, or the adapter of one."""

    source: Source
    adapter: bool = False
    of: Repository | None = None
    """What the hub has; None where it is no model of the hub, or where the hub did not say."""
    wanted: Wanted | None = None
    """What of it is needed; None where that is not there."""
    findings: tuple[Finding, ...] = ()
    """What is wrong with what the hub has."""


@dataclass(frozen=True)
class Plan:
    """What there is to do, and what is in the way."""

    models: list[Model]
    findings: list[Finding]
    wanted: list[Wanted]
    """What is needed of the hub, each commit of a repository once."""
    free: int
    """Bytes that the disk of the cache has room for."""

    @property
    def left(self) -> int:
        """Bytes that have yet to be downloaded."""
        return sum(left(w) for w in self.wanted)


def left(w: Wanted) -> int:
    """Bytes of a repository that have yet to be downloaded."""
    return sum(f.size - cache.there(w.of, f) for f in w.missing)


def make(sources: Sequence[Source], need: Need, *, gated: bool) -> Plan:
    """Ask the hub for every model at once.

    Args:
        sources: the run's models.
        need: what is asked of each.
        gated: the family is known to ask for an accepted licence.
    Raises:
        StepError: when the hub stops answering half-way.
    """
    models = [Model(part, i > 0) for s in sources for i, part in enumerate(s.parts)]
    asked = [m for m in models if m.source.on_hub]
    answered = list(zip(asked, hub_access.answers([m.source for m in asked]), strict=True))
    refused = [(m.source, answer) for m, answer in answered if answer[0] != hub_access.READY]
    ready = [m for m, answer in answered if answer[0] == hub_access.READY]
    with ThreadPoolExecutor(8) as pool:
        listed = {m.source.name: m for m in pool.map(lambda m: _listed(m, need), ready)}
    models = [listed.get(m.source.name, m) for m in models]
    findings = hub_access.findings([r for r in refused if r[0].folder is None], "error", gated=gated)
    for s, (reason, _, _) in refused:
        findings += _unasked(s, reason, need.pickled)
    findings += [f for m in models for f in m.findings]
    plan = Plan(models, findings, _once(models), shutil.disk_usage(existing(cache.root())).free)
    return replace(plan, findings=[*findings, *_disk(plan)])


def _listed(m: Model, need: Need) -> Model:
    """A model with what the hub has of it, and what is wrong with that."""
    need = replace(need, adapter=m.adapter)
    try:
        of = repository.ask(m.source.path, m.source.revision)
        index = repository.index(of, need)
        indexed = repository.shards(of, index) if index else set()
    except Exception as e:
        if not client.is_traffic(e):
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
    """For a model in the cache of which the hub does not tell: what can be seen by itself."""
    if s.folder is None:
        return
    message = f"in the hub's cache; whether it is complete could not be asked: {REFUSED[reason]}"
    yield warning("unasked", s.key, message)
    if (s.folder / "config.json").exists():  # it is no adapter, at which `locate` has looked
        yield from checkpoint.read(s.folder, s.key, s.repair, pickled=pickled).findings


def _disk(plan: Plan) -> Iterator[Finding]:
    if plan.left > plan.free:
        message = f"{cache.root()} needs {format_size(plan.left)}, and {format_size(plan.free)} are free"
        yield error("disk", "HF_HOME", message, "Free some, or have the cache on another disk: HF_HOME=DIR")
