"""Who makes and measures candidates: this process, or several that keep what they have loaded.

A worker that dies or runs out of time costs its candidate alone: each is a pool of one process, so
that it is known whose candidate it was.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

from mergelab.core.run_dir import RunDir
from mergelab.evaluation import Measure
from mergelab.jobs.run_job import run_job
from mergelab.optimization.candidate_evaluator import CandidateEvaluator, Outcome, Scores, finite, run_guarded
from mergelab.schema import Run

GRACE = 120.0
"""Seconds that a new worker may take on top of a candidate's time, to load what it keeps."""


@dataclass(frozen=True)
class EvaluationRequest:
    """A candidate to be made and measured."""

    number: int
    """-1 is the preset."""
    run: Run
    measures: Sequence[Measure]
    share: float = 1.0
    kind: str = "candidate"
    """`candidate`, `screen` (on few prompts), `validate` or `preset`."""
    attempt: int = 1

    @property
    def name(self) -> str:
        """Unique in the sweep."""
        return f"{self.kind}{self.number}"


class Executor(Protocol):
    """Who works on orders."""

    def work(self, orders: Sequence[EvaluationRequest]) -> Iterator[tuple[int, Outcome]]:
        """The outcome of each, as they come, by the place in `orders`."""

    def finish(self, run: Run, run_dir: RunDir, turn: int) -> None:
        """Run the steps of a job, that of the winner.

        Args:
            turn: how many winners the sweep has had before.
        Raises:
            StepError: when it did not come to its end.
        """

    def close(self, at_once: bool = False) -> None:
        """Let go of everything; `at_once` gives up what is being worked on."""


class InlineExecutor:
    """This process, one candidate after another."""

    def __init__(self, timeout: float | None):
        self._timeout = timeout
        self._benches: dict[str, CandidateEvaluator] = {}

    def work(self, orders: Sequence[EvaluationRequest]) -> Iterator[tuple[int, Outcome]]:
        """The outcome of each, in their order."""
        for place, order in enumerate(orders):
            yield place, run_guarded(lambda order=order: _measured(self._benches, order), self._timeout)  # type: ignore[misc]

    def finish(self, run: Run, run_dir: RunDir, turn: int) -> None:
        """Here, too."""
        self._benches.clear()
        run_job(run, run_dir)

    def close(self, at_once: bool = False) -> None:
        """Let go of the models."""
        self._benches.clear()


def _measured(benches: dict[str, CandidateEvaluator], order: EvaluationRequest) -> Scores:
    key = _models(order.run)
    if key not in benches:
        benches.clear()  # one set of models at a time fits
        benches[key] = CandidateEvaluator(order.run)
    return finite(benches[key].measure(order.run, order.measures, order.share))


def _models(run: Run) -> str:
    """What a bench has loaded, as a text: runs of one text share one."""
    experts = [(name, e.path, e.revision) for name, e in run.experts.items()]
    return repr((run.model, experts, run.method.base, run.hardware, run.eval, run.seed))


class ProcessExecutor:
    """Several processes, on one device each.

    Args:
        count: of processes.
        devices: of GPUs to share out, from the run's device on.
        timeout: seconds of a candidate.
    """

    def __init__(self, count: int, devices: int, timeout: float | None):
        self._timeout = timeout
        self._pools = [_Pool(i % max(devices, 1)) for i in range(count)]

    def work(self, orders: Sequence[EvaluationRequest]) -> Iterator[tuple[int, Outcome]]:
        """The outcome of each, as they come."""
        waiting: queue.SimpleQueue[tuple[int, EvaluationRequest]] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Outcome] | BaseException] = queue.SimpleQueue()
        for item in enumerate(orders):
            waiting.put(item)
        stopped = threading.Event()

        def serve(pool: _Pool) -> None:
            while not stopped.is_set():
                try:
                    place, order = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((place, pool.run(order, self._timeout)))
                except BaseException as e:
                    done.put(e)
                    return

        threads = ThreadPoolExecutor(len(self._pools))
        try:
            for pool in self._pools:
                threads.submit(serve, pool)
            for _ in orders:
                outcome = _next(done)
                if isinstance(outcome, BaseException):
                    raise outcome
                yield outcome
        finally:
            stopped.set()
            threads.shutdown(wait=False)

    def finish(self, run: Run, run_dir: RunDir, turn: int) -> None:
        """In this process, when the others have made room."""
        self.close()
        run_job(run, run_dir)

    def close(self, at_once: bool = False) -> None:
        """End the processes."""
        for pool in self._pools:
            pool.end(at_once)


