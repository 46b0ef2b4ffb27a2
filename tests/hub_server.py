"""A hub on this machine: repositories with commits and branches, files by range, logins, gates, uploads.

It speaks as much of the hub's protocol as its client uses for models without Xet, over real HTTP.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from forks import Forks

LARGE = (".safetensors", ".bin", "tokenizer.json")
"""What is kept in large file storage."""

TOKEN = "hf_writer"
READER = "hf_reader"
"""A token that may only read."""


@cache
def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@cache
def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """A repository: for each commit its files, for each branch its commit."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        tree = [len(self.commits), sorted((name, git_hash(content)) for name, content in files.items())]
        sha = hashlib.sha1(str(tree).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def at(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]


@dataclass
class Hub:
    """The server's state, for a test to set up and to look into."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """Uploaded contents by their sha256."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of every request, paths without the query."""
    ranges: list[tuple[str, str | None]] = field(default_factory=list)
    """The path and the Range of every download."""
    cut: int = 0
    """The next download of a large file ends after so many bytes: with a broken connection,"""
    hangs: threading.Event | None = None
    """or where there is an event, in silence until it is set."""
    down: str = ""
    """Requests whose paths hold this are answered with 503."""
    wrong: set[str] = field(default_factory=set)
    """Names of files that are sent with one byte changed."""
    writers: set[str] = field(default_factory=lambda: {"me"})
    """Who may write with TOKEN: owners of repositories."""

    def add(self, name: str, files: Path | dict[str, bytes], **how: Any) -> str:
        """Put a repository there; returns its commit."""
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        repo = self.repos.setdefault(name, Repo(**how))
        return repo.commit(dict(files))

    def downloads(self, of: str = "") -> list[str]:
        """The paths of all files that were sent."""
        return [path for path, _ in self.ranges if of in path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, value: Any = None, **headers: str) -> None:
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        for key, text in headers.items():
            self.send_header(key.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            out = b""
            while size := int(self.rfile.readline(), 16):
                out += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @property
    def token(self) -> str | None:
        said = self.headers.get("Authorization", "")
        return said.removeprefix("Bearer ") or None

    def handle_any(self) -> None:
        path, _, query = self.path.partition("?")
        self.state.asked.append((self.command, path))
        content = self.body()
        if self.state.down and self.state.down in path:
            self.reply(503, {"error": "down for maintenance"})
            return
        parts = [unquote(p) for p in path.strip("/").split("/")]
        if parts == ["api", "whoami-v2"]:
            self.whoami()
        elif parts == ["api", "validate-yaml"]:
            self.reply(200, {"errors": [], "warnings": []})
        elif parts == ["api", "repos", "create"]:
            self.create(json.loads(content))
        elif parts[0] == "lfs":
            self.lfs(parts[1], content)
        elif parts[:2] == ["api", "models"]:
            self.model("/".join(parts[2:4]), parts[4:], content, "blobs" in query)
        elif parts[2:3] == ["resolve"]:
            self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        elif parts[2:] == ["info", "lfs", "objects", "batch"]:
            self.batch("/".join(parts[:2]).removesuffix(".git"), json.loads(content))
        else:
            self.reply(404, {"error": "no such page"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    # ------------------------------------------------------------ who may do what

    def whoami(self) -> None:
        if self.token not in (TOKEN, READER):
            self.reply(401, {"error": "Invalid user token"})
            return
        role = "write" if self.token == TOKEN else "read"
        access = {"auth": {"accessToken": {"displayName": "t", "role": role}}}
        self.reply(200, {"type": "user", "name": "me", "orgs": [{"name": "team"}], **access})

    def open(self, name: str) -> Repo | None:
        """The repository, if this token may see it."""
        repo = self.state.repos.get(name)
        if repo is None or (repo.private and self.token is None):
            self.reply(
                404 if self.token else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound"
            )
            return None
        return repo

    def may_write(self, name: str) -> bool:
        if self.token == TOKEN and name.split("/")[0] in self.state.writers:
            return True
        self.reply(403, {"error": f"You don't have the rights to write to {name}"})
        return False

    # ------------------------------------------------------------ reading

    def model(self, name: str, what: list[str], content: bytes, sizes: bool) -> None:
        repo = self.open(name)
        if repo is None:
            return
        match what:
            case ["auth-check"]:
                if repo.gated and self.token is None:
                    self.reply(403, {"error": "gated"}, X_Error_Code="GatedRepo")
                else:
                    self.reply(200, {})
            case [] | ["revision", _]:
                self.info(name, repo, what[1] if what else "main", sizes)
            case ["refs"]:
                at = [{"name": b, "ref": b, "targetCommit": c} for b, c in repo.branches.items()]
                self.reply(200, {"branches": at, "converts": [], "tags": []})
            case ["branch", branch] if self.may_write(name):
                if branch in repo.branches:
                    self.reply(409, {"error": "there already"})
                else:
                    repo.branches[branch] = repo.branches["main"]
                    self.reply(200, {})
            case ["preupload", branch] if self.may_write(name):
                self.preupload(repo, branch, json.loads(content))
            case ["commit", branch] if self.may_write(name):
                self.commit(name, repo, branch, content)

    def info(self, name: str, repo: Repo, revision: str, sizes: bool) -> None:
        sha = repo.at(revision)
        if sha is None:
            self.reply(404, {"error": "no revision"}, X_Error_Code="RevisionNotFound")
            return
        files = []
        for path, content in sorted(repo.commits[sha].items()):
            file: dict[str, Any] = {"rfilename": path}
            if sizes:
                file |= {"size": len(content), "blobId": git_hash(content)}
                if path.endswith(LARGE):
                    file["lfs"] = {"size": len(content), "sha256": sha256(content), "pointerSize": 130}
            files.append(file)
        told = {"id": name, "sha": sha, "private": repo.private, "gated": "manual" if repo.gated else False}
        self.reply(200, {**told, "siblings": files})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.open(name)
        if repo is None:
            return
        sha = repo.at(revision)
        content = repo.commits.get(sha or "", {}).get(path)
        if content is None:
            self.reply(404, {"error": "no file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha or "")
            return
        digest = sha256(content) if path.endswith(LARGE) else git_hash(content)
        start = 0
        if self.command == "GET":
            self.state.ranges.append((self.path, self.headers.get("Range")))
            if said := self.headers.get("Range"):
                start = int(said.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", sha or "")
        self.send_header("ETag", f'"{digest}"')
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.send(path, content, start)

    def send(self, path: str, content: bytes, start: int) -> None:
        if path in self.state.wrong:
            content = content[:-1] + bytes([content[-1] ^ 1])
        cut = self.state.cut if path.endswith(LARGE) else 0
        if not cut:
            self.wfile.write(content[start:])
            return
        self.state.cut = 0
        self.wfile.write(content[start : start + cut])
        self.wfile.flush()
        if self.state.hangs is not None:
            self.state.hangs.wait()
        self.close_connection = True

    # ------------------------------------------------------------ writing

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        if not self.may_write(name):
            return
        url = {"url": f"{self.state.url}/{name}"}
        if name in self.state.repos:
            self.reply(409, url)
            return
        repo = self.state.repos[name] = Repo(
            asked.get("visibility") == "private" or bool(asked.get("private"))
        )
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, message="initial commit")
        self.reply(200, url)

    def preupload(self, repo: Repo, branch: str, asked: dict[str, Any]) -> None:
        there = repo.files(branch)
        out = []
        for file in asked["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LARGE) else "regular"
            own = {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}
            if path in there:
                own["oid"] = (sha256 if mode == "lfs" else git_hash)(there[path])
            out.append(own)
        self.reply(200, {"files": out})

    def batch(self, name: str, asked: dict[str, Any]) -> None:
        if not self.may_write(name):
            return
        out = []
        for o in asked["objects"]:
            upload = {"upload": {"href": f"{self.state.url}/lfs/{o['oid']}"}}
            out.append({**o, **({} if o["oid"] in self.state.large else {"actions": upload})})
        self.reply(200, {"transfer": "basic", "objects": out})

    def lfs(self, oid: str, content: bytes) -> None:
        if sha256(content) != oid:
            self.reply(400, {"error": "wrong content"})
            return
        self.state.large[oid] = content
        self.reply(200, {})

    def commit(self, name: str, repo: Repo, branch: str, content: bytes) -> None:
        files = dict(repo.files(branch))
        message = ""
        for line in content.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.state.large[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        sha = repo.commit(files, branch, message)
        url = f"{self.state.url}/{name}/commit/{sha}"
        self.reply(200, {"success": True, "commitOid": sha, "commitUrl": url, "pullRequestUrl": None})


@contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server on a free port of this machine, for as long as it lasts; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(name="hub")
def hub_fixture() -> Iterator[Hub]:
    """A hub without repositories."""
    state = Hub()
    with served(type("Handler", (_Handler,), {"state": state})) as state.url:
        yield state
        if state.hangs is not None:
            state.hangs.set()


@dataclass
class Done:
    """What a command came to."""

    status: int
    out: str
    err: str
    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "result.json").read_text(encoding="utf-8")))


@dataclass
class Terminal:
    """Where commands are typed: one home of the hub's client for all, a process of its own for each,
    because the client reads its environment when it is imported."""

    place: Path
    hub: Hub
    forks: Forks
    count: int = 0

    @property
    def cache(self) -> Path:
        return self.place / "hf" / "hub"

    def environment(self, **more: str) -> dict[str, str]:
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith("HF_") and not k.lower().endswith("_proxy")
        }
        own = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.place / "hf"), "HF_HUB_DISABLE_XET": "1"}
        return {**kept, **own, **more}

    def start(self, *arguments: str, **environment: str) -> tuple[subprocess.Popen[str], Path]:
        """A command that has been started."""
        self.count += 1
        folder = self.place / f"typed{self.count}"
        typed = ["mergelab", *arguments, f"hydra.run.dir={folder}"]
        code = f"import sys\nsys.argv = {typed!r}\nfrom mergelab.cli.main import main\nmain()"
        process = subprocess.Popen(
            [sys.executable, "-c", code], env=self.environment(**environment), cwd=self.place,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        return process, folder

    def run(self, *arguments: str, before: str = "", **environment: str) -> Done:
        """A command to its end; what it says comes with every space and line end as one space."""
        self.count += 1
        folder = self.place / f"typed{self.count}"
        files = [self.place / f"typed{self.count}.{end}" for end in ("out", "err")]
        typed = [str(self.place), before, *arguments, f"hydra.run.dir={folder}"]
        status = self.forks.start(typed, self.environment(**environment), *files).wait(100)
        out, err = (f.read_text(encoding="utf-8") for f in files)
        assert "Traceback" not in out + err, out + err
        return Done(status, " ".join(out.split()), " ".join(err.split()), folder)


@pytest.fixture(name="terminal")
def terminal_fixture(tmp_path: Path, hub: Hub, warm: Forks) -> Terminal:
    """A terminal at a folder of its own, in which there is a folder `here`."""
    (tmp_path / "here").mkdir()
    return Terminal(tmp_path, hub, warm)
