"""A search in Weights & Biases: the real client, its files read back and a server on loopback."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb_stub
from composing import composed
from conftest import Command
from sweeps import SMALL, candidates, copied
from wandb_files import read_back
from wandb_stub import KEY, Stub

from mergelab.optimization.wandb_client import SweepTracker


@pytest.fixture
def server() -> Iterator[Stub]:
    with wandb_stub.serve() as stub:
        yield stub


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """W&B's settings are the test's alone."""
    for key in [k for k in os.environ if k.startswith("WANDB_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("NETRC", "/nonexistent")
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def online(server: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's settings are the server's."""
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)


TRACKED = ("tracking=wandb", "tracking.project=merges")


def recorded(folder: Path, *more: str, budget: int = 8) -> None:
    """Record a sweep that has ended, as its command does at its end."""
    SweepTracker(composed("search=cma", "experts=math_code", *TRACKED, *more), folder, budget).finish(0)


def state(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "recorded.json").read_text(encoding="utf-8")))


def test_offline_every_candidate_is_a_run_and_the_search_their_parent(
    swept: Path, tmp_path: Path, mergelab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(swept, tmp_path / "sweep", candidates=4)
    monkeypatch.setenv("WANDB_NAME", "mine")
    done = mergelab(*SMALL, *TRACKED, folder=folder)
    assert done.status == 0, done.err
    assert "W&B: offline; wandb sync " in " ".join(done.out.split())
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


@pytest.mark.usefixtures("online")
def test_online_it_arrives_and_goes_on_under_the_same_identity(
    swept: Path, tmp_path: Path, server: Stub, mergelab: Command
) -> None:
    folder = copied(swept, tmp_path / "sweep")
    done = mergelab(*SMALL, *TRACKED, folder=folder)
    assert done.status == 0, done.err
    sweep = state(folder)["id"]
    assert f"{server.url}/tester/merges/runs/{sweep}" in done.out.replace("\n", "")
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
    done = mergelab(*SMALL, *TRACKED, "search.budget=12", folder=folder)
    assert done.status == 0, done.err
    assert set(server.runs) == {sweep, *(f"{sweep}-{i}" for i in range(12))}
    assert server.resumed == [sweep]
    assert {n: len(r) for n, r in server.histories.items() if n in before and n != sweep} == {
        n: k for n, k in before.items() if n != sweep
    }
    assert [p["step"] for p in server.histories[sweep] if "best" in p] == [0, 1, 2]
    assert state(folder)["complete"]

    requests = len(server.requests)
    recorded(folder, budget=12)
    assert len(server.requests) == requests  # nothing is left to be recorded


@pytest.mark.usefixtures("online")
def test_a_server_that_fails_does_not_end_a_search_and_gets_the_rest_later(
    swept: Path, tmp_path: Path, server: Stub, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copied(swept, tmp_path / "sweep")
    answer, count = server.graphql, 0

    def dying(query: str, given: dict[str, Any]) -> dict[str, Any]:
        nonlocal count
        count += "UpsertBucket" in query
        if count > 3:
            raise ConnectionError
        return answer(query, given)

    server.graphql = dying  # type: ignore[method-assign]
    recorded(folder, "tracking.timeout=1")
    assert "W&B" in capfd.readouterr().out
    sweep, missing = state(folder)["id"], state(folder)["missing"]
    everything = {sweep, *(f"{sweep}-{i}" for i in range(8))}
    assert everything == set(server.runs) | offline(folder) | {f"{sweep}-{n}" for n in missing}

    server.graphql = answer  # type: ignore[method-assign]
    recorded(folder)
    assert state(folder)["complete"]
    assert state(folder)["missing"] == []
    assert everything == set(server.runs) | offline(folder)


def offline(folder: Path) -> set[str]:
    """The names of the runs whose files wait for `wandb sync`."""
    return {p.name.split("-", 3)[-1] for p in folder.glob("wandb/offline-run-*")}


def test_what_was_disabled_is_recorded_later(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copied(swept, tmp_path / "sweep")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    recorded(folder)
    assert "W&B is disabled" in capfd.readouterr().out
    assert offline(folder) == set()
    monkeypatch.delenv("WANDB_MODE")
    recorded(folder)
    assert len(offline(folder)) == 9
