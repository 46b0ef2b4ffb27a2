"""plan.json of a run's folder, typed: what preflight has decided, for the steps after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.core.run_dir import read_json


@dataclass(frozen=True)
class PlannedModel:
    """A model that takes part."""

    name: str
    """`base`, or the expert's."""
    path: str
    """As the configuration names it."""
    revision: str | None
    commit: str | None
    """Of the hub; None for a folder."""
    folder: Path | None
    """None where it is not on this machine; see `at`."""
    adapter: Path | None
    reference: str
    """What the recipe calls it."""

    @property
    def at(self) -> Path:
        """Its folder, of a run that may start only where every model has one."""
        assert self.folder is not None, self.name
        return self.folder

    def json(self) -> dict[str, Any]:
        """As plan.json has it."""
        return {
            "name": self.name,
            "path": self.path,
            "revision": self.revision,
            "commit": self.commit,
            "folder": str(self.folder) if self.folder else None,
            "adapter": str(self.adapter) if self.adapter else None,
            "reference": self.reference,
        }


@dataclass(frozen=True)
class PlanFile:
    """What the steps after preflight read of a plan."""

    models: list[PlannedModel]
    config_source: str | None
    """The name of the model whose config and tokenizer the output gets."""
    engine: str | None
    """What merges."""
    recipe: Mapping[str, Any] | None

    @classmethod
    def load(cls, path: Path) -> PlanFile:
        """What preflight has left in a run's folder, in `RunDir.plan`."""
        return cls.of(read_json(path))

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> PlanFile:
        """What is in the file."""
        engine = data.get("engine")
        return cls(
            [_model(m) for m in data.get("models", [])],
            data.get("config_source"),
            engine["name"] if engine else None,
            data.get("recipe"),
        )

    def model(self, name: str | None) -> PlannedModel:
        """The model of a name."""
        return next(m for m in self.models if m.name == name)


def _model(data: Mapping[str, Any]) -> PlannedModel:
    folder, adapter = (Path(data[k]) if data[k] else None for k in ("folder", "adapter"))
    return PlannedModel(
        data["name"], data["path"], data["revision"], data["commit"], folder, adapter, data["reference"]
    )
