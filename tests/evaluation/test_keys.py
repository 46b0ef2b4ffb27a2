"""Keys that name what was measured before: caches, runs and sweeps of earlier versions stay valid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from searching import setup_of
from tiny_tasks import write_task

from mergelab import provenance
from mergelab.core.hashing import digest
from mergelab.core.run_dir import RunDir, read_json, write_json
from mergelab.evaluation import Evaluator, cache
from mergelab.evaluation import measures as measures_of
from mergelab.optimization import fingerprint
from mergelab.schema import Evaluation, Model, Run, Skill

SKILLS = {"math": Skill(validation="m", search="m_search", share=3.0), "code": Skill(validation="c")}
SETTINGS: dict[str, dict[str, Any]] = {
    "skills": {"kind": "skills", "limit": 8.0},
    "tasks": {"kind": "tasks", "tasks": ["m", "c"], "search_tasks": ["m_search"], "metrics": {"m": "acc"}},
    "perplexity": {"kind": "perplexity", "text": "my.txt", "batch_size": 4},
    "none": {"kind": "none"},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: task files and a text, with versions that do not change."""
    monkeypatch.chdir(tmp_path)
    for name in ("m", "m_search", "c"):
        write_task(Path("tasks"), name, [{"prompt": "a", "answer": "b"}])
    Path("my.txt").write_text("one\n\ntwo\n")
    for module in (cache, provenance, fingerprint):
        monkeypatch.setattr(module, "version", lambda name: "1")
    for module in (provenance, fingerprint):
        monkeypatch.setattr(module, "__version__", "1")
    monkeypatch.setattr("platform.python_version", lambda: "3")
    return tmp_path


def run_of(kind: str) -> Run:
    model = Model(name="family", tasks="tasks", skills=SKILLS if kind == "skills" else {})
    return Run(model=model, eval=Evaluation(**SETTINGS[kind]))


def score_keys(run: Run) -> dict[str, str | None]:
    tasks = Path("tasks").resolve()
    evaluator = Evaluator(run.eval, hardware=run.hardware, tasks_path=tasks, home=tasks)
    wanted = [m for split in ("validation", "search") for m in measures_of(run, split)]
    return {m.task: evaluator.key("model", m) for m in wanted}


def run_key(run: Run, folder: Path) -> str:
    run_dir = RunDir(folder, folder / "model")
    write_json(run_dir.plan, {"models": [], "engine": None})
    write_json(run_dir.result, {})
    provenance.identify(run, run_dir, lambda what, done, total: None)
    return str(read_json(run_dir.result)["key"])


def sweep_key(run: Run) -> str:
    setup = setup_of()
    searched = replace(setup.run, eval=run.eval, model=run.model)
    climbed = measures_of(run, "search") or measures_of(run)
    plan: Any = SimpleNamespace(sources=[])
    about = fingerprint.identify(replace(setup, run=searched, measures=climbed), plan)
    return digest({k: about[k] for k in ("eval", "measures", "validation", "tasks", "versions")})


PINNED: dict[str, Any] = {
    "skills": {
        "scores": {"m": "e209696745067838", "c": "91167c9179148cf5", "m_search": "cab693b19af57ad6"},
        "run": "225297bb6faef37b",
        "sweep": "7f955449e3725d35",
    },
    "tasks": {
        "scores": {"m": "51249287253d7aef", "c": "a224c8975be41253", "m_search": "f44146a13b7c5502"},
        "run": "2a63cb0f77316e0f",
        "sweep": "25b536db809e5045",
    },
    "perplexity": {
        "scores": {"text": "486266d45323b4ca"},
        "run": "9ca7d909005d2471",
        "sweep": "59b32049b3b8df71",
    },
    "none": {"scores": {}, "run": "7b89725578ded846", "sweep": "cf258049168282b6"},
}
"""As the commit before evaluations became a protocol had them; those of perplexity changed with its
numbers, when BOS was no longer counted as text."""


@pytest.mark.parametrize("kind", SETTINGS)
def test_keys_are_those_of_before(kind: str, folder: Path) -> None:
    run = run_of(kind)
    found = {
        "scores": {task: str(key)[:16] for task, key in score_keys(run).items()},
        "run": run_key(run, folder / "run")[:16],
        "sweep": sweep_key(run)[:16],
    }
    assert found == PINNED[kind]
