"""The hub's own client: kept off the terminal, and what goes wrong with it in a line."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

NETWORK = ("httpx", "httpcore", "requests", "hf_xet")
"""Modules, by the start of their names, whose errors the client lets through; they share no base with
ours."""

NO_ANSWER = ("ConnectError", "ConnectTimeout", "ReadTimeout")


@contextmanager
def quiet() -> Iterator[None]:
    """Its log lines go to the run's log, and not to the terminal."""
    from huggingface_hub.utils import logging as own

    own.get_logger()  # it sets its handler up when it is first asked for
    logger = logging.getLogger("huggingface_hub")
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [], True
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before


def within(seconds: float, ask: Callable[[], T]) -> T:
    """What `ask` comes to, which not every call of the client can be given a time for.

    Raises:
        TimeoutError: when it has come to nothing by then; its thread does not keep the process.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(ask())
        except BaseException as e:
            future.set_exception(e)

    threading.Thread(target=work, daemon=True).start()
    return future.result(seconds)


def is_network(e: Exception) -> bool:
    """Whether an exception is one of the network's own."""
    return type(e).__module__.startswith(NETWORK)


def is_traffic(e: Exception) -> bool:
    """Whether an exception may come from the network, the hub or the disk, and not from a mistake of
    ours."""
    return isinstance(e, (OSError, ValueError, RuntimeError)) or is_network(e)


def line(e: BaseException) -> str:
    """What an exception of the client says, without addresses and request numbers."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    e = _cause(e)
    if isinstance(e, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids to reach the hub; unset it"
    if isinstance(e, TimeoutError) or type(e).__name__ in NO_ANSWER:
        return "the hub does not answer"
    if isinstance(e, HfHubHTTPError):
        said = f" ({e.server_message})" if e.server_message else ""
        return f"the hub answers with HTTP {status(e)}{said}"
    if isinstance(e, Exception) and is_network(e):
        return f"the connection failed ({type(e).__name__})"
    if isinstance(e, OSError) and e.strerror:
        return e.strerror
    return " ".join(str(e).split()) or type(e).__name__


def status(e: BaseException) -> int | None:
    """The HTTP status with which the hub has refused, None where it was something else."""
    response: Any = getattr(_cause(e), "response", None)
    return None if response is None else int(response.status_code)


def _cause(e: BaseException) -> BaseException:
    """What is behind an exception that only says which file it was."""
    return e.__cause__ if isinstance(e, RuntimeError) and e.__cause__ is not None else e
