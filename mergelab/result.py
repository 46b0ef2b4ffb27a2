"""`Result`: result.json, typed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergelab.core.errors import InputError
from mergelab.core.run_dir import write_json


@dataclass(frozen=True)
class Score:
    """What one measure gave."""

    value: float
    stderr: float | None
    """The standard error of `value`; None where neither lm_eval nor we know one."""
    samples: int
    """Documents that were judged."""
    metric: str
    """`exact_match`, or with its filter where that is not "none": `exact_match,strict-match`."""
    higher_is_better: bool
    task: str
    others: dict[str, float] = field(default_factory=dict)
    """The task's further metrics."""


Scores = dict[str, dict[str, dict[str, Score]]]
"""By model (`merged`, `base`, each expert), split (`validation`, `search`) and measure."""


@dataclass(frozen=True)
class Result:
    """What came of a run or a search: `result.json` of its folder, with its usual keys as attributes.

    Keys of single jobs (`routing`, `distance`, `landscape`, ...; see docs/reference/result.md) are in `data`.
    """

    data: Mapping[str, Any] = field(repr=False)
    """The whole file."""
    folder: Path | None = None
    """The run's folder; None where the result was not loaded from one."""

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """The result in a run's folder, or in a file.

        Raises:
            InputError: where there is none, or none that can be read.
        """
        place = Path(path).expanduser().absolute()
        file = place / "result.json" if place.is_dir() else place
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except OSError as e:
            raise InputError(f"{file}: {e.strerror}") from None
        except ValueError as e:
            raise InputError(f"{file} is not a result.json: {e}") from None
        if not isinstance(data, dict) or "status" not in data:
            raise InputError(f"{file} is not the result.json of a run")
        return cls(data, file.parent)

    def save(self, path: str | Path) -> Path:
        """Write it to a file, or as `result.json` into a folder, whole or not at all; returns the file."""
        place = Path(path).expanduser().absolute()
        file = place / "result.json" if place.is_dir() or not place.suffix else place
        write_json(file, self.data)
        return file

    @property
    def status(self) -> str:
        """`done`, `running`, `failed`, `invalid` or `interrupted`."""
        return str(self.data["status"])

    @property
    def error(self) -> str | None:
        """Why it did not come to its end, or None."""
        error = self.data.get("error") or {}
        return error.get("reason")

    @property
    def fitness(self) -> float | None:
        """The number that a search goes by, higher is better; None where nothing was measured, or of a
        search with several objectives."""
        found = self.data.get("fitness")
        value = found.get("value") if isinstance(found, Mapping) else found
        return None if value is None else float(value)

    @property
    def split(self) -> str | None:
        """What the fitness was measured on: `search` or `validation`."""
        found = self.data.get("fitness")
        return found.get("split") if isinstance(found, Mapping) else None

    @property
    def scores(self) -> Scores:
        """What was measured, by model, split and measure: `result.scores["merged"]["validation"]["math"]`."""
        return {
            model: {
                split: {name: score_of(s) for name, s in scores.items()} for split, scores in splits.items()
            }
            for model, splits in self.data.get("metrics", {}).items()
        }

    @property
    def model(self) -> Path | None:
        """The folder of the model that was made, or None."""
        made = self.data.get("model")
        return Path(made) if made else None

    @property
    def key(self) -> str | None:
        """A hash of all that decides the result: two runs with one key have one result."""
        return self.data.get("key")

    @property
    def command(self) -> str | None:
        """The command line that repeats it."""
        return self.data.get("command")

    @property
    def overrides(self) -> list[str]:
        """The arguments that compose it (of a search, its winner)."""
        found = self.data.get("overrides") or []
        return list(found) if isinstance(found, list) else []

    @property
    def seed(self) -> int | None:
        """Of everything random."""
        return self.data.get("seed")

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of each step."""
        return dict(self.data.get("timings", {}))

    @property
    def versions(self) -> dict[str, str]:
        """Of mergelab, Python and the libraries that took part."""
        return dict(self.data.get("versions", {}))

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """The models that took part, with their hub commits or the hashes of their files."""
        return list(self.data.get("inputs", []))

    def __str__(self) -> str:
        """The status, the fitness and the model, on a line."""
        fitness = f", fitness {self.fitness:.3f}" if self.fitness is not None else ""
        return f"{self.status}{fitness}" + (f", {self.model}" if self.model else "")


def score_of(found: Mapping[str, Any]) -> Score:
    """A score as files have it, typed."""
    known = {k: v for k, v in found.items() if k in Score.__dataclass_fields__}
    numbers: dict[str, Any] = {k: _number(known.get(k)) for k in ("value", "stderr")}
    others = {k: _number(v) for k, v in known.get("others", {}).items()}
    return Score(**{**known, **numbers, "others": others})


def _number(value: Any) -> Any:
    """A number that JSON cannot write, such as NaN, is a text there."""
    return float(value) if isinstance(value, str) else value
