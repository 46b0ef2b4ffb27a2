"""Recording a run in Weights & Biases, or nowhere.

The run's own folder is the record; W&B is a second view of it. So this is the one place where
failures are swallowed: once a run goes on, nothing that W&B does may end it, lose its result or
hold it up. Calls are made by a thread of their own, what they raise is logged once, and every wait
has an end. What can be known beforehand is told by `problems`.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from mergelab.core.errors import InputError, did_you_mean
from mergelab.schema import Tracking

_log = logging.getLogger("mergelab.tracking")

NAMES = ("none", "wandb")
MODES = ("auto", "online", "offline")
UPLOAD_LIMIT = 10_000_000
"""Bytes. A larger file, and any folder, is recorded by its address alone."""


class Tracker:
    """Where a run's figures go; this one is tracking=none, and forgets them.

    No method raises over W&B, and none waits but `finish`, and that not for long.
    """

    recorded = False
    """After `finish`: whether W&B, or its files, have all that was said."""
    mode = ""
    """`online` or `offline`; of nothing empty."""
    url: str | None = None
    """Where the run can be seen."""

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row of metrics; with `step`, a point of their curves over `step`, in any order."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table; the same name again shows its newer version."""

    def image(self, name: str, path: Path) -> None:
        """Show a picture. It is read later: leave it where it is."""

    def file(self, path: Path, kind: str) -> None:
        """Record a file as an artifact of type `kind`. It is read later: leave it where it is."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set values that stand for the whole run."""

    def finish(self, status: int) -> None:
        """End the record, with the run's exit status. Calls after it do nothing."""


@contextmanager
def track(
    settings: Tracking,
    config: Mapping[str, Any],
    folder: Path,
    *,
    name: str,
    job_type: str | None = None,
    run_id: str | None = None,
    one_of_many: bool = False,
) -> Iterator[Tracker]:
    """Record what happens inside the `with`; an exception passes through and marks it failed.

    `config` is shown beside the metrics, without its secrets; W&B's files go to `folder/wandb`.
    A `run_id` that W&B knows is continued (a sweep that goes on). W&B's own environment variables
    are respected: WANDB_MODE above all, WANDB_PROJECT and WANDB_NAME where the run says nothing; of a
    run that is `one_of_many` not WANDB_NAME, which can only mean one.
    Raises InputError for an unknown `settings.name`.
    """
    if settings.name not in NAMES:
        raise InputError(_choose(settings.name, NAMES))
    default = settings.project == Tracking.project
    project = os.environ.get("WANDB_PROJECT", settings.project) if default else settings.project
    about = {
        "project": project,
        "entity": settings.entity,
        "group": settings.group,
        "tags": list(settings.tags) or None,
        "name": name if one_of_many else os.environ.get("WANDB_NAME", name),
        "job_type": job_type,
        "id": run_id,
        "resume": "allow" if run_id else None,
        "config": scrub(config),
    }
    place = folder.resolve()
    # Tables wait for their upload in W&B's data folder, which is in the home directory otherwise.
    with _default_environment("WANDB_DATA_DIR", str(place / "wandb")):
        tracker = Tracker()
        if settings.name == "wandb":
            tracker = _start(settings, {**scrub(about, by_name=False), "dir": str(place)})
        try:
            yield tracker
        except BaseException as error:
            tracker.finish(getattr(error, "exit_status", 1))
            raise
        tracker.finish(0)


def decided(settings: Tracking) -> Tracking:
    """The settings with `mode=auto` decided, so that many runs do not ask each for itself whether the
    server answers; `name=none` where W&B has been disabled. Never raises over W&B."""
    if settings.name != "wandb":
        return settings
    try:
        inherited = _inherited(settings)
        mode, why = _mode(settings, inherited.mode, inherited.base_url)
    except Exception:  # swallowed on purpose: the first run will say it
        return settings
    if mode != "online":
        _log.info("W&B is %s: %s", mode, why)
    return replace(settings, name="none") if mode == "disabled" else replace(settings, mode=mode)


