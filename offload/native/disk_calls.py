"""System calls that may hang, made where nobody has to wait for ever.

[Note: disk calls]
A call about a file whose disk does not answer ends when the disk does, if ever, and cannot be taken
back. So it is made in a thread of its own, and whoever wants its result waits no longer than a
deadline after its last sign of life (`report_progress`). The calls of one `DiskCalls` are made one
after the other. A call that is left alone goes on: until it has ended, the next one waits for what
is left of its deadline and then fails. Its result is discarded, and what has to come after it is
done by its thread (`DiskCalls.tidy`).
Source: RELIABILITY promise P6.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from offload.errors import DeadlineError

_T = TypeVar("_T")
_REMEDY = "look whether the disk hangs (dmesg); if it is only slow, raise io.deadline_seconds"


class DiskCalls:
    """Makes calls; see [Note: disk calls]. For one thread at a time. A context manager.

    Its thread starts with the first call and ends with `close`. A fork starts one of its own.

    Args:
        deadline_seconds: how long a call may take from one sign of life to the next.
    """

    _left: _Call[Any] | None  # nobody waits for it any more
    _thread: threading.Thread | None

    def __init__(self, deadline_seconds: float) -> None:
        self._deadline_seconds = deadline_seconds
        self._forget_thread()

    @property
    def hangs(self) -> bool:
        """Whether a call is under way that nobody waits for any more."""
        left = self._left
        return left is not None and self._pid == os.getpid() and not left.ended.is_set()

    def make(
        self,
        operation: str,
        path: str | os.PathLike[str],
        call: Callable[[], _T],
        *,
        discard: Callable[[_T], object] | None = None,
    ) -> _T:
        """What `call` returns or raises.

        If nobody waits for it any more, because it is late or who waits was interrupted, `discard`
        takes what it returns.

        Raises:
            DeadlineError: it does not end, or the one before does not; names that.
        """
        if self._left is not None and self.hangs:
            self._wait(self._left)
        made = _Call(operation, os.fspath(path), call, discard)
        try:
            self._left = made
            self._offer(made)
            self._wait(made)
            return made.result()
        except BaseException:
            made.leave()
            raise
        finally:
            if made.ended.is_set():
                self._left = None

    def tidy(
        self, operation: str, path: str | os.PathLike[str], call: Callable[[], object]
    ) -> None:
        """Make a call now, or, if one hangs, behind it: then nobody hears of its errors.

        Raises:
            Exception: what `call` raises; nothing where the disk hangs.
        """
        left = self._left
        if left is not None and self.hangs:
            try:
                self._wait(left)
            except DeadlineError:
                if left.then(call):
                    return
        try:
            self.make(operation, path, call)
        except DeadlineError:
            if not self.hangs:
                raise

    def close(self) -> None:
        """End the thread; where it hangs, when that ends. A later call starts another."""
        thread, hangs = self._thread, self.hangs
        if self._pid == os.getpid():
            self._finalizer()
            if thread is not None and not hangs:
                thread.join()
        self._forget_thread()

    def _forget_thread(self) -> None:
        self._pid = os.getpid()
        self._left = self._thread = None
        self._calls: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        self._finalizer = weakref.finalize(self, self._calls.put, None)

    def _offer(self, call: _Call[Any]) -> None:
        if self._pid != os.getpid():
            self._forget_thread()
            self._left = call
        if self._thread is None:
            thread = threading.Thread(
                target=_serve, args=(self._calls,), name="offload-disk-calls", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # there is none to be had: at the interpreter's end, say
                call.run()
                return
            except BaseException:  # it may have started
                self._finalizer()
                self._forget_thread()
                raise
            self._thread = thread
        self._calls.put(call)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _wait(self, call: _Call[Any]) -> None:
        while not call.ended.is_set():
            left_seconds = call.alive_at + self._deadline_seconds - time.monotonic()
            if not call.ended.wait(max(left_seconds, 0)) and left_seconds <= 0:
                raise DeadlineError(
                    operation=call.operation,
                    path=call.path,
                    detail=f"it hangs: no sign of life for {self._deadline_seconds:g} s",
                    remedy=_REMEDY,
                )


def report_progress() -> None:
    """A sign of life of the call under way in this thread, if one is: its deadline begins anew."""
    call = getattr(_thread, "call", None)
    if call is not None:
        call.alive_at = time.monotonic()


class _Call(Generic[_T]):
    """One call, in its thread; `alive_at` is when it last gave a sign of life."""

    def __init__(
        self,
        operation: str,
        path: str,
        call: Callable[[], _T],
        discard: Callable[[_T], object] | None,
    ) -> None:
        self.operation = operation
        self.path = path
        self.ended = threading.Event()
        self.alive_at = time.monotonic()
        self._call = call
        self._discard = discard
        self._lock = threading.Lock()
        self._has_begun = self._has_returned = self._is_left = False
        self._results: list[_T] = []
        self._error: BaseException | None = None
        self._following: list[Callable[[], object]] = []

    def run(self) -> None:
        if not self._begin():
            return
        _thread.call = self
        try:
            self._results.append(self._call())
        except BaseException as error:  # noqa: BLE001 - `result` raises it
            self._error = error
        finally:
            _thread.call = None
        with self._lock:
            self._has_returned = True
            if not self._is_left:
                self.ended.set()
                return
        self._drop_result()
        while (following := self._next()) is not None:
            with contextlib.suppress(Exception):
                following()

    def _begin(self) -> bool:
        with self._lock:
            self._has_begun = not self._is_left
            return self._has_begun

    def result(self) -> _T:
        error, self._error = self._error, None
        if error is None:
            return self._results.pop()
        try:
            raise error
        finally:
            del error  # whose frames refer to what the call has used

    def leave(self) -> None:
        """Nobody waits any more; if it has not begun it is not made."""
        with self._lock:
            self._is_left = True
            if self._has_begun and not self._has_returned:
                return
            self.ended.set()
        self._drop_result()

    def then(self, call: Callable[[], object]) -> bool:
        """Let its thread make another call behind it; False: it has ended."""
        with self._lock:
            if self.ended.is_set():
                return False
            self._following.append(call)
            return True

    def _drop_result(self) -> None:
        if self._results and self._discard is not None:
            with contextlib.suppress(Exception):
                self._discard(self._results.pop())

    def _next(self) -> Callable[[], object] | None:
        with self._lock:
            if self._following:
                return self._following.pop(0)
            self.ended.set()
            return None


def _serve(calls: SimpleQueue[_Call[Any] | None]) -> None:
    while (call := calls.get()) is not None:
        call.run()
        del call  # an idle thread keeps nothing alive


_thread = threading.local()
