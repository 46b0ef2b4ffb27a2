"""Processes that start at once: forks of one that has imported everything, which takes longer than they do.

A script of its own (`warm_search.py`, `warm_command.py`) imports, then calls `serve`. It reads a line of JSON
for each process: its `arguments`, its `env`, and the files `out` and `err` for what it says. It answers with
the process's id, and `out`.status has the exit status when it has ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from patience import until


@dataclass
class Fork:
    """One process."""

    pid: int
    out: Path

    @property
    def status(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        try:
            return int(ending(self.out).read_text())
        except FileNotFoundError:
            return None

    def interrupt(self, how: signal.Signals = signal.SIGKILL) -> int:
        """End it by a signal."""
        os.kill(self.pid, how)
        return self.wait(60)

    def wait(self, seconds: float = 500) -> int:
        """Its exit status, when it has ended."""
        until(lambda: self.status is not None, f"{self.out} has ended", seconds, every=0.2)
        assert self.status is not None
        return self.status


class Forks:
    """The process that they are forks of; it starts with the first one.

    Args:
        script: what it runs.
        modules: what it imports besides.
    """

    def __init__(self, script: str, *modules: str) -> None:
        self._command = [sys.executable, str(Path(__file__).with_name(script)), *modules]
        self._server: subprocess.Popen[str] | None = None
        self._turn = threading.Lock()
        self._made: list[Fork] = []

    def start(
        self, arguments: Sequence[str], env: Mapping[str, str], out: Path, err: Path | None = None
    ) -> Fork:
        """A process with these arguments, whose output goes to files, errors to the same where no other is
        named."""
        asked = json.dumps(
            {"arguments": list(arguments), "env": dict(env), "out": str(out), "err": str(err or out)}
        )
        with self._turn:
            server = self._server = self._server or subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**env, "PYTHONPATH": os.pathsep.join(sys.path)},
            )  # fmt: skip
            assert server.stdin is not None and server.stdout is not None
            server.stdin.write(asked + "\n")
            server.stdin.flush()
            self._made.append(Fork(int(server.stdout.readline()), out))
            return self._made[-1]

    def close(self) -> None:
        """The end of all."""
        for fork in self._made:
            if fork.status is None:
                with suppress(ProcessLookupError):
                    os.kill(fork.pid, signal.SIGKILL)
        if self._server is not None:
            self._server.communicate(timeout=60)


def ending(out: Path) -> Path:
    """The file with the exit status."""
    return out.with_name(out.name + ".status")


def serve() -> list[str] | None:
    """Returns with the arguments in each fork, and with None when no more are wanted."""
    for line in sys.stdin:
        asked = json.loads(line)
        if os.fork():
            continue
        if process := os.fork():  # this one waits for the process, as nobody else can
            os.write(1, f"{process}\n".encode())
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            part = Path(asked["out"] + ".part")
            part.write_text(str(status))
            part.rename(ending(Path(asked["out"])))
            os._exit(0)
        os.environ.clear()
        os.environ.update(asked["env"])
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started us may ignore it
        return list(asked["arguments"])
    return None
