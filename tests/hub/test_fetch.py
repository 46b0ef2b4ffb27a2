"""job=fetch: what it downloads from a hub on this machine, what it refuses, and how it goes on."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from filelock import FileLock
from hub_server import (
    READER,
    Hub,
    Terminal,
    git_hash,
    hub_fixture,  # noqa: F401 (a fixture)
    sha256,
    terminal_fixture,  # noqa: F401 (a fixture)
)

from mergelab.hub import repository
from mergelab.hub.repository import File, Need, Repository
from mergelab.models.resolver import locate

BASE = "model.base.path=org/base"
FETCH = ("job=fetch", "eval=none")
CHUNK = 10 * 1024 * 1024
"""Bytes that the hub's client writes at once: what has come is kept in multiples of it."""


def experts(**paths: str) -> list[str]:
    """Who takes part, by name; paths as in experts.NAME.path."""
    return ["experts=single_math", *(f"experts.{k}={{path: '{v}'}}" for k, v in paths.items())]


ALONE = (BASE, *experts(math="./here"))
"""Only the base is a model of the hub."""


def big(hub: Hub, name: str = "org/base", size: int = 3 * CHUNK) -> bytes:
    """A repository with weights of a size that comes in several pieces."""
    weights = os.urandom(size)
    hub.add(name, {"config.json": b"{}", "model.safetensors": weights})
    return weights


def snapshot(terminal: Terminal, name: str, commit: str) -> Path:
    return terminal.cache / f"models--{name.replace('/', '--')}" / "snapshots" / commit


# ---------------------------------------------------------------- what comes


def test_what_is_fetched_is_merged_without_the_hub(
    hub: Hub, terminal: Terminal, family: Any, mergelab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    useless = {
        "pytorch_model.bin": b"pickled", "model.gguf": b"other", "README.md": b"# words",
        "original/consolidated.safetensors": b"again", "onnx/config.json": b"{}", "modeling.py": b"1/0",
    }  # fmt: skip
    commits = {}
    for role in ("base", "math"):
        files = {p.name: p.read_bytes() for p in family.checkpoint(role).iterdir()}
        commits[role] = hub.add(f"org/{role}", {**files, **useless})
    chosen = [BASE, *experts(math="org/math")]
    done = terminal.run(*FETCH, *chosen)
    assert done.status == 0, done.err
    for role, commit in commits.items():
        place = snapshot(terminal, f"org/{role}", commit)
        came = {p.name: p.read_bytes() for p in place.iterdir()}
        assert came == {p.name: p.read_bytes() for p in family.checkpoint(role).iterdir()}
    assert not [path for path in hub.downloads() if path.rpartition("/")[2] in useless]
    assert f"model.base.revision={commits['base']} experts.math.revision={commits['math']}" in done.out
    fetched = {f["repo"]: f for f in done.result["fetched"]}
    size = sum(p.stat().st_size for p in family.checkpoint("math").iterdir())
    assert fetched["org/math"]["commit"] == commits["math"]
    assert fetched["org/math"]["bytes"] == fetched["org/math"]["downloaded"] == size

    hub.ranges.clear()
    again = terminal.run(*FETCH, *chosen)
    assert again.status == 0 and "every model was here" in again.out
    assert hub.downloads() == []

    hub.down = "/"
    silent = terminal.run(*FETCH, *chosen)
    assert silent.status == 0, silent.err
    assert "model.base, experts.math: in the hub's cache, but possibly incomplete, because" in silent.out
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(terminal.cache))
    merged = mergelab("eval=none", *chosen)  # in this process the hub's client is offline
    assert merged.status == 0, merged.err
    assert {m["name"]: m["commit"] for m in merged.result["inputs"]} == commits


