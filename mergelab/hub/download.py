"""Downloads into the hub's cache that go on where they were interrupted.

The hub's own client goes on within a process only: a download that is killed starts again from nothing.
Of shards of 5 GB, eight at a time, that is too much to lose. So large files are fetched here, by the
client's `http_get`, into files with lasting names, and enter the cache once their sha256 is right.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from mergelab.core.errors import StepError
from mergelab.hub import cache, client
from mergelab.hub.repository import File, Repository

Progress = Callable[[str, int, int], None]
"""Called with what is done, bytes so far, and bytes in all."""

Job = tuple[Repository, File]

PAUSE = 1.0
"""Seconds before a broken connection is tried again."""

BLOCK = 1 << 22
AGAIN = "Run the same command again: it goes on from there."
LAST = ("config.json", "adapter_config.json")
"""By these files a model is known, so they come last: what was interrupted does not pass for one."""


@dataclass(frozen=True)
class Wanted:
    """Files of one repository at one commit."""

    of: Repository
    files: tuple[File, ...]
    revisions: tuple[str | None, ...]
    """The branches, tags or commits by which it was asked for."""

    @property
    def missing(self) -> list[File]:
        """The files that are not in the cache."""
        return cache.missing(self.of, self.files)


class _Stopped(Exception):
    """Ends a download whose command has ended."""


class _Meter:
    """Bytes of all files together, told as they come."""

    def __init__(self, jobs: Sequence[Job], progress: Progress) -> None:
        self.stopped = False
        self._progress = progress
        self._total = sum(f.size for _, f in jobs)
        self._at = {self._key(*job): cache.there(*job) for job in jobs}
        self._lock = threading.Lock()

    def set(self, job: Job, at: int) -> None:
        """A file is at this byte."""
        self.check()
        with self._lock:
            self._at[self._key(*job)] = at
            self._progress("download", sum(self._at.values()), self._total)

    def check(self) -> None:
        """Raise where the command has ended."""
        if self.stopped:
            raise _Stopped

    def bar(self, job: Job) -> type:
        """As much of tqdm's class as `http_get` wants of a bar; it counts for one file."""
        meter = self

        class Bar:
            def __init__(self, *_: Any, initial: int = 0, **__: Any) -> None:
                self.n = initial
                meter.set(job, self.n)

            def update(self, n: int) -> None:
                self.n += n
                meter.set(job, self.n)

            def __enter__(self) -> Bar:
                return self

            def __exit__(self, *_: object) -> None: ...

        return Bar

    @staticmethod
    def _key(of: Repository, file: File) -> tuple[str, str, str]:
        return of.name, of.commit, file.name


def download(wanted: Sequence[Wanted], *, workers: int, progress: Progress) -> None:
    """Bring what is missing into the cache, and remember what branches and tags have come to.

    Args:
        workers: files that are downloaded at once.
    Raises:
        StepError: when the network, the hub or the disk fails, or another command fetches the same;
            what has come so far is kept.
    """
    with ExitStack() as stack:
        stack.enter_context(client.quiet())
        for name in sorted({w.of.name for w in wanted if w.missing}):
            stack.enter_context(_alone(name))
        jobs = [(w.of, f) for w in wanted for f in w.missing]
        meter = _Meter(jobs, progress)
        for job in jobs:
            cache.discard(*job)
        contents = {(of.name, f.digest): (of, f) for of, f in jobs if f.large}
        _each(contents.values(), _transfer, meter, workers)
        _each([(of, f) for of, f in jobs if f.name not in LAST], _enter, meter, workers)
        _each([(of, f) for of, f in jobs if f.name in LAST], _enter, meter, workers)
        for w in wanted:
            if lost := w.missing:
                raise StepError(f"{w.of.name}: {', '.join(f.name for f in lost)} did not come whole\n{AGAIN}")
            for revision in w.revisions:
                cache.note(w.of, revision)


def _alone(name: str) -> Any:
    """A lock on a repository in the cache, held by one command at a time."""
    from filelock import FileLock, Timeout

    path = cache.lock(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(path).acquire(blocking=False)
    except Timeout:
        raise StepError(f"{name}: another command is fetching it\nWait for that one.") from None


def _each(jobs: Iterable[Job], work: Callable[[Job, _Meter], None], meter: _Meter, workers: int) -> None:
    """Do `work` for every file, some at once; the first failure ends it all."""
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(work, job, meter): job for job in jobs}
        try:
            for done in as_completed(futures):
                of, file = futures[done]
                try:
                    done.result()
                except Exception as e:
                    if not client.is_traffic(e):
                        raise
                    raise StepError(f"{of.name}: {file.name}: {client.line(e)}\n{AGAIN}") from e
        except BaseException as e:
            meter.stopped = True
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(e, KeyboardInterrupt):
                raise KeyboardInterrupt(f"interrupted; what has come so far is kept\n{AGAIN}") from None
            raise


def _transfer(job: Job, meter: _Meter) -> None:
    """Bring the content of a large file into the cache."""
    from huggingface_hub import constants

    of, file = job
    target, begun = cache.blob(of, file), cache.begun(of, file)
    if target.exists() or file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return  # beyond that size only the client's own way is open
    target.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):  # what was begun long ago may be damaged: then once more from nothing
        _fill(job, meter)
        sha = hashlib.sha256()
        with begun.open("rb") as f:
            while block := f.read(BLOCK):
                meter.check()
                sha.update(block)
        if sha.hexdigest() == file.digest:
            begun.replace(target)
            return
        begun.unlink()
    raise ValueError("its sha256 is not the one that the hub has for it")


def _fill(job: Job, meter: _Meter) -> None:
    """Download what is not yet there of a file, and again for as long as each attempt gets further."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # it is public

    of, file = job
    url = hf_hub_url(of.name, file.name, revision=of.commit)
    while True:
        with cache.begun(of, file).open("ab") as f:
            if f.tell() > file.size:
                f.seek(0)
                f.truncate()
            have = f.tell()
            try:
                http_get(
                    url,
                    f,
                    resume_size=have,
                    # Compressed, the rest of a file could not be asked for.
                    headers=build_hf_headers() | {"Accept-Encoding": "identity"},
                    expected_size=file.size,
                    tqdm_class=meter.bar(job),
                )
                return
            except Exception as e:
                if not client.is_network(e) or f.tell() <= have:
                    raise
        time.sleep(PAUSE)


def _enter(job: Job, meter: _Meter) -> None:
    """Have a file appear in its snapshot; a small one is downloaded for it."""
    from huggingface_hub import hf_hub_download

    of, file = job
    meter.check()
    hf_hub_download(of.name, file.name, revision=of.commit)
    meter.set(job, file.size)
