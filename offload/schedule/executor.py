"""The threads beside those of the user: for chunk updates, and for what takes long.

[Note: Compute pool]
Update kernels release the GIL and are called on fixed chunks, so the results do not depend on which
thread runs which call. The caller of `run` takes calls too: a pool of n threads starts n - 1, when
they are first needed. A call may itself call `run`: a batch never waits for a free thread.

[Note: Pump]
A thread that queues kernels for an accelerator must not stop to update a chunk. A *pump* takes such
work turn by turn in a thread of its own. It sleeps until `notify`; from then on a turn says which
transfers to wait for before the next one, and when it names none the pump sleeps again. What does
not end within its deadline is not waited for a second time without a `notify`.

No turn is under way when the process forks, so a child finds no lock held that a turn has taken;
it has no pump. At the end of the interpreter, and when nobody refers to the pump any more, no
further turn begins.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from offload.errors import DeadlineError, EngineStateError, OffloadError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from offload.tiers.transfer import Transfer

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


class Pump:
    """Takes turns in a thread of its own; see [Note: Pump]. Thread-safe.

    The thread starts with the first `notify`. An error that a turn raises is the last of it: the
    pump takes no other until `forget_error`, and `raise_error` says so to whoever asks.

    Args:
        turn: a method; what it returns is waited for before it is called again. The pump does not
            keep its object alive.
        name: of the thread.
        what: it does, for messages.
    """

    def __init__(self, turn: Callable[[], Sequence[Transfer]], *, name: str, what: str) -> None:
        self._name = name
        self._what = what
        self._work = _PumpWork(weakref.WeakMethod(turn))
        self._thread: threading.Thread | None = None
        self._finalizer = weakref.finalize(self, self._work.stop)
        _living.add(self._work)

    def notify(self) -> None:
        """There may be something to do. Returns at once; in a fork, and after `close`, in vain."""
        work = self._work
        if not work.is_usable:
            return
        with work.wake:
            work.is_due = True
            work.wake.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=work.serve, name=self._name, daemon=True)
                self._thread.start()

    def raise_error(self) -> None:
        """Raises OffloadError if a turn has failed, every time until `forget_error`."""
        error = self._work.error
        if error is not None:
            raise OffloadError(
                f"{self._what} failed: {type(error).__name__}: {error}",
                remedy="load a checkpoint, or close the engine",
            ) from error

    def fail(self, error: BaseException) -> None:
        """A turn has failed, and says so before anybody else can go on."""
        self._work.error = error

    def forget_error(self) -> None:
        """What a failed turn has left behind is of no consequence any more."""
        self._work.error = None

    def close(self) -> None:
        """Ends the thread, after its turn and what it waits for. Does nothing in a fork.

        No later than the deadline of the transfer that it waits for.
        """
        self._finalizer()
        thread = self._thread
        if self._work.is_own and thread is not None and thread is not threading.current_thread():
            thread.join()


class Background:
    """Runs one call at a time in a thread of its own. For one user thread.

    The interpreter does not end before the call has. In a forked child nothing runs.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        self._call: _BackgroundCall | None = None
        self._error: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a call is under way."""
        call = self._call
        return call is not None and self._pid == os.getpid() and not call.ended.is_set()

    def start(self, call: Callable[[], None]) -> None:
        """Start a call; the one before has ended, and its error has been raised.

        If an interrupt comes while it starts, the call is not made or has ended.
        """
        assert not self.is_busy, "one call at a time"
        self._call = started = _BackgroundCall(call)
        self._thread = threading.Thread(target=self._run, args=(started,), name=self._name)
        try:
            self._thread.start()
        except BaseException:
            if started.take():
                started.ended.set()
            started.ended.wait()
            raise

    def keep(self, error: BaseException) -> None:
        """Let `raise_error` raise this, unless there is something to raise already."""
        self._error = self._error or error

    def raise_error(self) -> None:
        """Raises, once, what a call that has ended has raised."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """`join`, and `raise_error`."""
        self.join()
        self.raise_error()

    def join(self) -> None:
        """Wait for the end of the call, in any thread."""
        call, thread = self._call, self._thread
        if call is not None and thread is not None and self._pid == os.getpid():
            call.ended.wait()
            if thread.is_alive():
                thread.join()

    def _run(self, call: _BackgroundCall) -> None:
        if not call.take():
            return
        try:
            call.make()
        except BaseException as error:  # noqa: BLE001 - `raise_error` raises it
            self._error = error
        finally:
            call.ended.set()


class _BackgroundCall:
    """A call that is made by its thread or taken back by who starts that: by who comes first."""

    def __init__(self, make: Callable[[], None]) -> None:
        self.make = make
        self.ended = threading.Event()
        self._taken = threading.Lock()

    def take(self) -> bool:
        """Whether the caller is the first."""
        return self._taken.acquire(blocking=False)


class _PumpWork:
    """What a pump and its thread share: the thread refers to nothing else while it sleeps."""

    def __init__(self, turn: weakref.WeakMethod[Callable[[], Sequence[Transfer]]]) -> None:
        self.wake = threading.Condition()
        self.is_due = False
        self.error: BaseException | None = None
        self.turning = threading.RLock()  # a turn is under way
        self._turn = turn
        self._closed = False
        self._pid = os.getpid()

    @property
    def is_own(self) -> bool:
        """Whether the thread is one of this process."""
        return self._pid == os.getpid()

    @property
    def is_usable(self) -> bool:
        return self.is_own and not self._closed and self.error is None

    def serve(self) -> None:
        while self._is_wanted():
            try:
                self._take_turns()
            except BaseException as error:  # noqa: BLE001 - `raise_error` tells of it
                self.error = error

    def stop(self) -> None:
        """Let no further turn begin, and wait for the one that is under way."""
        if not self.is_own:
            return
        with self.wake:
            self._closed = True
            self.wake.notify()
        with self.turning:
            pass

    def _is_wanted(self) -> bool:
        with self.wake:
            while not (self.is_due or self._closed):
                self.wake.wait()
            self.is_due = False
            return not self._closed

    def _take_turns(self) -> None:
        while transfers := self._take_turn():
            for transfer in transfers:
                try:
                    transfer.wait()
                except DeadlineError:
                    return
                except OffloadError:
                    continue  # the next turn finds it, and knows whose it is

    def _take_turn(self) -> Sequence[Transfer]:
        with self.turning:
            turn = self._turn()
            return turn() if turn is not None and self.is_usable else ()


_living: weakref.WeakSet[_PumpWork] = weakref.WeakSet()
_held: list[_PumpWork] = []  # while the process forks


def _hold_pumps() -> None:
    for work in list(_living):
        work.turning.acquire()
        _held.append(work)


def _let_go_of_pumps() -> None:
    while _held:
        _held.pop().turning.release()


os.register_at_fork(
    before=_hold_pumps, after_in_parent=_let_go_of_pumps, after_in_child=_let_go_of_pumps
)
