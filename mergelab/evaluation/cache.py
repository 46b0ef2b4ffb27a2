"""Scores that have been measured before, by content.

One small JSON file a score, under a name that is a hash of all that decides it: the model's
content, the task's content, the metric, the settings, what answers and in how many bits, the versions
of the libraries and the kind of device. The batch size is among the settings, for padding and the
shapes of products change a logit's last digits and with them, now and then, an answer. The number of
threads and the make of the device can do so too and are left out: scores are reused across machines.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergelab.core.hashing import digest, file_hash
from mergelab.core.run_dir import read_json, write_json
from mergelab.evaluation.measures import TEXT, Measure
from mergelab.evaluation.task_hash import definition
from mergelab.evaluation.task_index import Catalogue
from mergelab.result import Score
from mergelab.schema import Evaluation

log = logging.getLogger(__name__)

FORMAT = 1
"""Raised when scores are computed differently, which makes all cached ones void."""


def key(
    model: str,
    measure: Measure,
    catalogue: Catalogue,
    settings: Evaluation,
    *,
    device: str,
    seed: int,
    quantize: str = "none",
) -> str | None:
    """The name of a score in the cache; None where the task's content cannot be known.

    `model` is a hash of the model's content, which implies its dtype; `quantize` is as in `hardware`.
    """
    if settings.kind == "perplexity" and measure.task == TEXT:
        task: Any = file_hash(Path(settings.text or ""))
    else:
        task = definition(catalogue, measure.task)
    if task is None:
        return None
    return digest(
        {
            "format": FORMAT,
            "model": model,
            "task": task,
            "name": measure.task,
            "metric": measure.metric,
            "num_fewshot": settings.num_fewshot,
            "limit": settings.limit,
            "chat_template": settings.chat_template,
            "max_length": settings.max_length,
            "batch_size": settings.batch_size,
            "seed": seed,
            "device": device.partition(":")[0],
            "backend": settings.backend,
            "quantize": quantize,
            "versions": {name: version(name) for name in packages(settings, device, quantize)},
        }
    )


def packages(settings: Evaluation, device: str, quantize: str) -> list[str]:
    """The libraries on whose versions scores depend."""
    names = ["lm_eval", "transformers", "torch"]
    if settings.backend == "vllm":
        names.append("vllm")
    if quantize != "none" and device != "cpu":
        names.append("bitsandbytes")
    return names


def read(home: Path, key: str) -> Score | None:
    """The score under `key`, or None. A file that cannot be understood counts as none."""
    path = _path(home, key)
    try:
        values = read_json(path)
        if set(values) != {field.name for field in fields(Score)}:
            raise ValueError(f"has the keys {sorted(values)}")
        return Score(**values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s is not a cached score (%s); it is measured again", path, error)
        return None


def write(home: Path, key: str, score: Score) -> None:
    """Keep `score`, whole or not at all."""
    write_json(_path(home, key), asdict(score))


def _path(home: Path, key: str) -> Path:
    return home / "scores" / f"{key}.json"
