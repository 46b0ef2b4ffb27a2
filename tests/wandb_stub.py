"""A W&B server on loopback: enough of its API for one run to be recorded and read back.

It keeps what it is told, in memory: `runs` (what UpsertBucket said, by run id), `rows` (the history
lines; `histories` has them by run id), `summary` (`summaries`), `uploads` (files, by name), every
request's path in `requests`, and in `resumed` the runs that a client went on with.
`stop()` frees the port and cuts every open connection, as a server does that dies.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef" * 2 + "01234567"
"""An API key of the right shape: the client refuses any that has not 40 characters."""


class Stub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.rows: list[dict[str, Any]] = []
        self.histories: dict[str, list[dict[str, Any]]] = {}
        self.summary: dict[str, Any] = {}
        self.summaries: dict[str, dict[str, Any]] = {}
        self.resumed: list[str] = []
        self.uploads: dict[str, bytes] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.exit_codes: list[int] = []
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._open.add(connection)
        return connection, address

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in self._open:
            with suppress(OSError):  # the other side was first
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: clients end, and connections are cut, in the middle of anything."""

    def graphql(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        """The `data` of the answer to one GraphQL request."""
        operation = query.split("(")[0].split("{")[0].split()[-1]
        self.requests.append(operation)
        given = given.get("input", given)
        if operation == "UpsertBucket":
            self.runs.setdefault(given["name"], {}).update({k: v for k, v in given.items() if v is not None})
            entity = {"id": "e", "name": given.get("entity") or "tester"}
            project = {"id": "p", "name": given.get("project"), "entity": entity}
            bucket = {"id": "b", "name": given["name"], "displayName": given.get("displayName")}
            bucket |= {"project": project, "config": given.get("config"), "historyLineCount": 0}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "Viewer":
            viewer = {"id": "u", "entity": "tester", "username": "tester", "email": "t@example.org"}
            return {"viewer": {**viewer, "flags": "{}", "teams": {"edges": []}}}
        if operation == "RunResumeStatus" and given["name"] in self.runs:
            run, rows = self.runs[given["name"]], self.histories.get(given["name"], [])
            self.resumed.append(given["name"])
            bucket = {"id": "b", "name": given["name"], "displayName": run.get("displayName"), "tags": [],
                      "summaryMetrics": "{}", "config": "{}", "wandbConfig": "{}", "eventsTail": "[]",
                      "historyTail": json.dumps([json.dumps(r) for r in rows[-1:]]), "logLineCount": 0,
                      "historyLineCount": len(rows), "eventsLineCount": 0}  # fmt: skip
            entity = {"id": "e", "name": "tester"}
            return {"model": {"id": "p", "name": given.get("project"), "entity": entity, "bucket": bucket}}
        if operation in ("RunResumeStatus", "ArtifactType"):
            return {"model": None, "project": None}  # nothing of that name yet
        if operation == "CreateRunFiles":
            files = [{"name": n, "uploadUrl": f"{self.url}/put/{n}"} for n in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if operation == "CreateArtifact":
            self.artifacts.append(given)
            artifact = {"id": "a", "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        if operation == "CreateArtifactManifest":
            file = {"id": "f", "uploadUrl": f"{self.url}/put/manifest", "uploadHeaders": []}
            return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}
        if operation == "CreateArtifactFiles":
            edges = []
            for file in given["artifactFiles"]:
                url = f"{self.url}/put/{file['name']}"
                node = {"storagePath": file["name"], "uploadUrl": url, "uploadHeaders": []}
                edges.append({"node": {**node, "artifact": {"id": "a"}}})
            return {"createArtifactFiles": {"files": {"edges": edges}}}
        if operation == "CommitArtifact":
            return {"commitArtifact": {"artifact": {"id": "a", "digest": "d"}}}
        return {}

    def file_stream(self, run: str, sent: dict[str, Any]) -> None:
        files = sent.get("files", {})
        for line in files.get("wandb-history.jsonl", {}).get("content", []):
            self.rows.append(json.loads(line))
            self.histories.setdefault(run, []).append(json.loads(line))
        for line in files.get("wandb-summary.json", {}).get("content", []):
            self.summary.update(json.loads(line))
            self.summaries.setdefault(run, {}).update(json.loads(line))
        if sent.get("complete"):
            self.exit_codes.append(sent.get("exitcode", 0))


class _Handler(BaseHTTPRequestHandler):
    server: Stub
    protocol_version = "HTTP/1.1"

    def _answer(self, body: dict[str, Any] | None = None) -> None:
        data = json.dumps(body or {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            sent = json.loads(body)
            self._answer({"data": self.server.graphql(sent["query"], sent.get("variables") or {})})
            return
        self.server.requests.append(self.path)
        if self.path.endswith("/file_stream"):
            self.server.file_stream(self.path.split("/")[-2], json.loads(body))
        self._answer()

    def do_PUT(self) -> None:
        self.server.uploads[self.path.removeprefix("/put/")] = self._body()
        self._answer()

    def log_message(self, *args: Any) -> None:
        """Nothing: a test's output is its own."""


@contextmanager
def serve() -> Iterator[Stub]:
    stub = Stub()
    try:
        yield stub
    finally:
        stub.stop()