def problems(settings: Tracking) -> list[tuple[str, str]]:
    """What is wrong with the settings, as (key, message); empty if a run may start."""
    found = []
    if settings.name not in NAMES:
        found.append(("tracking.name", _choose(settings.name, NAMES)))
    if settings.mode not in MODES:
        found.append(("tracking.mode", _choose(settings.mode, MODES)))
    if not 0 < settings.timeout < float("inf"):
        message = f"{settings.timeout} is no time to wait; give seconds above 0, such as 5"
        found.append(("tracking.timeout", message))
    if settings.name != "wandb":
        return found
    try:
        import wandb

        wandb.Settings(project=settings.project, run_tags=tuple(settings.tags))  # checks them
        inherited = wandb.setup(wandb.Settings(silent=True)).settings
    except ImportError as error:
        message = f"wandb cannot be imported ({error}); `pip install wandb`, or tracking=none"
        return [*found, ("tracking.name", message)]
    except Exception as error:
        return [*found, ("tracking", f"W&B refuses these settings: {_reason(error)}")]
    if settings.mode == inherited.mode == "online" and not _has_key(inherited.base_url):
        where = _server(inherited.base_url)
        message = f"no API key for {where}; run `wandb login`, set WANDB_API_KEY, or use mode=auto"
        found.append(("tracking.mode", message))
    return found


# ---------------------------------------------------------------- secrets

_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_SECRET = re.compile(r"(?<![a-z])(api)?(token|key|secret|passw(or)?d|passphrase|credential)s?(?![a-z])", re.I)


def scrub(value: Any, *, by_name: bool = True) -> Any:
    """A copy of nested plain data without secrets.

    Removed are the values of environment variables whose last word is a secret's (WANDB_API_KEY,
    HF_TOKEN, ..._PASSWORD) wherever they occur; and with `by_name` all text in a mapping under a
    name with such a word. Numbers stay: `max_tokens` is no secret.
    """
    words = {name: name.split("_")[-1] for name in os.environ}
    known = [os.environ[k] for k, word in words.items() if _SECRET.search(word)]
    known = [value for value in known if len(value) >= 8]

    def clean(value: Any, secret: bool = False) -> Any:
        if isinstance(value, Mapping):
            names = {k: by_name and bool(_SECRET.search(_CAMEL.sub("_", str(k)))) for k in value}
            return {clean(str(k)): clean(v, secret or names[k]) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item, secret) for item in value]
        if not isinstance(value, str | Path):
            return value
        text = "[removed]" if secret else str(value)
        for one in known:
            text = text.replace(one, "[removed]")
        return text

    return clean(value)


# ---------------------------------------------------------------- Weights & Biases


class _Wandb(Tracker):
    """A W&B run, fed by one thread in the order of the calls.

    A thread, because W&B asks its server before it takes a table or an artifact, and waits 19 s
    each time for one that has died.
    """

    def __init__(self, run: Any, patience: float, mode: str) -> None:
        self._run = run
        self.mode, self.url = mode, run.url if mode == "online" else None
        self.directory = Path(run.dir).parent
        self._patience = patience
        self._steps = self._warned = self._finished = False
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = dict(metrics)
        if step is not None:
            # A column of its own: W&B's step may only grow, and rows that come late are dropped.
            row["step"] = step
            if not self._steps:
                self._steps = True
                self._calls.put(lambda: self._run.define_metric("*", step_metric="step"))
        self._calls.put(lambda: self._run.log(row))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        head: list[str | int] = [*columns]
        data = [scrub(list(row), by_name=False) for row in rows]

        def call() -> None:
            import wandb

            table = wandb.Table(columns=head, data=data, allow_mixed_types=True)
            self._run.log({name: table})

        self._calls.put(call)

    def image(self, name: str, path: Path) -> None:
        def call() -> None:
            import wandb

            self._run.log({name: wandb.Image(str(path))})

        self._calls.put(call)

    def file(self, path: Path, kind: str) -> None:
        def call() -> None:
            import wandb

            name = re.sub(r"[^\w.-]", "-", f"{path.stem}-{self._run.id}")
            artifact = wandb.Artifact(name, type=kind)
            if path.is_file() and path.stat().st_size <= UPLOAD_LIMIT:
                artifact.add_file(str(path), policy="immutable")  # read in place, not copied
            else:
                artifact.add_reference(path.resolve().as_uri(), checksum=False)
            self._run.log_artifact(artifact)

        self._calls.put(call)

    def summary(self, values: Mapping[str, Any]) -> None:
        clean = scrub(values, by_name=False)
        self._calls.put(lambda: self._run.summary.update(clean))

    def finish(self, status: int) -> None:
        if self._finished:
            return
        self._finished = True
        self._calls.put(lambda: self._run.finish(exit_code=status))
        self._calls.put(None)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            self._warn(TimeoutError(f"not done after {self._patience:g} s"))
        self.recorded = not self._warned

    def _work(self) -> None:
        for call in iter(self._calls.get, None):
            try:
                call()
            except Exception as error:  # swallowed on purpose: see the module's docstring
                self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("W&B failed (%s); try `wandb sync %s` later", _reason(error), self.directory)