def _next(done: queue.SimpleQueue[Any]) -> Any:
    """The next of a queue, without being deaf to Ctrl-C meanwhile."""
    while True:
        try:
            return done.get(timeout=0.5)
        except queue.Empty:
            continue


class _Pool:
    """One process, and another when it has died."""

    def __init__(self, device: int):
        self._device = device
        self._executor: Any = None
        self._lock = threading.Lock()

    def run(self, order: EvaluationRequest, timeout: float | None) -> Outcome:
        """The outcome of an order; that of a dead or late process says so."""
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        first = self._executor is None
        future = self._submit(order, timeout)
        # The worker bounds itself; what does not listen to its clock is killed from here.
        bound = None if timeout is None else timeout + (GRACE if first else 5.0)
        try:
            outcome: Outcome = future.result(timeout=bound)
        except TerminatedWorkerError as e:
            self.end()
            return Outcome(reason=f"its process died{_exit_code(e)}")
        except TimeoutError:
            self.end()
            return Outcome(reason=f"out of time, {timeout:g} s")
        return outcome

    def _submit(self, order: EvaluationRequest, timeout: float | None) -> Future[Outcome]:
        from joblib.externals.loky.process_executor import ProcessPoolExecutor

        with self._lock:
            if self._executor is None:
                # A process that is killed leaves semaphores, which loky's helper would tell the user of.
                os.environ.setdefault("PYTHONWARNINGS", "ignore")
                self._executor = ProcessPoolExecutor(
                    1, initializer=_begin, initargs=(os.getpid(), dict(_environment())), timeout=None
                )
            future: Future[Outcome] = self._executor.submit(serve, order, self._device, timeout)
        return future

    def end(self, at_once: bool = True) -> None:
        """End the process, after what it works on or in the middle of it."""
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=True, kill_workers=at_once)


def _exit_code(error: Exception) -> str:
    import re

    found = re.search(r"exit codes of the workers are \{([^}]*)\}", str(error))
    return f" ({found[1]})" if found else ""


def _environment() -> Mapping[str, str]:
    wanted = ("HF_", "MERGELAB_", "TOKENIZERS_", "CUDA_", "OMP_")
    return {k: v for k, v in os.environ.items() if k.startswith(wanted)}


# ---------------------------------------------------------------- in the worker

_benches: dict[str, CandidateEvaluator] = {}


def _begin(parent: int, environment: Mapping[str, str]) -> None:
    """Set a worker up: quiet, and gone when its parent is."""
    import signal
    import warnings

    os.environ.update(environment)
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def serve(order: EvaluationRequest, device: int, timeout: float | None) -> Outcome:
    """What came of an order in this process, which keeps what it has loaded for the next.

    Args:
        device: counted from the run's own, where that is a GPU.
    """
    kind, _, first = order.run.hardware.device.partition(":")
    if kind != "cpu":
        hardware = replace(order.run.hardware, device=f"{kind}:{int(first or 0) + device}")
        order = replace(order, run=replace(order.run, hardware=hardware))
    return run_guarded(lambda: _measured(_benches, order), timeout)


def make_executor(run: Run) -> Executor:
    """Those that a run's hardware asks for on this machine."""
    h = run.hardware
    if h.workers == 1:
        return InlineExecutor(run.search.timeout)
    devices = h.devices or _gpus() if h.device != "cpu" else 1
    return ProcessExecutor(h.workers, devices, run.search.timeout)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
