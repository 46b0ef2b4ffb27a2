"""A search in Weights & Biases: the real client, its files read back and a server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb_stub
from test_search import SMALL, candidates
from wandb_files import read_back
from wandb_stub import KEY, Stub


@pytest.fixture
def server() -> Iterator[Stub]:
    with wandb_stub.serve() as stub:
        yield stub


def searched(folder: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A small search that is recorded, as its own process."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    clean |= {"NETRC": "/nonexistent", "HOME": str(folder.parent), **environment}
    done = subprocess.run(
        [sys.executable, "-m", "mergelab", *SMALL, "tracking=wandb", "tracking.project=merges", *more,
         f"hydra.sweep.dir={folder}"],
        capture_output=True, text=True, check=False, env=clean,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done


def online(server: Stub) -> dict[str, str]:
    return {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}


def state(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "recorded.json").read_text(encoding="utf-8")))


def test_offline_every_candidate_is_a_run_and_the_search_their_parent(family: Any, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    done = searched(folder, WANDB_NAME="mine")
    assert done.returncode == 0, done.stderr
    assert "W&B: offline; wandb sync " in " ".join(done.stdout.split())
    runs = {p.name.split("-", 3)[-1]: read_back(p) for p in folder.glob("wandb/offline-run-*")}
    sweep = state(folder)["id"]
    lines = candidates(folder)
    assert set(runs) == {sweep, *(f"{sweep}-{c['number']}" for c in lines)}
    groups, names = set(), set()
    for c in lines:
        told, records = runs[f"{sweep}-{c['number']}"]
        begun = next(r["run"] for r in records if r["type"] == "run")
        groups.add(begun["run_group"])
        names.add(begun["display_name"])
        assert begun["job_type"] == "candidate"
        assert told["config"] == c["genome"] | {"number": c["number"], "generation": c["generation"]}
        assert told["summary"]["fitness"] == pytest.approx(c["fitness"])
        assert told["summary"]["math"] == pytest.approx(c["scores"]["math"]["value"])
        assert told["summary"]["status"] == c["status"]
    assert names == {f"candidate {i}" for i in range(8)}
    assert len(groups) == 1

    told, records = runs[sweep]
    begun = next(r["run"] for r in records if r["type"] == "run")
    assert (begun["job_type"], begun["run_group"], begun["display_name"]) == ("search", *groups, "mine")
    points = [r["history"]["item"] for r in records if r["type"] == "history"]
    points = [p for p in points if "best" in p]
    assert [p["step"] for p in points] == [0, 1]
    for p in points:
        fits = [c["fitness"] for c in lines if c["generation"] == p["step"]]
        assert p["best"] == pytest.approx(max(fits))
        assert p["mean"] == pytest.approx(sum(fits) / len(fits))
    artifacts = {r["artifact"]["name"] for r in records if r["type"] == "artifact"}
    assert {f"recipe-{sweep}", f"result-{sweep}", f"run-{sweep}-population"} <= artifacts
    media = {p.name.rsplit("_", 2)[0] for p in folder.glob("wandb/*/files/media/images/report/*.png")}
    assert {"fitness", "parallel", "parameters", "importance", "validation"} <= media
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert told["summary"]["fitness"] == pytest.approx(result["fitness"]["value"])
    assert told["summary"]["verdict"] == result["verdict"]


def test_online_it_arrives_and_goes_on_under_the_same_identity(
    family: Any, tmp_path: Path, server: Stub
) -> None:
    folder = tmp_path / "sweep"
    done = searched(folder, **online(server))
    assert done.returncode == 0, done.stderr
    sweep = state(folder)["id"]
    assert f"{server.url}/tester/merges/runs/{sweep}" in done.stdout.replace("\n", "")
    assert set(server.runs) == {sweep, *(f"{sweep}-{i}" for i in range(8))}
    for c in candidates(folder):
        (row,) = (r for r in server.histories[f"{sweep}-{c['number']}"] if "fitness" in r)
        assert row["fitness"] == pytest.approx(c["fitness"])
        assert server.runs[f"{sweep}-{c['number']}"]["groupName"] == server.runs[sweep]["groupName"]
    assert server.uploads["recipe.yaml"] == (folder / "recipe.yaml").read_bytes()
    assert json.loads(server.uploads["population.table.json"])["columns"][:4] == [
        "number", "generation", "status", "fitness",
    ]  # fmt: skip

    before = {name: len(rows) for name, rows in server.histories.items()}
    done = searched(folder, "search.budget=12", **online(server))
    assert done.returncode == 0, done.stderr
    assert set(server.runs) == {sweep, *(f"{sweep}-{i}" for i in range(12))}
    assert server.resumed == [sweep]
    assert {n: len(r) for n, r in server.histories.items() if n in before and n != sweep} == {
        n: k for n, k in before.items() if n != sweep
    }
    assert [p["step"] for p in server.histories[sweep] if "best" in p] == [0, 1, 2]
    assert state(folder)["complete"]

    requests = len(server.requests)
    assert searched(folder, "search.budget=12", **online(server)).returncode == 0
    assert len(server.requests) == requests  # nothing is left to be recorded


def test_a_server_that_fails_does_not_end_a_search_and_gets_the_rest_later(
    family: Any, tmp_path: Path, server: Stub
) -> None:
    folder = tmp_path / "sweep"
    answer, count = server.graphql, 0

    def dying(query: str, given: dict[str, Any]) -> dict[str, Any]:
        nonlocal count
        count += "UpsertBucket" in query
        if count > 3:
            raise ConnectionError
        return answer(query, given)

    server.graphql = dying  # type: ignore[method-assign]
    done = searched(folder, "tracking.timeout=1", **online(server))
    assert done.returncode == 0, done.stderr
    assert (folder / "result.json").exists()
    assert "W&B" in done.stdout
    offline = {p.name.split("-", 3)[-1] for p in folder.glob("wandb/offline-run-*")}
    recorded = set(server.runs) | offline
    sweep = state(folder)["id"]
    missing = {f"{sweep}-{n}" for n in state(folder)["missing"]}
    assert recorded | missing >= {f"{sweep}-{i}" for i in range(8)}


def test_what_was_disabled_is_recorded_later(family: Any, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    done = searched(folder, WANDB_MODE="disabled")
    assert done.returncode == 0, done.stderr
    assert "W&B is disabled" in done.stdout
    assert not list(folder.glob("wandb/offline-run-*"))
    assert searched(folder).returncode == 0
    assert len(list(folder.glob("wandb/offline-run-*"))) == 9
