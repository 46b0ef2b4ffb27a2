"""How far experts are from their base and from each other: read once, shown, judged and recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mergelab.core.findings import first_few
from mergelab.core.plan_file import PlanFile
from mergelab.core.run_dir import RunDir
from mergelab.models import checkpoint
from mergelab.models.checkpoint import ModelMetadata
from mergelab.preflight import reads_file
from mergelab.report import terminal
from mergelab.schema import Run

if TYPE_CHECKING:
    from mergelab.analysis.parameter_groups import Comparison

BASE = "base"


@dataclass(frozen=True)
class Subjects:
    """The models of a plan whose weights can be compared."""

    folders: Mapping[str, Path]
    """By name, `base` among them unless a file has none."""
    places: Mapping[str, str]
    """What names them."""
    adapted: tuple[str, ...]
    """Those that have an adapter, and are left out."""

    @classmethod
    def of(cls, run: Run, run_dir: RunDir) -> Subjects:
        """Those of a run that has been planned."""
        models = PlanFile.load(run_dir.plan).models
        plain = [m for m in models if not m.adapter]
        keys = {m.name: "model.base" if m.name == BASE else f"experts.{m.name}" for m in plain}
        return cls(
            {m.name: m.at for m in plain},
            {m.name: m.path for m in plain} if reads_file(run) else keys,
            tuple(m.name for m in models if m.adapter),
        )

    @property
    def experts(self) -> list[str]:
        """All but the base."""
        return [n for n in self.folders if n != BASE]

    @property
    def comparable(self) -> bool:
        """Whether there is a base, and an expert besides."""
        return BASE in self.folders and bool(self.experts)

    @cached_property
    def facts(self) -> dict[str, ModelMetadata]:
        """Their headers, by name."""
        return {n: checkpoint.weights(folder) for n, folder in self.folders.items()}


def compared(run: Run, run_dir: RunDir, subjects: Subjects, top: float | None = None) -> Comparison | None:
    """Read all weights once; show, judge and record how far the experts are from the base and each other.

    Args:
        top: see `analysis.stream.compare`; None: distances only.
    Returns:
        None where there is nothing to compare, which is then said.
    """
    from mergelab.analysis import distance, streaming
    from mergelab.report.analysis import tables

    if subjects.adapted:
        terminal.aside(f"left out because they have an adapter: {', '.join(subjects.adapted)}")
    if not subjects.comparable:
        terminal.aside("distances are those of experts from their base, and there is no such pair")
        return None
    facts = subjects.facts
    with terminal.progress(nbytes=True) as progress:
        found = streaming.compare(
            facts[BASE], {n: facts[n] for n in subjects.experts}, hardware=run.hardware, top=top,
            progress=progress,
        )  # fmt: skip
    if found.left_out:
        terminal.aside(f"left out because not every model has them in one shape: {first_few(found.left_out)}")
    for name, (rows, most) in found.cut.items():
        terminal.aside(f"{name}: compared are the first {rows:,} rows, which all have, of up to {most:,}")
    if not found.tensors:
        terminal.aside("no tensor is in every model")
        return None
    tables.distances(found)
    if len(found.experts) > 1:
        tables.cosines(found)
    terminal.gap()
    for f in distance.findings(found, subjects.places):
        terminal.finding(f.severity, f.text())
    run_dir.record({"distance": distance.record(found)})
    return found
