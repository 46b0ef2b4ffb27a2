"""Models of the hub: found in its cache, or missing for a reason that is told without a long wait."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Command
from forks import Forks
from hub_cache import commit
from hub_server import served

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A server that speaks as much of the hub's protocol as is needed to be asked for a model."""

    url: str = ""
    asked: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    """Set when hanging answers may end."""

    def answer(self, repo: str, what: str) -> tuple[int, str | None]:
        """The HTTP status and the hub's error code. `what` is revision/..., auth-check or empty."""
        _, name = repo.split("/")
        if name == "hangs" or (name == "hangs-later" and what == "auth-check"):
            self.released.wait()
        if name == "missing":
            return (401, None) if what else (404, "RepoNotFound")
        if name == "private":
            return 401, None
        if name == "gated" and what == "auth-check":
            return 403, "GatedRepo"
        if name == "broken":
            return 503, None
        if what.startswith("revision/") and what != f"revision/{COMMIT}":
            return 404, "RevisionNotFound"
        return 200, None


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if not path.startswith("/api/models/"):  # what the client wants for itself
                self.send_error(404)
                return
            state.asked.append(path)
            owner, name, *what = path.removeprefix("/api/models/").split("/")
            status, code = state.answer(f"{owner}/{name}", "/".join(what))
            body = json.dumps({"id": f"{owner}/{name}", "sha": COMMIT} if status == 200 else {"error": code})
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with served(Handler) as state.url:
        yield state
        state.released.set()


@dataclass
class Done:
    status: int
    out: str
    err: str


@pytest.fixture
def command(tmp_path: Path, warm: Forks) -> Callable[..., Done]:
    """`mergelab` in a process of its own, for the hub's client reads its environment when imported."""

    def run(endpoint: str, *arguments: str, **environment: str) -> Done:
        offline = ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_DATASETS_OFFLINE")
        env = {k: v for k, v in os.environ.items() if k not in offline and not k.lower().endswith("_proxy")}
        env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), **environment}
        files = tmp_path / "out.txt", tmp_path / "err.txt"
        typed = [str(tmp_path), "", *arguments, "eval=none", f"hydra.run.dir={tmp_path / 'run'}"]
        # Far longer than it may take, far shorter than the client would wait by itself.
        status = warm.start(typed, env, *files).wait(80)
        out, err = (" ".join(f.read_text(encoding="utf-8").split()) for f in files)
        assert "Traceback" not in out + err
        return Done(status, out, err)

    return run


FIVE = [
    "model=qwen0_5b", "model.base.path=org/there", f"model.base.revision={COMMIT}", "experts=multi",
    "~experts.physics", "experts.math.path=org/gated", "experts.code.path=org/missing",
    "experts.japanese.path=org/there", "experts.japanese.revision=v9", "experts.general.path=org/broken",
]  # fmt: skip

REASONS = [
    "model.base: not on this machine yet: org/there Fetch first: run the same command with "
    f"job=fetch, or: hf download org/there --revision {COMMIT}",
    "experts.math: org/gated is gated, and this login has no access Accept the licence on the model's page "
    "at the hub, then `hf auth login`, and: hf download org/gated",
    "experts.code: there is no such folder, and the hub has no org/missing, or it is private Check the",
    "experts.japanese: org/there has no revision 'v9'",
    "experts.general: not on this machine, and the hub answers with HTTP 503: org/broken",
]


def test_a_merge_says_of_each_model_why_it_is_not_here(hub: Hub, command: Callable[..., Done]) -> None:
    done = command(hub.url, *FIVE)
    assert done.status == 2, done.err
    for reason in REASONS:
        assert reason in done.err, (reason, done.err)
    assert done.err.count("✗") == len(REASONS)
    # Each is asked once, and those that are there once more for access; nothing is retried.
    assert len(hub.asked) == 5 + 2
    assert sum("auth-check" in path for path in hub.asked) == 2


def test_a_plan_goes_on_from_the_known_shapes(hub: Hub, command: Callable[..., Done]) -> None:
    done = command(hub.url, *FIVE, "job=plan")
    assert done.status == 0, done.err
    assert done.err == ""
    for reason in [*REASONS, "could not be checked", "merge_method: dare_ties", "about 4.9 GB"]:
        assert reason in done.out, (reason, done.out)


