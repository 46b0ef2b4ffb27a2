"""Downloads into the hub's cache that resume where they were interrupted.

The hub's own client resumes within one process only, and starts from the beginning after a kill. With
eight shards of 5 GB at a time, that loses too much. So large files are downloaded here, by the client's
`http_get`, into files with permanent names, and enter the cache once their sha256 is verified.
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

from mergelab.core.errors import Interrupted, StepError
from mergelab.hub import cache, client
from mergelab.hub.repository import File, Repository

Progress = Callable[[str, int, int], None]
"""Called with the activity, the bytes so far, and the total."""

Job = tuple[Repository, File]

PAUSE = 1.0
"""Seconds before a broken connection is tried again."""

BLOCK = 1 << 22
AGAIN = "Run the same command again: it resumes from there."
LAST = ("config.json", "adapter_config.json")
"""A folder with one of these counts as a model. They come last, so that a partial download does not."""


@dataclass(frozen=True)
class Wanted:
    """Files of one repository at one commit."""

    of: Repository
    files: tuple[File, ...]
    revisions: tuple[str | None, ...]
    """The branches, tags or commits by which it was requested."""

    @property
    def missing(self) -> list[File]:
        """The files that are not in the cache."""
        return cache.missing(self.of, self.files)


class _Stopped(Exception):
    """Ends the download threads of a command that has failed."""


class _Meter:
    """Reports the bytes of all files together as they arrive."""

    def __init__(self, jobs: Sequence[Job], progress: Progress) -> None:
        self.stopped = False
        self._progress = progress
        self._total = sum(f.size for _, f in jobs)
        self._at = {self._key(*job): cache.downloaded(*job) for job in jobs}
        self._lock = threading.Lock()

    def set(self, job: Job, at: int) -> None:
        """Set the position of one file."""
        self.check()
        with self._lock:
            self._at[self._key(*job)] = at
            self._progress("download", sum(self._at.values()), self._total)

    def check(self) -> None:
        """Raise if the command has failed."""
        if self.stopped:
            raise _Stopped

    def bar(self, job: Job) -> type:
        """The part of tqdm's interface that `http_get` needs, for one file."""
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
    """Download missing files into the cache, and record the commits of branches and tags.

    Args:
        wanted: The files to download.
        workers: The number of parallel downloads.
        progress: Called with the bytes downloaded.

    Raises:
        StepError: The network, the hub or the disk failed, or another command is fetching the same
            repository. What has been downloaded is kept.
    """
    with ExitStack() as stack:
        stack.enter_context(client.quiet())
        for name in sorted({w.of.name for w in wanted if w.missing}):
            stack.enter_context(_locked(name))
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
                raise StepError(
                    f"{w.of.name}: {', '.join(f.name for f in lost)} did not arrive completely\n{AGAIN}"
                )
            for revision in w.revisions:
                cache.record_commit(w.of, revision)


def _locked(name: str) -> Any:
    """Lock a repository in the cache, so that one command at a time fetches it."""
    from filelock import FileLock, Timeout

    path = cache.lock(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(path).acquire(blocking=False)
    except Timeout:
        raise StepError(f"{name}: another command is fetching it\nWait until it has finished.") from None


def _each(jobs: Iterable[Job], work: Callable[[Job, _Meter], None], meter: _Meter, workers: int) -> None:
    """Run `work` for every file in parallel. The first failure stops all of them."""
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(work, job, meter): job for job in jobs}
        try:
            for done in as_completed(futures):
                of, file = futures[done]
                try:
                    done.result()
                except Exception as e:
                    if not client.is_external(e):
                        raise
                    raise StepError(f"{of.name}: {file.name}: {client.line(e)}\n{AGAIN}") from e
        except BaseException as e:
            meter.stopped = True
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(e, KeyboardInterrupt):
                raise Interrupted(f"interrupted; what has been downloaded is kept\n{AGAIN}") from None
            raise


def _transfer(job: Job, meter: _Meter) -> None:
    """Download the content of a large file into the cache."""
    from huggingface_hub import constants

    of, file = job
    target, partial = cache.blob(of, file), cache.partial(of, file)
    if target.exists() or file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return  # above that size only the client's own download works
    target.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):  # an old partial download may be damaged: then once more from the beginning
        _fill(job, meter)
        sha = hashlib.sha256()
        with partial.open("rb") as f:
            while block := f.read(BLOCK):
                meter.check()
                sha.update(block)
        if sha.hexdigest() == file.digest:
            partial.replace(target)
            return
        partial.unlink()
    raise ValueError("its sha256 differs from the one that the hub reports")


def _fill(job: Job, meter: _Meter) -> None:
    """Download the rest of a file, and retry for as long as each attempt makes progress."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # it is public

    of, file = job
    url = hf_hub_url(of.name, file.name, revision=of.commit)
    while True:
        with cache.partial(of, file).open("ab") as f:
            if f.tell() > file.size:
                f.seek(0)
                f.truncate()
            start = f.tell()
            try:
                http_get(
                    url,
                    f,
                    resume_size=start,
                    # The rest of a file cannot be requested from a compressed response.
                    headers=build_hf_headers() | {"Accept-Encoding": "identity"},
                    expected_size=file.size,
                    tqdm_class=meter.bar(job),
                )
                return
            except Exception as e:
                if not client.is_network(e) or f.tell() <= start:
                    raise
        time.sleep(PAUSE)


def _enter(job: Job, meter: _Meter) -> None:
    """Link a file into its snapshot; a small one is downloaded first."""
    from huggingface_hub import hf_hub_download

    of, file = job
    meter.check()
    hf_hub_download(of.name, file.name, revision=of.commit)
    meter.set(job, file.size)
