"""Who updates at the moment, beside forward and backward.

[Note: Who updates]
Where the device is the CPU, the threads that run the module: `OverlappedStep.advance` is called
often while they do, and between two of its calls disk and CPU go on beside each other.

Beside an accelerator a pump (schedule/executor.py): the threads that run the module queue kernels,
and must not be held up. `arrived` and `advance` only tell the pump. The others wait for the chunk
that it updates, no longer: who waits comes before its next turn. Whoever needs a bucket at once
updates it in its own thread.

A home on the accelerator is used by kernels that may still be queued, on a stream that is not the
pump's. Between two steps these are the last that use or edit it: those that were queued when the
step was taken, because from then on whoever touches a bucket applies its update first, and what is
held is dropped if its weights were edited. So `expect` and `take` set a mark there, and every copy
between such a home and the host waits for it, in whatever thread (A5 in tiers/accelerator.py). The
way back is simpler: a bucket is not pending any more only when the host has seen its copy end.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from offload.tiers.device import DeviceTier
from offload.tiers.uninterrupted import UninterruptedLock, uninterrupted


class Turns:
    """Lets one thread at a time update; see [Note: Who updates]. A thread has one turn at most.

    Attributes:
        has_pump: whether there is one.
        seconds: that others than the pump have had, and waited for, since the start.
    """

    def __init__(self, device: DeviceTier) -> None:
        self.has_pump = not device.host_addressable
        self.seconds = 0.0
        self._device = device
        # Who is not the pump holds both; the pump passes through the first, and works in the other.
        self._entrance = UninterruptedLock()
        self._lock = UninterruptedLock()
        self._mark = device.mark()

    @contextlib.contextmanager
    def caller(self, *, marks: bool = False) -> Iterator[None]:
        """A turn of a thread that is not the pump.

        With `marks`, what it has queued on the device is the last that uses homes there.
        """
        started = time.perf_counter()
        with self._entrance:
            try:
                if marks:
                    self._mark = self._device.mark()
                with self._working():
                    yield
            finally:
                self.seconds += time.perf_counter() - started

    @contextlib.contextmanager
    def if_free(self) -> Iterator[bool]:
        """`caller`, or at once False where another thread has the turn."""
        with uninterrupted():
            if not self._entrance.acquire(blocking=False):
                yield False
                return
            started = time.perf_counter()
            try:
                with self._working():
                    yield True
            finally:
                self.seconds += time.perf_counter() - started
                self._entrance.release()

    @contextlib.contextmanager
    def pump(self) -> Iterator[None]:
        """A turn of the pump, after those who wait."""
        with self._entrance:
            pass
        with self._working():
            yield

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        with self._lock, self._device.after(self._mark):
            yield
