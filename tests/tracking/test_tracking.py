"""tracking.py against the real W&B client: offline files are read back, online runs are recorded
by a server on loopback (`wandb_stub`). What a dead or silent server costs is asserted as behaviour,
never as time."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import wandb
import wandb_stub
from wandb_files import read_back
from wandb_stub import KEY, Stub

from mergelab.core.errors import InputError, StepError
from mergelab.schema import Tracking
from mergelab.tracking import wandb_mode, wandb_run
from mergelab.tracking.secrets import scrub
from mergelab.tracking.tracker import findings, track

WANDB = Tracking(name="wandb", project="merges", group="sweep-1", tags=["tiny"], timeout=2.0)
CONFIG = {"seed": 7, "experts": {"math": {"weight": 0.4, "density": [0.3, 0.5]}}}
HF = "hf_plantedPlantedPlanted"


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No account, no settings, no proxy: W&B as on a new machine, and all it writes in tmp_path."""
    for name in list(os.environ):
        if name.startswith("WANDB_") or name.lower().endswith("_proxy") or name == "HF_TOKEN":
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    wandb.teardown()  # the client reads the environment once, and keeps it


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("merge_method: ties\n")
    return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    with wandb_stub.serve() as stub:
        monkeypatch.setenv("WANDB_BASE_URL", stub.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield stub


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the project's log got to hear: LEVEL message. (W&B's own goes to W&B's own files.)"""
    caplog.set_level(logging.INFO, logger="mergelab.tracking")
    return lambda: [
        f"{r.levelname} {r.getMessage()}" for r in caplog.records if r.name.startswith("mergelab.tracking")
    ]


def record(settings: Tracking, folder: Path, config: dict[str, Any] = CONFIG, **names: Any) -> None:
    """One run, as the entrypoint records it."""
    with track(settings, config, folder, name="ties-tiny", **names) as tracker:
        tracker.log({"loss": 3.0}, step=1)
        tracker.log({"loss": 1.0}, step=0)  # late: a sweep that goes on repeats what it knows
        tracker.table("population", ["genome", "fitness"], [["a", 0.25], [None, "none"]])
        tracker.log({"loss": 2.0}, step=2)
        tracker.file(folder / "recipe.yaml", "recipe")
        tracker.summary({"fitness": 0.5})


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


# ---------------------------------------------------------------- the two ways of recording


def only_finding(settings: Tracking) -> tuple[str, str]:
    """The key and the message of the one thing that is wrong."""
    (found,) = findings(settings)
    return found.place, found.message


def test_offline_run_holds_config_metrics_table_and_recipe(folder: Path) -> None:
    offline = Tracking(**{**vars(WANDB), "mode": "offline"})
    record(offline, folder, job_type="candidate", run_id="abc123")
    run = only(folder, "wandb/offline-run-*-abc123")
    state, records = read_back(run)
    assert (state["state"], state["exit_code"], state["project"]) == ("finished", 0, "merges")
    assert state["config"] == CONFIG
    assert state["summary"]["fitness"] == 0.5
    items = [r["history"]["item"] for r in records if r["type"] == "history"]
    assert [(i["step"], i["loss"]) for i in items if "loss" in i] == [(1, 3.0), (0, 1.0), (2, 2.0)]
    assert any(r.get("metric", {}).get("step_metric") == "step" for r in records)
    begun = next(r["run"] for r in records if r["type"] == "run")
    assert (begun["display_name"], begun["run_group"]) == ("ties-tiny", "sweep-1")
    assert (begun["job_type"], begun["tags"]) == ("candidate", ["tiny"])
    table = json.loads(only(run, "files/media/table/population*.json").read_text())
    assert table["columns"] == ["genome", "fitness"]
    assert table["data"] == [["a", 0.25], [None, "none"]]
    artifacts = {r["artifact"]["name"]: r["artifact"] for r in records if r["type"] == "artifact"}
    (entry,) = artifacts["recipe-abc123"]["manifest"]["contents"]
    assert entry["local_path"] == str(folder / "recipe.yaml")  # where it lies, not a copy
    (staged,) = artifacts["run-abc123-population"]["manifest"]["contents"]
    assert Path(staged["local_path"]).is_relative_to(folder / "wandb")
    assert "WANDB_DATA_DIR" not in os.environ


def test_online_run_arrives(
    folder: Path, server: Stub, said: Callable[[], list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    record(WANDB, folder, run_id="abc123")
    run = server.runs["abc123"]
    config = {k: v["value"] for k, v in json.loads(run["config"]).items() if k != "_wandb"}
    assert config == CONFIG
    assert (run["project"], run["groupName"], run["tags"]) == ("merges", "sweep-1", ["tiny"])
    assert run["displayName"] == "ties-tiny"
    losses = [(row["step"], row["loss"]) for row in server.rows if "loss" in row]
    assert losses == [(1, 3.0), (0, 1.0), (2, 2.0)]
    assert server.summary["fitness"] == 0.5
    assert server.uploads["recipe.yaml"] == b"merge_method: ties\n"
    assert json.loads(server.uploads["population.table.json"])["data"][0] == ["a", 0.25]
    assert server.exit_codes == [0]
    (line,) = said()
    assert line.startswith("INFO recording to W&B: http://127.0.0.1:")
    assert capfd.readouterr() == ("", "")


def test_failure_is_recorded_and_passes_through(folder: Path, server: Stub) -> None:
    with pytest.raises(StepError), track(WANDB, CONFIG, folder, name="x") as tracker:
        tracker.log({"loss": 1.0})
        raise StepError("disk full")
    assert server.exit_codes == [StepError.exit_status]


def test_calls_after_finish_do_nothing(folder: Path, server: Stub) -> None:
    with track(WANDB, CONFIG, folder, name="x") as tracker:
        tracker.finish(3)
        tracker.log({"loss": 1.0})
        tracker.finish(0)
    assert (server.exit_codes, server.rows) == ([3], [])


def test_two_runs_at_once_are_two_records(folder: Path, server: Stub) -> None:
    with track(WANDB, {}, folder, name="sweep", run_id="parent") as parent:
        with track(WANDB, {}, folder, name="candidate", run_id="child") as child:
            child.log({"fitness": 0.25})
        parent.log({"best": 0.75})
    assert server.runs.keys() == {"parent", "child"}
    values = [row.get("fitness", row.get("best")) for row in server.rows]
    assert values == [0.25, 0.75]


def test_large_things_are_recorded_by_address(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_run, "UPLOAD_LIMIT", 3)
    (folder / "model").mkdir()
    (folder / "model" / "w.safetensors").write_bytes(b"12")
    with track(Tracking(name="wandb", mode="offline"), {}, folder, name="x") as tracker:
        tracker.file(folder / "recipe.yaml", "recipe")
        tracker.file(folder / "model", "model")
    _, records = read_back(only(folder, "wandb/offline-run-*"))
    entries = [e for r in records if "artifact" in r for e in r["artifact"]["manifest"]["contents"]]
    files = [folder / "recipe.yaml", folder / "model" / "w.safetensors"]
    assert [e["ref"] for e in entries] == [f.as_uri() for f in files]


def test_none_does_nothing(folder: Path) -> None:
    record(Tracking(name="none"), folder)
    assert [p.name for p in folder.iterdir()] == ["recipe.yaml"]


def test_wandb_is_imported_only_to_be_used(folder: Path) -> None:
    code = """
        import pathlib, sys
        from mergelab.schema import Tracking
        from mergelab.tracking.tracker import findings, track
        assert list(findings(Tracking())) == []
        with track(Tracking(), {}, pathlib.Path(sys.argv[1]), name="x") as tracker:
            tracker.log({"a": 1.0})
        assert "wandb" not in sys.modules
    """
    done = run_python(code, str(folder))
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- online or offline


def test_auto_without_a_key_is_offline(
    folder: Path, server: Stub, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    record(WANDB, folder)
    run = only(folder, "wandb/offline-run-*")
    assert server.requests == []
    (line,) = said()
    assert "offline: no API key for 127.0.0.1" in line and f"`wandb sync {run}`" in line


def test_auto_takes_the_key_of_the_servers_host_from_netrc(
    folder: Path, server: Stub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    host = server.url.removeprefix("http://")
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine elsewhere.org\n  login user\n  password {KEY}\n")
    assert not wandb_mode.has_key(server.url)
    netrc.write_text(f"machine {host}\n  login user\n  password {KEY}\n")
    record(WANDB, folder)
    assert len(server.runs) == 1


def test_unreachable_server_is_tried_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tried = []
    connect = socket.create_connection

    def counted(address: Any, **options: Any) -> socket.socket:
        tried.append(address)
        return connect(address, **options)

    monkeypatch.setattr(socket, "create_connection", counted)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    record(WANDB, folder)
    assert tried == [("127.0.0.1", port)]
    assert not list(folder.glob("wandb/run-*")), "the client was never told to go online"
    state, _ = read_back(only(folder, "wandb/offline-run-*"))
    assert state["summary"]["fitness"] == 0.5
    (line,) = said()
    assert f"127.0.0.1:{port} does not answer" in line


def test_server_that_never_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    """It takes connections, so only the client's own time limit ends the attempt."""
    accepted = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    accepted.append(listener.accept())
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        record(Tracking(name="wandb", timeout=0.5), folder)
        assert 1 <= len(accepted) <= 5
    state, _ = read_back(only(folder, "wandb/offline-run-*"))
    assert state["summary"]["fitness"] == 0.5
    (line,) = said()
    assert "offline: the server did not take the run (CommError" in line


def test_proxy_is_asked_instead_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        port = proxy.getsockname()[1]
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        assert wandb_mode.accepts_connections("https://wandb.invalid", 2.0)
    assert not wandb_mode.accepts_connections("https://wandb.invalid", 2.0)


@pytest.mark.parametrize(("said_by_user", "runs"), [("offline", 1), ("disabled", 0)])
def test_wandb_mode_is_respected(
    said_by_user: str, runs: int, folder: Path, server: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", said_by_user)
    record(Tracking(name="wandb", mode="online"), folder)
    assert len(list(folder.glob("wandb/offline-run-*"))) == runs
    assert server.requests == []


def test_project_and_name_of_the_environment(
    folder: Path, server: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_NAME", "their name")
    record(Tracking(name="wandb"), folder, run_id="a")
    record(WANDB, folder, run_id="b")
    assert [run["project"] for run in server.runs.values()] == ["theirs", "merges"]
    assert [run["displayName"] for run in server.runs.values()] == ["their name"] * 2


# ---------------------------------------------------------------- W&B fails while the run goes on


def test_server_dies_in_the_middle(folder: Path) -> None:
    """In a process of its own, to see what it leaves when it ends."""
    code = """
        import json, logging, os, pathlib, sys, wandb_stub
        from mergelab.schema import Tracking
        from mergelab.tracking.tracker import track
        logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
        folder = pathlib.Path(sys.argv[1])
        with wandb_stub.serve() as server:
            os.environ |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": wandb_stub.KEY}
            with track(Tracking(name="wandb", timeout=0.5), {}, folder, name="x") as tracker:
                tracker.log({"loss": 3.0}, step=0)
                server.stop()
                tracker.log({"loss": 1.0}, step=1)
                tracker.summary({"fitness": 0.5})
                tracker.file(folder / "recipe.yaml", "recipe")  # its thread waits for the server
                (folder / "result.json").write_text("{}")
        print("begun", *server.runs)
    """
    done = run_python(code, str(folder))
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "result.json").read_text() == "{}"
    run = only(folder, "wandb/run-*")
    warning, begun = done.stdout.splitlines()
    assert begun == f"begun {run.name.split('-')[-1]}"
    assert warning.startswith("WARNING:mergelab.tracking.wandb_run:W&B failed (")
    assert warning.endswith(f"try `wandb sync {run}` later")
    state, _ = read_back(run)
    assert (state["summary"]["loss"], state["summary"]["fitness"]) == (1.0, 0.5)


def test_client_dies_in_the_middle(folder: Path) -> None:
    """In a process of its own, for the client does not recover from it."""
    code = """
        import logging, pathlib, psutil, sys
        from mergelab.schema import Tracking
        from mergelab.tracking.tracker import track
        logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
        folder = pathlib.Path(sys.argv[1])
        with track(Tracking(name="wandb", mode="offline"), {}, folder, name="x") as tracker:
            (core,) = [c for c in psutil.Process().children() if "wandb-core" in c.name()]
            core.kill()
            core.wait()
            tracker.log({"loss": 1.0})
            tracker.table("t", ["a"], [[1]])
            tracker.summary({"fitness": 0.5})
        print("result")
    """
    done = run_python(code, str(folder))
    assert done.returncode == 0
    warning, result = done.stdout.splitlines()
    assert warning.startswith("WARNING:mergelab.tracking.wandb_run:W&B failed (")
    assert result == "result"


def test_calls_do_not_wait_for_wandb(folder: Path, said: Callable[[], list[str]]) -> None:
    class Stuck:
        """A run whose server has gone: its calls take their time."""

        id, dir, url = "abc123", str(folder / "wandb" / "run-abc123" / "files"), "http://localhost/abc123"
        released = threading.Event()
        done: ClassVar[list[object]] = []

        def log(self, row: dict[str, float]) -> None:
            self.released.wait(20)
            self.done.append(row)

        def finish(self, exit_code: int) -> None:
            self.done.append(exit_code)

    run = Stuck()
    tracker = wandb_run.WandbRun(run, patience=0.05, mode="online")
    tracker.log({"loss": 1.0})
    tracker.finish(0)
    assert run.done == []
    (warning,) = said()
    assert "not done after 0.05 s" in warning and "`wandb sync" in warning
    run.released.set()
    tracker._thread.join()
    assert run.done == [{"loss": 1.0}, 0]


def test_settings_that_wandb_refuses_do_not_end_a_run(folder: Path, said: Callable[[], list[str]]) -> None:
    record(Tracking(name="wandb", mode="offline", project="a/b"), folder)
    (line,) = said()
    assert line.startswith("WARNING nothing is recorded in W&B: UsageError: Invalid project name 'a/b'")


# ---------------------------------------------------------------- secrets


@pytest.mark.parametrize("mode", ["auto", "offline"])
def test_no_secret_in_any_file_or_upload(
    mode: str, folder: Path, server: Stub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", HF)
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "correct horse")
    monkeypatch.setattr(sys, "argv", ["mergelab", f"+hub.token={HF}", "planted-argument"])
    config = {
        "model": {"path": f"https://user:{HF}@hub.example/marker-path", "apiKey": "named-secret"},
        "tokens": ["listed-secret"],
        "note": f"the key is {KEY}",
    }
    settings = Tracking(name="wandb", mode=mode, timeout=2.0, group=HF, tags=[KEY])
    with track(settings, config, folder, name=f"x {HF}") as tracker:
        tracker.table("t", ["a"], [[f"correct horse {KEY}"], ["marker-cell"]])
        tracker.summary({"command": f"login {KEY}", "digest": "marker-summary"})
    wandb.teardown()
    files = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    sent = [repr((server.runs, server.rows, server.summary, server.artifacts)).encode()]
    everything = b"\n".join([*files, *sent, *server.uploads.values()])
    for shown in ("marker-path", "marker-cell", "marker-summary", "[removed]"):
        assert shown.encode() in everything
    planted = [KEY, HF, "named-secret", "listed-secret", "correct horse", "planted-argument"]
    assert [secret for secret in planted if secret.encode() in everything] == []


def test_scrub_tells_secrets_from_namesakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", "short")  # too short to be one, and to be looked for
    secret = ("token", "api_key", "APIKey", "hfToken", "HF_TOKEN", "db-password", "clientSecrets")
    monkeypatch.setenv("SSL_KEY_FOLDER", "/home/somebody")
    harmless = ("tokenizer", "monkey", "keyboard", "chat_template", "secretary", "max_length")
    assert scrub(dict.fromkeys(secret, "x")) == dict.fromkeys(secret, "[removed]")
    assert scrub(dict.fromkeys(harmless, "x")) == dict.fromkeys(harmless, "x")
    kept = {
        "path": "/home/somebody/x",
        "max_tokens": 512,
        "num_key_value_heads": 2,
        "token": None,
        "a": (1, [True, "short"]),
    }
    assert scrub(kept) == {**kept, "a": [1, [True, "short"]]}
    assert scrub({"key": "digest", "x": Path("/a") / KEY}, by_name=False) == {
        "key": "digest",
        "x": "/a/[removed]",
    }


# ---------------------------------------------------------------- preflight


def test_what_wandb_refuses_is_found_before_a_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(findings(Tracking())) == []
    assert list(findings(WANDB)) == []
    key, message = only_finding(Tracking(name="wandb", project="a/b"))
    assert key == "tracking" and "Invalid project name 'a/b'" in message
    key, message = only_finding(Tracking(name="wandb", tags=["x" * 65]))
    assert key == "tracking" and "65 characters" in message


def test_online_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    online = Tracking(name="wandb", mode="online")
    key, message = only_finding(online)
    assert key == "tracking.mode" and "no API key for" in message and "WANDB_API_KEY" in message
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert list(findings(online)) == []


def test_wandb_missing_is_a_problem(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    key, message = only_finding(WANDB)
    assert key == "tracking.name" and "pip install wandb" in message
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)


def test_unknown_tracking_is_refused_at_the_start(folder: Path) -> None:
    with pytest.raises(InputError, match=r"tracking\.name: 'mlflow' is none of none, wandb"):
        record(Tracking(name="mlflow"), folder)