def test_a_branch_that_moves_is_followed_and_a_commit_is_kept(hub: Hub, terminal: Terminal) -> None:
    first = hub.add("org/base", {"config.json": b"{}", "model.safetensors": b"one"})
    second = hub.add("org/base", {"config.json": b"{}", "model.safetensors": b"two"})
    pinned = terminal.run(*FETCH, BASE, f"model.base.revision={first}", *experts(math="org/base"))
    assert pinned.status == 0, pinned.err
    assert f"model.base.revision={first}" not in pinned.out
    assert f"experts.math.revision={second}" in pinned.out
    assert (snapshot(terminal, "org/base", first) / "model.safetensors").read_bytes() == b"one"
    assert (snapshot(terminal, "org/base", second) / "model.safetensors").read_bytes() == b"two"
    assert (terminal.cache / "models--org--base" / "refs" / "main").read_text() == second
    third = hub.add("org/base", {"config.json": b"{}", "model.safetensors": b"three"})
    assert terminal.run(*FETCH, *ALONE).status == 0
    assert (snapshot(terminal, "org/base", third) / "model.safetensors").read_bytes() == b"three"
    assert (terminal.cache / "models--org--base" / "refs" / "main").read_text() == third


def test_the_models_of_a_mergekit_file_and_an_adapter(
    hub: Hub, terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "math"):
        hub.add(f"org/{name}", {"config.json": b"{}", "model.safetensors": name.encode()})
    lora = hub.add(
        "org/lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"low", "x.bin": b""}
    )
    text = "merge_method: linear\nbase_model: org/base\nmodels:\n- model: org/math@main+org/lora\n"
    (tmp_path / "my.yaml").write_text(f"{text}  parameters: {{weight: 1}}\n", encoding="utf-8")
    done = terminal.run(*FETCH, "method=mergekit", "method.path=my.yaml")
    assert done.status == 0, done.err
    assert {f["repo"]: f["files"] for f in done.result["fetched"]} == {
        "org/base": 2,
        "org/math": 2,
        "org/lora": 2,
    }
    assert f"org/base@{hub.repos['org/base'].branches['main']}" in done.out
    place = snapshot(terminal, "org/lora", lora)
    assert (place / "adapter_model.safetensors").read_bytes() == b"low"

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(terminal.cache))
    found, findings = locate("math", "experts.math", f"{tmp_path}/here+org/lora", None, lambda role: place)
    assert found.adapter == place and findings == []


def test_an_adapter_of_the_hub_is_not_left_out_in_silence(mergelab: Command, family: Any) -> None:
    chosen = ["experts=single_math", "experts.math.path='zoo:math+org/lora'", "eval=none"]
    merged = mergelab(*chosen)
    assert merged.status == 2
    assert "experts.math: neither a folder nor in the hub's cache" in merged.err
    assert "org/lora" in merged.err
    planned = mergelab(*chosen, "job=plan")
    assert planned.status == 0 and "hf download org/lora" in planned.out


# ---------------------------------------------------------------- what is refused


