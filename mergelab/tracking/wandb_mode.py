"""Whether W&B records online or offline, decided before its client can ask or wait for anything."""

from __future__ import annotations

import logging
import os
import socket
import threading
from contextlib import suppress
from dataclasses import replace
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from mergelab.schema import Tracking

log = logging.getLogger(__name__)


def decided(settings: Tracking) -> Tracking:
    """The settings with `mode=auto` decided, so that many runs do not each test the connection.

    W&B never makes it raise. If W&B is disabled, the result is `name=none`.
    """
    if settings.name != "wandb":
        return settings
    try:
        inherited = inherited_settings(settings)
        mode, why = mode_of(settings, inherited.mode, inherited.base_url)
    except Exception:  # swallowed on purpose: the first run reports it
        return settings
    if mode != "online":
        log.info("W&B is %s: %s", mode, why)
    return replace(settings, name="none") if mode == "disabled" else replace(settings, mode=mode)


def inherited_settings(settings: Tracking) -> Any:
    """W&B's own settings. Must be the first call of its client, which else prints where it found the key."""
    import wandb

    return wandb.setup(wandb.Settings(silent=True, login_timeout=settings.timeout)).settings


def mode_of(settings: Tracking, inherited: str, url: str) -> tuple[str, str]:
    """`online`, `offline` or `disabled`, and the reason; `inherited` is the mode in W&B's own settings."""
    where = server_name(url)
    if inherited in ("disabled", "offline", "dryrun"):
        mode = "disabled" if inherited == "disabled" else "offline"
        return mode, f"WANDB_MODE or W&B's settings file says {inherited}"
    if settings.mode == "offline":
        return "offline", "tracking.mode=offline"
    if not has_key(url):  # W&B would ask for one at the terminal
        return "offline", f"no API key for {where} (`wandb login` or WANDB_API_KEY)"
    if settings.mode == "auto" and not accepts_connections(url, settings.timeout):
        return "offline", f"{where} does not answer"
    return "online", ""


def has_key(url: str) -> bool:
    """Whether W&B would find an API key for the server. The key itself is not read."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    with suppress(OSError, NetrcParseError):
        hosts = netrc(str(path)).hosts
        # The default server has two names, and W&B accepts an entry under either.
        public = {"api.forge.coreweave.com", "api.wandb.ai"}
        own = server_name(url)
        return not hosts.keys().isdisjoint(public if own in public else {own})
    return False


def accepts_connections(url: str, seconds: float) -> bool:
    """Whether the server, or the proxy in front of it, accepts a connection. Makes one attempt.

    `wandb.init` alone would retry for its whole timeout in each of many runs, and only then be offline.
    The attempt is made in a thread because name resolution has no timeout.
    """
    target = urlsplit(url)
    proxy = getproxies().get(target.scheme)
    if proxy and not proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = (target.hostname, target.port or (443 if target.scheme == "https" else 80))
    answered = threading.Event()

    def connect() -> None:
        with suppress(OSError, UnicodeError), socket.create_connection(address, timeout=seconds):
            answered.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def server_name(url: str) -> str:
    """Host and port, without the name and password that a URL may hold."""
    return urlsplit(url).netloc.rpartition("@")[2]
