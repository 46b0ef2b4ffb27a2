"""The hub's own client: its log lines and its errors."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

NETWORK = ("httpx", "httpcore", "requests", "hf_xet")
"""Prefixes of the modules whose errors the client passes on; they have no common base class."""

NO_ANSWER = ("ConnectError", "ConnectTimeout", "ReadTimeout")


@contextmanager
def quiet() -> Iterator[None]:
    """Send the client's log lines to the run's log instead of the terminal."""
    from huggingface_hub.utils import logging as own

    own.get_logger()  # the first call installs the handler
    logger = logging.getLogger("huggingface_hub")
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [], True
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before


def within(seconds: float, call: Callable[[], T]) -> T:
    """Limit the time of a call that has no timeout of its own.

    Raises:
        TimeoutError: It has not returned in time. Its thread is a daemon and does not keep the process.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as e:
            future.set_exception(e)

    threading.Thread(target=work, daemon=True).start()
    return future.result(seconds)


def is_network(e: Exception) -> bool:
    """Whether an exception is a network error."""
    return type(e).__module__.startswith(NETWORK)


def is_external(e: Exception) -> bool:
    """Whether an exception may be caused by the network, the hub or the disk rather than by our code."""
    return isinstance(e, (OSError, ValueError, RuntimeError)) or is_network(e)


def line(e: BaseException) -> str:
    """The message of a client's exception as one line, without URLs and request ids."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    e = _cause(e)
    if isinstance(e, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids reaching the hub; unset it"
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
    """The HTTP status of the hub's error, or None for any other error."""
    response: Any = getattr(_cause(e), "response", None)
    return None if response is None else int(response.status_code)


def _cause(e: BaseException) -> BaseException:
    """The cause of an exception that only names the file."""
    return e.__cause__ if isinstance(e, RuntimeError) and e.__cause__ is not None else e