def test_everything_that_is_refused_is_told_before_anything_comes(hub: Hub, terminal: Terminal) -> None:
    sound = {"config.json": b"{}", "model.safetensors": b"x"}
    hub.add("org/base", sound)
    hub.add("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    hub.add("org/gated", sound, gated=True)
    hub.add("org/private", sound, private=True)
    hub.add("org/lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})
    names = ("pickled", "gated", "private", "missing", "lora")
    chosen = [BASE, *experts(math="org/base", **{n: f"org/{n}" for n in names}), "experts.math.revision=v9"]
    reasons = [
        "experts.pickled: org/pickled@", "has only pickled weights (pytorch_model.bin), which can run code",
        "experts.gated: org/gated is gated, and this login has no access Accept the licence on the model's "
        "page at the hub, then `hf auth login`",
        "experts.private, experts.missing: there is no such folder, and the hub has no org/private, "
        "org/missing, or it is private",
        "experts.lora: org/lora@", "has no config.json, so it is not a model It is a LoRA: name it after",
        "experts.math: org/base has no revision 'v9'",
    ]  # fmt: skip
    done = terminal.run(*FETCH, *chosen)
    assert done.status == 2
    for reason in reasons:
        assert reason in done.err, (reason, done.err)
    assert done.err.count("✗") == 5
    assert hub.downloads() == [] and not terminal.cache.exists()

    looked = terminal.run(*FETCH, *chosen, "fetch.dry_run=true")
    assert looked.status == 0 and looked.err == ""
    for reason in [*reasons, "nothing was", hub.repos["org/base"].branches["main"][:12]]:
        assert reason in looked.out, (reason, looked.out)
    assert hub.downloads() == [] and not terminal.cache.exists()

    let = [BASE, *experts(math="org/gated", code="org/private", pickled="org/pickled"), "allow=[pickled]"]
    entered = terminal.run(*FETCH, *let, HF_TOKEN=READER)
    assert entered.status == 0, entered.err
    commit = hub.repos["org/pickled"].branches["main"]
    assert (snapshot(terminal, "org/pickled", commit) / "pytorch_model.bin").read_bytes() == b"x"


def test_a_disk_that_is_too_small(hub: Hub, terminal: Terminal) -> None:
    hub.add("org/base", {"config.json": b"{}", "model.safetensors": b"x" * 2000})
    small = "import shutil, types\nshutil.disk_usage = lambda _: types.SimpleNamespace(free=1999)"
    done = terminal.run(*FETCH, *ALONE, before=small)
    assert done.status == 2
    assert "HF_HOME" in done.err and "needs 2.0 kB, but only 2.0 kB are free" in done.err
    assert hub.downloads() == []
    assert terminal.run(*FETCH, *ALONE, "allow=[disk]", before=small).status == 0


def test_no_hub(hub: Hub, terminal: Terminal) -> None:
    hub.add("org/base", {"config.json": b"{}", "model.safetensors": b"x"})
    told = terminal.run(*FETCH, *ALONE, HF_HUB_OFFLINE="1")
    assert told.status == 2 and "HF_HUB_OFFLINE forbids asking the hub: org/base" in told.err
    assert hub.asked == []
    away = terminal.run(*FETCH, *ALONE, HF_ENDPOINT="http://127.0.0.1:9")
    assert away.status == 2 and "the hub does not answer: org/base" in away.err


def test_wrong_settings(mergelab: Command) -> None:
    out = mergelab("job=fetch", "fetch.workers=0", "eval=none")
    assert out.status == 2 and "fetch.workers: 0 is out of range; at least 1" in out.err
    unused = mergelab("fetch.dry_run=true", "job=plan", "model=qwen0_5b", "experts=math_code", "eval=none")
    assert unused.status == 2 and "fetch.dry_run" in unused.err and "the step fetch" in unused.err


def test_a_family_that_is_here_needs_nothing(mergelab: Command, family: Any) -> None:
    out = mergelab("job=fetch", "experts=single_math")
    assert out.status == 0, out.err
    assert "every model was here; the data of 8 tasks read" in out.out
    assert out.result["fetched"] == []


def test_a_data_set_that_does_not_come(mergelab: Command, family: Any, tmp_path: Path) -> None:
    task = {
        "task": "mine", "dataset_path": "org/nowhere", "output_type": "multiple_choice", "test_split": "test",
        "doc_to_text": "{{q}}", "doc_to_target": 0, "doc_to_choice": ["a", "b"],
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(json.dumps(task), encoding="utf-8")
    chosen = ["job=fetch", "experts=single_math", "eval=lm_eval", "eval.tasks=[mine]"]
    chosen.append(f"eval.include_path={tmp_path}/tasks")
    out = mergelab(*chosen)
    assert out.status == 1, out.err
    assert "task 'mine' cannot read its data, 'org/nowhere'" in out.err
    assert out.result["status"] == "failed"
    planned = mergelab(*chosen, "fetch.dry_run=true")
    assert planned.status == 0 and "The data of mine would be read, too." in planned.out
    without = mergelab(*chosen, "fetch.data=false")
    assert without.status == 0 and "every model was here " in without.out


# ---------------------------------------------------------------- how it goes on


def test_a_broken_connection_is_taken_up_again(hub: Hub, terminal: Terminal) -> None:
    weights = big(hub)
    hub.cut = CHUNK + 1000
    done = terminal.run(*FETCH, *ALONE)
    assert done.status == 0, done.err
    assert [r for path, r in hub.ranges if "model.safetensors" in path] == [None, f"bytes={CHUNK}-"]
    commit = hub.repos["org/base"].branches["main"]
    assert (snapshot(terminal, "org/base", commit) / "model.safetensors").read_bytes() == weights
    assert not list(terminal.cache.rglob("*.incomplete"))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_ended_command_is_gone_on_with_by_the_next(
    hub: Hub, terminal: Terminal, how: signal.Signals
) -> None:
    weights = big(hub)
    hub.cut, hub.hangs = 2 * CHUNK + 1000, threading.Event()
    process, _ = terminal.start(*FETCH, *ALONE)
    deadline = time.monotonic() + 60
    while sum(p.stat().st_size for p in terminal.cache.rglob("*.incomplete")) < 2 * CHUNK:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(how)
    time.sleep(0.1)
    hub.hangs.set()
    _, err = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "interrupted; what has been downloaded is kept" in err
        assert "Run the same command again: it resumes from there." in err
    commit = hub.repos["org/base"].branches["main"]
    assert not snapshot(terminal, "org/base", commit).exists()  # it does not pass for a model
    hub.ranges.clear()
    done = terminal.run(*FETCH, *ALONE)
    assert done.status == 0, done.err
    assert [r for path, r in hub.ranges if "model.safetensors" in path] == [f"bytes={2 * CHUNK}-"]
    assert done.result["fetched"][0]["downloaded"] == len(weights) - 2 * CHUNK + len(b"{}")
    assert (snapshot(terminal, "org/base", commit) / "model.safetensors").read_bytes() == weights


def test_a_hub_that_goes_away_half_way(hub: Hub, terminal: Terminal) -> None:
    hub.add("org/base", {"config.json": b"{}", "model.safetensors": b"x"})
    hub.down = "/resolve/"
    done = terminal.run(*FETCH, *ALONE)
    assert done.status == 1
    assert "org/base: model.safetensors: the hub answers with HTTP 503 (down for maintenance)" in done.err
    assert "Run the same command again" in done.err
    assert done.result["status"] == "failed"


def test_two_commands_do_not_fetch_the_same(hub: Hub, terminal: Terminal) -> None:
    hub.add("org/base", {"config.json": b"{}", "model.safetensors": b"x"})
    lock = terminal.cache / ".locks" / "models--org--base" / "mergelab.lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        done = terminal.run(*FETCH, *ALONE)
    assert done.status == 1
    assert "org/base: another command is fetching it Wait until it has finished." in done.err
    assert hub.downloads() == []


def test_what_is_damaged_in_the_cache_comes_again(hub: Hub, terminal: Terminal) -> None:
    weights = os.urandom(4000)
    commit = hub.add("org/base", {"config.json": b"{}", "model.safetensors": weights})
    blobs = terminal.cache / "models--org--base" / "blobs"
    blobs.mkdir(parents=True)
    begun = blobs / f"{sha256(weights)}.mergelab.incomplete"
    begun.write_bytes(b"not what the hub has")
    assert terminal.run(*FETCH, *ALONE).status == 0
    weights_here, config = (
        snapshot(terminal, "org/base", commit) / n for n in ("model.safetensors", "config.json")
    )
    assert weights_here.read_bytes() == weights and not begun.exists()
    assert [r for path, r in hub.ranges if "model.safetensors" in path] == ["bytes=20-", None]

    weights_here.resolve().write_bytes(weights[:100])
    config.resolve().write_bytes(b"")
    done = terminal.run(*FETCH, *ALONE)
    assert done.status == 0, done.err
    assert weights_here.read_bytes() == weights and config.read_bytes() == b"{}"
    assert (blobs / git_hash(b"{}")).read_bytes() == b"{}"


def test_what_comes_wrong_does_not_enter_the_cache(hub: Hub, terminal: Terminal) -> None:
    hub.add("org/base", {"config.json": b"{}", "model.safetensors": b"x" * 1000})
    hub.wrong = {"model.safetensors"}
    done = terminal.run(*FETCH, *ALONE)
    assert done.status == 1
    assert "org/base: model.safetensors: its sha256 differs from the one that the hub reports" in done.err
    assert not list(terminal.cache.rglob("*.safetensors"))
    assert not [p for p in (terminal.cache / "models--org--base").rglob("*") if p.is_file()]


# ---------------------------------------------------------------- what is chosen


def made_of(*names: str) -> Repository:
    return Repository("org/x", "0" * 40, tuple(File(n, 1, n, large=False) for n in names))


SAFE, PICKLED = (index for _, index in repository.FORMS)


def chosen(of: Repository, shards: Sequence[str], **need: bool) -> set[str]:
    return {f.name for f in repository.wanted(of, set(shards), Need(**need))}


def test_weights_come_once_whatever_else_a_repository_holds() -> None:
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    beside = ["config.json", "tokenizer.model", "merges.txt", "chat_template.jinja",
              "additional_chat_templates/tool.jinja"]  # fmt: skip
    others = ["model.safetensors", "consolidated.safetensors", "consolidated.safetensors.index.json", PICKLED,
              "pytorch_model.bin", "onnx/config.json", "x.gguf", ".gitattributes"]  # fmt: skip
    of = made_of(*shards, *beside, *others, SAFE, "modeling_x.py")
    for pickled in (False, True):
        assert repository.index(of, Need(pickled=pickled)) == SAFE
        assert chosen(of, shards, pickled=pickled) == {*shards, *beside, SAFE}
    assert chosen(of, shards, code=True) == {*shards, *beside, SAFE, "modeling_x.py"}
    assert repository.check(of, set(shards), "experts.x", Need()) == []


def test_pickled_weights_come_where_they_may_and_there_are_no_others() -> None:
    one = made_of("config.json", "pytorch_model.bin")
    assert chosen(one, [], pickled=True) == {"config.json", "pytorch_model.bin"}
    assert repository.check(one, set(), "experts.x", Need(pickled=True)) == []
    assert chosen(made_of("model.safetensors", "pytorch_model.bin"), [], pickled=True) == {
        "model.safetensors"
    }
    several = made_of("config.json", PICKLED, "a.bin", "b.bin")
    assert repository.index(several, Need(pickled=True)) == PICKLED
    assert chosen(several, ["a.bin", "b.bin"], pickled=True) == {"config.json", PICKLED, "a.bin", "b.bin"}


@pytest.mark.parametrize(
    ("names", "indexed", "need", "code", "says"),
    [
        (["model.safetensors"], [], Need(), "no-config", "no config.json, so it is not a model"),
        (["config.json", "x.gguf"], [], Need(), "no-weights", "it has x.gguf"),
        (["config.json", SAFE], ["a"], Need(), "missing-file", "lacks a, which its index names"),
        (["config.json", SAFE], [], Need(), "missing-file", "an index that names no file"),
        (["config.json", PICKLED, "pytorch_model-1.bin"], [], Need(), "pickled", "pytorch_model-1.bin"),
        (["config.json", "x.pt"], [], Need(pickled=True), "no-weights", "only pickled weights (x.pt)"),
        (
            ["adapter_config.json", "adapter_model.bin"],
            [],
            Need(adapter=True),
            "no-weights",
            "adapter_model.bin",
        ),
        (["config.json"], [], Need(adapter=True), "no-config", "no adapter_config.json, so it is not a LoRA"),
    ],
)
def test_what_a_repository_lacks(
    names: list[str], indexed: list[str], need: Need, code: str, says: str
) -> None:
    (found,) = repository.check(made_of(*names), set(indexed), "experts.x", need)
    assert found.code == code and found.place == "experts.x"
    assert says in found.message and "org/x@000000000000" in found.message