# ---------------------------------------------------------------- starting


def _start(settings: Tracking, about: dict[str, Any]) -> Tracker:
    """A W&B run, online if it can be, else offline, else none; and one line that says which."""
    try:
        import wandb

        inherited = _inherited(settings)
        own = wandb.Settings(
            silent=True,
            console="off",
            reinit="create_new",
            init_timeout=settings.timeout,
            finish_timeout=2 * settings.timeout,
            finish_timeout_raises=True,
            # Nothing of the machine or the repository: the command's arguments, uncommitted
            # changes and the addresses of remotes can all carry secrets.
            disable_code=True,
            save_code=False,
            disable_git=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        mode, why = _mode(settings, inherited.mode, inherited.base_url)
        if mode == "disabled":
            _log.info("W&B is disabled: %s", why)
            return Tracker()
        if mode == "online":
            try:
                run = wandb.init(mode="online", settings=own, **about)
                _log.info("recording to W&B: %s", run.url)
                return _Wandb(run, 4 * settings.timeout, "online")
            except Exception as error:
                why = f"the server did not take the run ({_reason(error)})"
        run = wandb.init(mode="offline", settings=own, **about)
        _log.info("W&B is offline: %s; `wandb sync %s` uploads it", why, Path(run.dir).parent)
        return _Wandb(run, 4 * settings.timeout, "offline")
    except Exception as error:  # swallowed on purpose: see the module's docstring
        _log.warning("nothing is recorded in W&B: %s", _reason(error))
        return Tracker()


def _inherited(settings: Tracking) -> Any:
    """W&B's own settings. Asked for before all else, or it prints where it found the key."""
    import wandb

    return wandb.setup(wandb.Settings(silent=True, login_timeout=settings.timeout)).settings


def _mode(settings: Tracking, inherited: str, url: str) -> tuple[str, str]:
    """`online`, `offline` or `disabled`, and why. `inherited` is W&B's own setting."""
    where = _server(url)
    if inherited in ("disabled", "offline", "dryrun"):
        mode = "disabled" if inherited == "disabled" else "offline"
        return mode, f"WANDB_MODE or W&B's settings file says {inherited}"
    if settings.mode == "offline":
        return "offline", "tracking.mode=offline"
    if not _has_key(url):  # then W&B would ask for one at the terminal
        return "offline", f"no API key for {where} (`wandb login` or WANDB_API_KEY)"
    if settings.mode == "auto" and not _answers(url, settings.timeout):
        return "offline", f"{where} does not answer"
    return "online", ""


def _has_key(url: str) -> bool:
    """Whether W&B would find a key for the server; the key itself is W&B's business."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    with suppress(OSError, NetrcParseError):
        hosts = netrc(str(path)).hosts
        # The default server has had two names; W&B takes an entry under either.
        public = {"api.forge.coreweave.com", "api.wandb.ai"}
        own = _server(url)
        return not hosts.keys().isdisjoint(public if own in public else {own})
    return False


def _answers(url: str, seconds: float) -> bool:
    """Whether the server, or the proxy in front of it, takes a connection: one attempt.

    In a thread, for the look-up of a name has no time limit of its own.
    """
    to = urlsplit(url)
    proxy = getproxies().get(to.scheme)
    if proxy and not proxy_bypass(to.hostname or ""):
        to = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = (to.hostname, to.port or (443 if to.scheme == "https" else 80))
    answered = threading.Event()

    def knock() -> None:
        with suppress(OSError, UnicodeError), socket.create_connection(address, timeout=seconds):
            answered.set()

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


# ---------------------------------------------------------------- small things


def _choose(word: str, choices: Sequence[str]) -> str:
    return f"unknown {word!r}; choose {', '.join(choices)}.{did_you_mean(word, choices)}"


def _server(url: str) -> str:
    """Host and port, without the name and password that a URL may hold."""
    return urlsplit(url).netloc.rpartition("@")[2]


def _reason(error: Exception) -> str:
    """An error as one line for the log, which is a file of the run too."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return str(scrub(text))[:300]


@contextmanager
def _default_environment(name: str, value: str) -> Iterator[None]:
    """The environment variable has this value meanwhile, unless the user gave it one."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
