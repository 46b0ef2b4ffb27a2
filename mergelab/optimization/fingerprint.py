"""Which search it is: everything that decides what it comes to, and how two searches differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergelab import __version__, context, evaluation
from mergelab.core import hashing
from mergelab.methods import registry
from mergelab.optimization.request import Setup
from mergelab.preflight import Plan

VERSIONS = ("torch", "transformers", "lm_eval", "nevergrad", "cma", "numpy")
"""The packages on which fitness and genomes depend."""


def identify(setup: Setup, plan: Plan) -> dict[str, Any]:
    """Everything that decides the result of a search, except its budget, in JSON's own types."""
    run, s = setup.run, setup.run.search
    evaluator = context.evaluator(run)
    reported = evaluation.measures(run, "validation")
    identity: dict[str, Any] = {
        "search": {
            "optimizer": s.optimizer, "population": setup.population, "seed": s.seed, "sigma": s.sigma,
            "resolution": s.resolution, "fidelity": asdict(s.fidelity), "objectives": list(s.objectives),
            "space": {g.key: g.text for g in setup.genes}, "start": setup.starts,
        },
        "method": asdict(run.method),
        **({"code": code} if (code := registry.code_of(_methods(setup))) else {}),
        "experts": {name: asdict(e) for name, e in run.experts.items()},
        "models": {source.name: _stamp(source) for source in plan.sources},
        "hardware": {"dtype": run.hardware.dtype, "compute_dtype": run.hardware.compute_dtype,
                     "device": run.hardware.device.partition(":")[0]},
        "seed": run.seed,
        "eval": evaluation.score_settings(run.eval),
        "measures": {m.name: [m.task, m.metric, m.share] for m in setup.measures},
        "validation": {m.name: [m.task, m.metric, m.share] for m in reported},
        "tasks": {m.task: hashing.digest(evaluator.content(m))[:16]
                  for m in [*setup.measures, *reported]},
        "versions": {"mergelab": __version__} | {p: version(p) for p in VERSIONS},
    }  # fmt: skip
    as_json: dict[str, Any] = json.loads(json.dumps(identity))  # as a journal gives it back
    return as_json


def _methods(setup: Setup) -> list[str]:
    """The merge methods that a candidate may have."""
    choices = [{g.key: c} for g in setup.genes if g.key == "method" for c in g.choices]
    return [setup.run.method.name, *(setup.compose({**setup.starts, **c}).method.name for c in choices)]


def _stamp(source: Any) -> str:
    """A model as its commit on the hub, or by the sizes and times of its files: hashing 260 GB before the
    first candidate would take too long."""
    if source.commit:
        return str(source.commit)
    return hashing.digest(hashing.folder_stamp(Path(source.folder)))[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, one line a key."""
    flat_before, flat_now = _flat(before), _flat(now)
    return [
        f"{key}: {flat_before.get(key, 'absent')} then, {flat_now.get(key, 'absent')} now"
        for key in {**flat_before, **flat_now}
        if flat_before.get(key, "absent") != flat_now.get(key, "absent")
    ]


def _flat(value: Any, key: str = "") -> dict[str, str]:
    if isinstance(value, Mapping):
        out: dict[str, str] = {}
        for k, v in value.items():
            out |= _flat(v, f"{key}.{k}" if key else str(k))
        return out
    return {key: json.dumps(value, ensure_ascii=False)}
