"""Scores that have been measured before, by content.

One small JSON file a score, under a name that is a hash of all that decides it: the model's
content, the task's content, the metric, the settings, the backend, the quantisation, the versions of the
libraries and the kind of device. The batch size is among the settings because padding and the shapes of
products change the last digits of a logit, and sometimes an answer. The number of threads and the model of
the device can do so, too. They are left out so that scores are reused across machines.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergelab.core.hashing import digest
from mergelab.core.run_dir import read_json, write_json
from mergelab.evaluation.kind import kind_of, score_settings
from mergelab.evaluation.measures import Measure
from mergelab.evaluation.scorer import Conditions
from mergelab.result import Score
from mergelab.schema import Evaluation, Hardware

log = logging.getLogger(__name__)

FORMAT = 1
"""Raised when scores are computed differently, which makes all cached scores invalid."""


def key(model: str, measure: Measure, content: Any | None, conditions: Conditions) -> str | None:
    """The name of a score in the cache.

    Args:
        model: a hash of the model's content, which implies its dtype.
        measure: what is measured.
        content: what decides the score besides model and settings.
        conditions: what it is measured under.
    Returns:
        None where the content is not known.
    """
    if content is None:
        return None
    hardware = conditions.hardware
    return digest(
        {
            **score_settings(conditions.settings),
            "format": FORMAT,
            "model": model,
            "task": content,
            "name": measure.task,
            "metric": measure.metric,
            "seed": conditions.seed,
            "device": hardware.device.partition(":")[0],
            "quantize": hardware.quantize,
            "versions": {name: version(name) for name in packages(conditions.settings, hardware)},
        }
    )


def packages(settings: Evaluation, hardware: Hardware) -> list[str]:
    """The libraries on whose versions scores depend."""
    names = list(kind_of(settings).packages)
    if settings.backend == "vllm":
        names.append("vllm")
    if hardware.quantize != "none" and hardware.device != "cpu":
        names.append("bitsandbytes")
    return names


def read(home: Path, key: str) -> Score | None:
    """The score under `key`, or None. A file that is not a score counts as none."""
    path = _path(home, key)
    try:
        values = read_json(path)
        if set(values) != {field.name for field in fields(Score)}:
            raise ValueError(f"has the keys {sorted(values)}")
        return Score(**values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as e:
        log.warning("%s is not a cached score (%s); it is measured again", path, e)
        return None


def write(home: Path, key: str, score: Score) -> None:
    """Keep `score`, whole or not at all."""
    write_json(_path(home, key), asdict(score))


def _path(home: Path, key: str) -> Path:
    return home / "scores" / f"{key}.json"
