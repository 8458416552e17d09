"""The threads that run chunk updates: the only Python threads beside the storage fallback.

[Note: Compute pool]
Update kernels release the GIL and are called on fixed chunks, so the results do not depend on which
thread runs which call. The caller of `run` takes calls too: a pool of n threads starts n - 1, when
they are first needed. A call may itself call `run`: a batch never waits for a free thread.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from offload.errors import EngineStateError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")


class ComputePool:
    """Runs independent calls on a fixed number of threads.

    Thread-safe. After a fork the child's first `run` starts threads of its own; the parent's are
    not touched. After a call failed the pool is as usable as before.

    Attributes:
        threads: calls that run at the same time, the caller's own included.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"threads is {threads}, expected at least 1")
        self.threads = threads
        self._closed = False
        self._forget_threads()

    def run(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Runs every call and answers their results in order.

        Raises:
            BaseException: what the first failing call, in order, raised; all calls have ended then.
            EngineStateError: the pool is closed.
        """
        if self._closed:
            raise EngineStateError("the compute pool is closed", remedy="make a new engine")
        batch = _Batch(calls)
        extra = min(self.threads, len(calls)) - 1
        if extra > 0:
            self._offer(batch, extra)
        batch.work()
        return batch.results()

    def close(self) -> None:
        """Ends the threads once they are idle. May be called twice; does nothing in a fork."""
        self._closed = True
        if self._pid != os.getpid():
            return
        with self._ready:
            workers = list(self._workers)
            self._workers.clear()
            self._ready.notify_all()
        for worker in workers:
            worker.join()

    def _forget_threads(self) -> None:
        self._pid = os.getpid()
        self._ready = threading.Condition()
        self._offers: deque[_Batch[object]] = deque()
        self._workers: list[threading.Thread] = []

    def _offer(self, batch: _Batch[T], extra: int) -> None:
        if self._pid != os.getpid():
            # The threads are the parent's, and a lock may have been held when the fork happened.
            self._forget_threads()
        with self._ready:
            while len(self._workers) < extra:
                worker = threading.Thread(
                    target=self._serve,
                    name=f"offload-compute-{len(self._workers)}",
                    daemon=True,
                )
                self._workers.append(worker)
                worker.start()
            self._offers.extend([cast("_Batch[object]", batch)] * extra)
            self._ready.notify(extra)

    def _serve(self) -> None:
        while True:
            with self._ready:
                while not self._offers and not self._closed:
                    self._ready.wait()
                if not self._offers:
                    return
                batch = self._offers.popleft()
            batch.work()
            del batch  # an idle thread keeps no results alive


class _Batch(Generic[T]):
    """The calls of one `run`, taken one at a time by whoever is free."""

    def __init__(self, calls: Sequence[Callable[[], T]]) -> None:
        self._calls = list(calls)
        self._results: dict[int, T] = {}
        self._errors: dict[int, BaseException] = {}
        self._lock = threading.Lock()
        self._taken = 0
        self._pending = len(self._calls)
        self._ended = threading.Event()
        if not self._calls:
            self._ended.set()

    def work(self) -> None:
        """Runs calls until none is left to take; never raises what they raise."""
        while (index := self._take()) is not None:
            try:
                result = self._calls[index]()
            except BaseException as error:  # noqa: BLE001 - kept and raised again by results()
                self._finish(index, error=error)
            else:
                self._results[index] = result
                self._finish(index, error=None)

    def results(self) -> list[T]:
        """Waits until every call has ended, then answers or raises the first error in order."""
        interrupt: BaseException | None = None
        while not self._ended.is_set():
            try:
                self._ended.wait()
            except BaseException as error:  # noqa: BLE001 - raised below: the calls still run
                interrupt = error
        if interrupt is not None:
            raise interrupt
        if self._errors:
            raise self._errors[min(self._errors)]
        return [self._results[index] for index in range(len(self._calls))]

    def _take(self) -> int | None:
        with self._lock:
            if self._taken == len(self._calls):
                return None
            self._taken += 1
            return self._taken - 1

    def _finish(self, index: int, *, error: BaseException | None) -> None:
        with self._lock:
            if error is not None:
                self._errors[index] = error
            self._pending -= 1
            if self._pending == 0:
                self._ended.set()
