"""Evaluates candidates in several processes of this machine, which keep what they have loaded.

A process that dies or runs out of time costs its own candidate only: each is a pool of one process, so it is
known which candidate it was.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from mergelab.core.run_dir import RunDir
from mergelab.jobs.run_job import run_job
from mergelab.optimization.candidate_evaluator import CandidateEvaluator, Outcome
from mergelab.optimization.executors.base import EvaluationRequest, evaluate_in_process
from mergelab.schema import Run

GRACE = 120.0
"""Seconds that a new process gets on top of a candidate's time limit, to load the models."""


class ProcessExecutor:
    """An `Executor` of several processes, each on one device.

    Args:
        count: number of processes.
        devices: number of GPUs to share out, counted from the run's own device.
        timeout: seconds that a candidate may take.
    """

    def __init__(self, count: int, devices: int, timeout: float | None):
        self.show: Callable[[str], None] | None = None
        self._timeout = timeout
        self._pools = [_Pool(i % max(devices, 1)) for i in range(count)]

    def evaluate(self, requests: Sequence[EvaluationRequest]) -> Iterator[tuple[int, Outcome]]:
        """Evaluate a population; outcomes come in the order in which they are ready."""
        waiting: queue.SimpleQueue[tuple[int, EvaluationRequest]] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Outcome] | BaseException] = queue.SimpleQueue()
        for item in enumerate(requests):
            waiting.put(item)
        stopped = threading.Event()

        def serve(pool: _Pool) -> None:
            while not stopped.is_set():
                try:
                    index, request = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((index, pool.run(request, self._timeout)))
                except BaseException as e:
                    done.put(e)
                    return

        threads = ThreadPoolExecutor(len(self._pools))
        try:
            for pool in self._pools:
                threads.submit(serve, pool)
            for _ in requests:
                outcome = _next(done)
                if isinstance(outcome, BaseException):
                    raise outcome
                yield outcome
        finally:
            stopped.set()
            threads.shutdown(wait=False)

    def run_winner(self, run: Run, run_dir: RunDir, turn: int) -> None:
        """Run the winner's job in this process, after the others have released their memory."""
        self.close()
        run_job(run, run_dir)

    def close(self, at_once: bool = False) -> None:
        """End the processes."""
        for pool in self._pools:
            pool.end(at_once)


def _next(done: queue.SimpleQueue[Any]) -> Any:
    """`queue.get()` in short timeouts, so that KeyboardInterrupt is delivered."""
    while True:
        try:
            return done.get(timeout=0.5)
        except queue.Empty:
            continue


class _Pool:
    """One process, and a new one after it has died."""

    def __init__(self, device: int):
        self._device = device
        self._executor: Any = None
        self._lock = threading.Lock()

    def run(self, request: EvaluationRequest, timeout: float | None) -> Outcome:
        """The outcome of a request; a process that dies or is late is an outcome as well."""
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        first = self._executor is None
        future = self._submit(request, timeout)
        # The process enforces its own limit; one that does not react to its timer is killed from here.
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

    def _submit(self, request: EvaluationRequest, timeout: float | None) -> Future[Outcome]:
        from joblib.externals.loky.process_executor import ProcessPoolExecutor

        with self._lock:
            if self._executor is None:
                # A killed process leaves semaphores behind, which loky's resource tracker would warn of.
                os.environ.setdefault("PYTHONWARNINGS", "ignore")
                self._executor = ProcessPoolExecutor(
                    1, initializer=_begin, initargs=(os.getpid(), dict(_environment())), timeout=None
                )
            future: Future[Outcome] = self._executor.submit(evaluate_here, request, timeout, self._device)
        return future

    def end(self, at_once: bool = True) -> None:
        """End the process, after its candidate or in the middle of it."""
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


def count_gpus() -> int:
    """GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


# ---------------------------------------------------------------- in the process

_evaluators: dict[str, CandidateEvaluator] = {}
"""What this process has loaded."""


def _begin(parent: int, environment: Mapping[str, str]) -> None:
    """Set a process up: it is quiet, and ends when its parent does."""
    import signal
    import warnings

    os.environ.update(environment)
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def evaluate_here(request: EvaluationRequest, timeout: float | None, device: int = 0) -> Outcome:
    """Evaluate a request in this process, which keeps what it has loaded for the next one.

    Args:
        request: what to evaluate.
        timeout: seconds that it may take.
        device: the GPU to use, counted from the run's own.
    """
    return evaluate_in_process(_evaluators, request, timeout, device)
