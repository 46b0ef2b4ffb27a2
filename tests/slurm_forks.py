"""Searches that start at once: forks of one process that has imported everything, which takes longer than
such a search does.

    python slurm_forks.py

reads a line of JSON for each search: its `arguments`, its `env`, and the file `out` for what it says. It
answers with the search's process id, and `out`.status has the exit status when it has ended.
"""

from __future__ import annotations

import gc
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
    """A search's process."""

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
        until(lambda: self.status is not None, f"the search of {self.out} has ended", seconds, every=0.2)
        assert self.status is not None
        return self.status


class Forks:
    """The process that they are forks of; it starts with the first one."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None
        self._turn = threading.Lock()
        self._made: list[Fork] = []

    def start(self, arguments: Sequence[str], env: Mapping[str, str], out: Path) -> Fork:
        """A search as `slurm_driver` says."""
        asked = json.dumps({"arguments": list(arguments), "env": dict(env), "out": str(out)})
        with self._turn:
            server = self._server = self._server or subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
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
    """Returns with the arguments of a search in each fork, and with None when no more are wanted."""
    for line in sys.stdin:
        asked = json.loads(line)
        if os.fork():
            continue
        if search := os.fork():  # this one waits for the search, as nobody else can
            os.write(1, f"{search}\n".encode())
            status = os.waitstatus_to_exitcode(os.waitpid(search, 0)[1])
            part = Path(asked["out"] + ".part")
            part.write_text(str(status))
            part.rename(ending(Path(asked["out"])))
            os._exit(0)
        os.environ.clear()
        os.environ.update(asked["env"])
        said = os.open(asked["out"], os.O_WRONLY | os.O_CREAT, 0o600)
        for stream in (1, 2):
            os.dup2(said, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started us may ignore it
        return list(asked["arguments"])
    return None


if __name__ == "__main__":
    import cma  # noqa: F401 (with nevergrad, most of what a search imports)
    import nevergrad  # noqa: F401
    import slurm_driver

    gc.freeze()
    if arguments := serve():
        slurm_driver.main(arguments)