@pytest.mark.parametrize("name", ["hangs", "hangs-later"])
def test_a_hub_that_never_answers_is_not_waited_for(
    hub: Hub, command: Callable[..., Done], name: str
) -> None:
    paths = [f"experts.{role}.path=org/{name}" for role in ("math", "code", "japanese", "general")]
    done = command(hub.url, "model=mistral_7b", "experts=multi", "~experts.physics", *paths)
    assert done.status == 2
    places = "experts.math, experts.code, experts.japanese, experts.general"
    assert f"{places}: neither a folder nor in the hub's cache, and the hub does not answer" in done.err
    assert f"hf download org/{name}" in done.err
    assert len([path for path in hub.asked if f"org/{name}" in path]) <= 8


def test_no_hub_at_all(command: Callable[..., Done]) -> None:
    done = command("http://127.0.0.1:9", "model=gemma2_9b", "experts=math_japanese")
    assert done.status == 2
    assert done.err.count("✗") == 1
    for part in (
        "model.base, experts.math, experts.japanese: neither a folder nor in the hub's cache",
        "the hub does not answer", "google/gemma-2-9b", "They may be gated: accept the licence",
        "hf auth login", "HF_HOME", "hf download kyungeun/gemma-2-9b-it-mathinstruct",
    ):  # fmt: skip
        assert part in done.err, part


def test_told_to_stay_offline(hub: Hub, command: Callable[..., Done]) -> None:
    done = command(hub.url, "model=qwen0_5b", "experts=math_code", HF_HUB_OFFLINE="1")
    assert done.status == 2
    assert "HF_HUB_OFFLINE forbids asking the hub: Qwen/Qwen2.5-0.5B" in done.err
    assert hub.asked == []


# ---------------------------------------------------------------- the hub's cache


CACHED = [
    "model.base.path=org/base", "experts=math_code", "experts.math.path=org/math",
    "experts.code.path=org/code", "eval=none",
]  # fmt: skip


def test_models_in_the_cache_are_merged_and_their_commits_recorded(mergelab: Command, cache: Path) -> None:
    out = mergelab(*CACHED)
    assert out.status == 0, out.err
    plan = json.loads((out.folder / "plan.json").read_text(encoding="utf-8"))
    assert {m["name"]: m["commit"] for m in plan["models"]} == {
        n: commit(n) for n in ("base", "math", "code")
    }
    assert {m["name"]: m["commit"] for m in out.result["inputs"]} == {
        n: commit(n) for n in ("base", "math", "code")
    }
    recipe = yaml.safe_load((out.folder / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["base_model"] == str(cache / "models--org--base" / "snapshots" / commit("base"))
    assert "org/base" in (out.folder / "model" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("revision", ["main", commit("base")])
def test_a_revision_that_is_in_the_cache(mergelab: Command, cache: Path, revision: str) -> None:
    out = mergelab(*CACHED, f"model.base.revision={revision}", "job=plan")
    assert out.status == 0, out.err
    assert "not here" not in out.out


def test_a_revision_that_is_not_in_the_cache(mergelab: Command, cache: Path) -> None:
    out = mergelab(*CACHED, f"model.base.revision={COMMIT}")
    assert out.status == 2
    assert f"hf download org/base --revision {COMMIT}" in out.err


def test_an_expert_may_ask_for_another_revision_than_its_family(mergelab: Command, cache: Path) -> None:
    out = mergelab(
        "model.base.path=org/base", "model.roles={math:{path:org/math},code:{path:org/code,revision:other}}",
        "experts=math_code", "experts.code.revision=main", "eval=none", "job=plan",
    )  # fmt: skip
    assert out.status == 0, out.err
    assert "not here" not in out.out


def test_a_snapshot_that_is_not_whole_says_how_to_fetch_it(mergelab: Command, cache: Path) -> None:
    (cache / "models--org--math" / "snapshots" / commit("math") / "model.safetensors").unlink()
    out = mergelab(*CACHED)
    assert out.status == 2
    assert "has no model.safetensors" in out.err
    assert "hf download org/math --force-download" in out.err
    assert out.err.count("✗") == 1


def test_a_snapshot_with_a_missing_shard(mergelab: Command, cache: Path) -> None:
    snapshot = cache / "models--org--math" / "snapshots" / commit("math")
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    index = {"weight_map": dict.fromkeys(names, "model-00002-of-00002.safetensors")}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    out = mergelab(*CACHED)
    assert out.status == 2
    assert "model-00002-of-00002.safetensors does not exist, but the index names it" in out.err
    assert "hf download org/math --force-download" in out.err
    assert out.err.count("✗") == 1
