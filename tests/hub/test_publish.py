"""job=publish: what goes to a hub on this machine, what never does, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Command, Outcome
from hub_server import (
    READER,
    TOKEN,
    Hub,
    Terminal,
    hub_fixture,  # noqa: F401 (a fixture)
    terminal_fixture,  # noqa: F401 (a fixture)
)
from safetensors.torch import load_file, save_file

CARD = "---\nlicense: apache-2.0\nbase_model: [org/base]\ntags: [merge]\n---\n# Mine\n"


@pytest.fixture
def model(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A random model with a card."""
    folder = make_model(tmp_path / "mine")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


Publish = Callable[..., Outcome]


@pytest.fixture
def publish(hub: Hub, mergelab: Command, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """`publish(folder, ...)` in this process. The hub's client has read its environment already, so what
    it has read is changed; what it says comes with every space and line end as one space."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    def run(path: Path, *more: str, token: str = TOKEN, repo: str = "me/merged") -> Outcome:
        monkeypatch.setenv("HF_TOKEN", token)
        done = mergelab("job=publish", f"publish.path={path}", f"publish.repo={repo}", *more)
        return replace(done, out=" ".join(done.out.split()), err=" ".join(done.err.split()))

    return run


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def sent(hub: Hub) -> int:
    """How many large files have been sent."""
    return sum(method == "PUT" for method, _ in hub.asked)


# ---------------------------------------------------------------- what goes


def test_a_merged_model_goes_as_it_is_and_only_changes_go_again(
    hub: Hub, terminal: Terminal, mergelab: Command, publish: Publish
) -> None:
    merged = mergelab("experts=math_code", "eval=none")
    assert merged.status == 0, merged.err
    run, model = merged.folder, merged.folder / "model"
    own = content(model)
    for name in (".journal.jsonl", ".lock", "model.lock", ".cache/huggingface/x.json"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("never", encoding="utf-8")
    first = ("job=publish", f"publish.path={run}", "publish.repo=me/merged", "publish.message=first")
    done = terminal.run(*first, HF_TOKEN=TOKEN)
    assert done.status == 0, done.err
    repo = hub.repos["me/merged"]
    assert repo.files() == {**own, ".gitattributes": repo.files()[".gitattributes"]}
    assert repo.private and repo.messages == ["initial commit", "first"]
    commit = repo.branches["main"]
    assert f"{hub.url}/me/merged " in done.out and commit[:12] in done.out
    size = sum(len(c) for c in own.values())
    assert done.result["published"] == {
        "repo": "me/merged", "revision": None, "commit": commit, "url": f"{hub.url}/me/merged",
        "files": len(own), "bytes": size,
    }  # fmt: skip
    assert done.result["check"]["problems"] == []
    assert sent(hub) == 2  # model.safetensors and tokenizer.json

    again = publish(model)
    assert again.status == 0, again.err
    assert f"me/merged has this very model already, at {commit[:12]}" in again.out
    assert again.result["published"]["commit"] == commit
    assert repo.branches["main"] == commit and sent(hub) == 2

    (model / "README.md").write_text(CARD, encoding="utf-8")
    other = publish(model)
    assert other.status == 0, other.err
    assert repo.branches["main"] != commit and sent(hub) == 2
    changed = {n for n, c in repo.files().items() if repo.commits[commit].get(n) != c}
    assert changed == {"README.md"}
    assert repo.messages[-1] == "model, by mergelab"

    chosen = ["model.base.path=me/merged", "experts=single_math", "experts.math.path=./here", "eval=none"]
    back = terminal.run("job=fetch", *chosen, HF_TOKEN=TOKEN)
    assert back.status == 0, back.err
    place = terminal.cache / "models--me--merged" / "snapshots" / repo.branches["main"]
    assert content(place) == {n: c for n, c in content(model).items() if n in own and n != "README.md"}


def test_a_branch_that_is_made_holds_this_model_and_no_other(hub: Hub, publish: Publish, model: Path) -> None:
    old = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}",
           "tokenizer.model": b"x", "notes.txt": b"mine"}  # fmt: skip
    main = hub.add("me/merged", old)
    looked = publish(model, "publish.revision=v2", "publish.dry_run=true", token="")
    gone = "model-00001-of-00002.safetensors, model.safetensors.index.json, tokenizer.model"
    assert looked.status == 0, looked.err
    for part in (
        "is there, public",
        "! me/merged is there and public",
        "branch v2, which would be made",
        gone,
    ):
        assert part in looked.out, (part, looked.out)
    assert hub.repos["me/merged"].branches == {"main": main}

    done = publish(model, "publish.revision=v2", "hardware=slurm_1gpu")  # which has a GPU, and this has none
    assert done.status == 0, done.err
    repo = hub.repos["me/merged"]
    assert repo.branches["main"] == main
    assert repo.files("v2") == {**content(model), "notes.txt": b"mine"}
    assert done.result["published"]["url"] == f"{hub.url}/me/merged/tree/v2"


def test_an_upload_that_failed_goes_on(hub: Hub, publish: Publish, model: Path) -> None:
    hub.down = "/commit/"
    done = publish(model)
    assert done.status == 1
    assert "me/merged: the hub answers with HTTP 503 (down for maintenance)" in done.err
    assert "what has arrived is not sent again" in done.err
    assert done.result["status"] == "failed"
    assert sent(hub) == 2 and list(hub.repos["me/merged"].files()) == [".gitattributes"]
    hub.down = ""
    assert publish(model).status == 0
    assert sent(hub) == 2
    assert hub.repos["me/merged"].files().keys() >= content(model).keys()


# ---------------------------------------------------------------- what is only looked at


def test_a_dry_run_lists_exactly_what_would_go_and_needs_nobody(mergelab: Command, model: Path) -> None:
    (model / ".lock").write_text("never", encoding="utf-8")
    out = mergelab(
        "job=publish", f"publish.path={model}", "publish.repo=me/merged", "publish.dry_run=true",
        "publish.private=false",
    )  # fmt: skip
    assert out.status == 0, out.err
    for path in model.iterdir():
        assert (path.name in out.out) == (path.name != ".lock"), path
    said = " ".join(out.out.split())
    for part in (
        "me/merged whether it is there could not be asked: HF_HUB_OFFLINE forbids", "license apache-2.0",
        "base_model org/base", "tags merge", "nothing was sent",
    ):  # fmt: skip
        assert part in said, (part, said)
    assert "published" not in out.result


# ---------------------------------------------------------------- what is refused


def test_what_is_wrong_is_told_at_once(mergelab: Command, model: Path, tmp_path: Path) -> None:
    out = mergelab("job=publish")
    assert out.status == 2 and out.err.count("✗") == 2
    assert "publish.repo: it is not set" in out.err and "publish.path: it is not set" in out.err
    for repo, says in (
        ("merged", "owner/name"),
        ("a/b/c", "owner/name"),
        ("me/a..b", "--"),
        ("me/x!", "alphanumeric"),
    ):
        out = mergelab("job=publish", f"publish.path={model}", f"publish.repo='{repo}'")
        assert out.status == 2 and "publish.repo: " in out.err and says in out.err, out.err
    wrong = ("publish.repo=me/x", "publish.message=''", f"publish.revision={'ab' * 20}")
    out = mergelab("job=publish", f"publish.path={tmp_path}/no", *wrong)
    assert f"publish.revision: '{'ab' * 20}' is not a branch; null is main" in out.err
    assert (
        "publish.path: " in out.err
        and "is not a folder" in out.err
        and "publish.message: it is empty" in out.err
    )


def test_a_model_without_a_sound_card(mergelab: Command, model: Path) -> None:
    arguments = ("job=publish", f"publish.path={model}", "publish.repo=me/x", "publish.dry_run=true")
    (model / "README.md").write_text("---\nlicense: [\n---\n# Mine\n", encoding="utf-8")
    out = mergelab(*arguments)
    assert out.status == 2 and f"the front matter of {model}/README.md cannot be read" in out.err
    (model / "README.md").unlink()
    out = mergelab(*arguments)
    assert out.status == 2 and f"{model} has no card, README.md" in out.err


def test_a_run_that_has_not_finished(mergelab: Command, model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    model.rename(run / "model")
    record = {"status": "failed", "error": {"step": "evaluate", "reason": "x"}}
    (run / "result.json").write_text(json.dumps(record), encoding="utf-8")
    more = ("publish.repo=me/x", "publish.dry_run=true")
    out = mergelab("job=publish", f"publish.path={run}", *more)
    assert out.status == 2
    assert f"{run} holds a run that is failed at evaluate; finish it, or name {run}/model itself" in out.err
    assert mergelab("job=publish", f"publish.path={run}/model", *more).status == 0


@pytest.mark.parametrize(
    ("token", "repo", "says"),
    [
        (
            "",
            "me/merged",
            "you are not logged in to the hub Log in with a token that has write access: hf auth login, or",
        ),
        ("hf_unknown", "me/merged", "the hub rejects this login"),
        (READER, "me/merged", "the token of me is read-only"),
        (
            TOKEN,
            "other/merged",
            "other/merged does not exist, and me cannot create it This login may create ",
        ),
    ],
)
def test_a_login_that_will_not_do_is_told_before_the_check(
    hub: Hub, publish: Publish, model: Path, token: str, repo: str, says: str
) -> None:
    done = publish(model, token=token, repo=repo)
    assert done.status == 2 and f"publish.repo: {says}" in done.err, done.err
    assert hub.repos == {} and "check" not in done.result


def test_no_hub_to_publish_to(terminal: Terminal, model: Path) -> None:
    arguments = ("job=publish", f"publish.path={model}", "publish.repo=me/x")
    away = terminal.run(*arguments, HF_TOKEN=TOKEN, HF_ENDPOINT="http://127.0.0.1:9")
    assert away.status == 2 and "me/x exists: the hub does not answer" in away.err
    told = terminal.run(*arguments, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")
    assert told.status == 2 and "HF_HUB_OFFLINE forbids reaching the hub; unset it" in told.err


def test_nobody_writes_where_only_others_may(hub: Hub, publish: Publish, model: Path) -> None:
    hub.add("team/merged", {"notes.txt": b"theirs"})
    done = publish(model, repo="team/merged")
    assert done.status == 1
    assert "team/merged: this login has no write access: the hub answers with HTTP 403" in done.err
    assert "You don't have the rights to write to team/merged" in done.err and "hf auth login" in done.err
    assert hub.repos["team/merged"].files() == {"notes.txt": b"theirs"}


def test_a_model_that_is_not_sound_goes_nowhere(hub: Hub, publish: Publish, model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    done = publish(model)
    assert done.status == 1
    assert "is not sound, and was not sent: model.norm.weight has 1 entry that is NaN" in done.err
    assert hub.repos == {} and done.result["check"]["problems"]
