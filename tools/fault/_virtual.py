"""Threads that take turns on a virtual clock: one runs at a time, and a seed says which.

[Note: virtual threads] While `installed`, the modules of `offload` get their locks, conditions,
events, threads and times from here. A virtual thread is a thread of the system that runs only while
it has the turn. It gives the turn away where it would block: at a lock that is held, in a
condition, an event or a join, and where it waits for a transfer; and now and then at a lock that is
free, so that one seed after the other tries other interleavings. When nobody can run, the clock
moves on to the next end of a transfer, or to the first deadline. When there is neither, whoever
waits would wait for ever: that is a deadlock, and an error of the main thread.

So nothing depends on the machine, and a seed always gives the same run.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from offload.tiers.simulated import VirtualClock

_MOST_TURNS = 200_000  # a seed takes some hundreds
_PREEMPTED = 0.02  # of the locks that are free


class DeadlockError(AssertionError):
    """Nobody can run, nothing is under way, and no deadline is left."""


class _Over(BaseException):
    """The simulation is over: a thread that is still blocked ends."""


class VirtualThread:
    """A thread that has the turn, is ready for it, or waits for a condition or a time."""

    def __init__(
        self,
        target: Callable[[], object] | None = None,
        name: str = "main",
        args: tuple[object, ...] = (),
        daemon: bool | None = None,  # noqa: ARG002
    ) -> None:
        self.name = name
        self.condition: Callable[[], bool] | None = None  # None: ready
        self.limit_seconds = math.inf
        self.turn = threading.Lock()
        self.turn.acquire()
        self.is_over = False
        self._target = target
        self._args = args
        self._scheduler = _current()

    def start(self) -> None:
        """Be ready for a turn."""
        self._scheduler.threads.append(self)
        self._system = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._system.start()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended."""
        scheduler = self._scheduler
        limit = math.inf if timeout is None else scheduler.now_seconds + timeout
        scheduler.block(lambda: self.is_over, limit)

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return not self.is_over

    def end(self) -> None:
        """The simulation is over: let it end."""
        self.turn.release()
        self._system.join()

    def _run(self) -> None:
        self.turn.acquire()
        try:
            if not self._scheduler.is_over and self._target is not None:
                self._target(*self._args)
        except _Over:
            pass
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            self._scheduler.failures.append(error)
        finally:
            self.is_over = True
            self._scheduler.leave(self)


class Scheduler(VirtualClock):
    """A virtual clock on which threads take turns; see [Note: virtual threads].

    Attributes:
        threads: those that have not ended, the main one first.
        failures: what threads have died of.
        num_turns: how often the turn was given to somebody.
        is_stuck: why nobody can go on; empty while somebody can.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.is_over = False
        self.failures: list[BaseException] = []
        self.num_turns = 0
        self.is_stuck = ""
        self._random = random.Random(seed)
        _scheduler.append(self)
        self.main = VirtualThread()
        self.running = self.main
        self.threads = [self.main]

    def run_until(self, condition: Callable[[], bool], limit_seconds: float) -> bool:
        return self.block(condition, limit_seconds)

    def block(self, condition: Callable[[], bool], limit_seconds: float = math.inf) -> bool:
        """Let this thread wait for the condition, at most to that time; return if it holds."""
        if self.is_over:
            if condition():
                return True
            raise _Over
        me = self.running
        me.condition, me.limit_seconds = condition, limit_seconds
        self._give_turn(me)
        me.condition, me.limit_seconds = None, math.inf
        return condition()

    def may_switch(self) -> None:
        """A place at which any thread that can run may go on."""
        if len(self.threads) > 1 and not self.is_over and self._random.random() < _PREEMPTED:
            self._give_turn(self.running)

    def leave(self, thread: VirtualThread) -> None:
        """A thread has ended."""
        if thread in self.threads:
            self.threads.remove(thread)
        if not self.is_over:
            self._give_turn(None)

    def close(self) -> None:
        """End every thread but the main one."""
        self.is_over = True
        for thread in self.threads[1:]:
            thread.end()
        _scheduler.remove(self)

    def _give_turn(self, me: VirtualThread | None) -> None:
        thread = self._next()
        self.num_turns += 1
        if thread is not me:
            self.running = thread
            thread.turn.release()
            if me is not None:
                me.turn.acquire()
        if me is None:
            return
        if self.is_over and me is not self.main:
            raise _Over
        if self.is_stuck and me is self.main:
            raise DeadlockError(self.is_stuck)

    def _next(self) -> VirtualThread:
        while not self.is_stuck:
            ready = [each for each in self.threads if self._is_ready(each)]
            if self.num_turns > _MOST_TURNS:
                self.is_stuck = f"{_MOST_TURNS} turns, and no end"
            elif ready:
                return ready[0] if len(ready) == 1 else self._random.choice(ready)
            else:
                self._move_on()
        return self.main

    def _is_ready(self, thread: VirtualThread) -> bool:
        condition = thread.condition
        return condition is None or self.now_seconds >= thread.limit_seconds or condition()

    def _move_on(self) -> None:
        limit = min((thread.limit_seconds for thread in self.threads), default=math.inf)
        if self._ends and self._ends[0][0] <= limit:
            seconds, _, end = heapq.heappop(self._ends)
            self.now_seconds = max(self.now_seconds, seconds)
            end()
        elif math.isfinite(limit):
            self.now_seconds = max(self.now_seconds, limit)
        else:
            names = ", ".join(thread.name for thread in self.threads)
            self.is_stuck = f"nothing is under way, and these wait for ever: {names}"


class VirtualLock:
    """`threading.Lock`, and with `reentrant` an `RLock`."""

    def __init__(self, *, reentrant: bool = False) -> None:
        self._scheduler = _current()
        self._owner: VirtualThread | None = None
        self._count = 0
        self._reentrant = reentrant

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """As that of `threading.Lock`."""
        scheduler = self._scheduler
        scheduler.may_switch()
        me = scheduler.running
        if self._owner is not None and not (self._reentrant and self._owner is me):
            if scheduler.is_over:
                self._owner = None
            elif not blocking:
                return False
            else:
                limit = math.inf if timeout < 0 else scheduler.now_seconds + timeout
                if not scheduler.block(lambda: self._owner is None, limit):
                    return False
        self._owner = me
        self._count += 1
        return True

    def release(self) -> None:
        """As that of `threading.Lock`."""
        if self._scheduler.is_over:
            self._owner, self._count = None, 0
            return
        if self._owner is None or (self._reentrant and self._owner is not self._scheduler.running):
            raise RuntimeError("release of a lock that is not held")
        self._count -= 1
        if not self._count:
            self._owner = None

    def locked(self) -> bool:
        """Whether somebody has it."""
        return self._owner is not None

    def give_up(self) -> int:
        """Release it, however often it is held; how often that was."""
        count, self._owner, self._count = self._count, None, 0
        return count

    def take_again(self, count: int) -> None:
        """Undo `give_up`."""
        self.acquire()
        self._count = count

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class VirtualCondition:
    """`threading.Condition`."""

    def __init__(self, lock: VirtualLock | None = None) -> None:
        self._lock = VirtualLock(reentrant=True) if lock is None else lock
        self._scheduler = _current()
        self._waiting: list[list[bool]] = []  # [whether it was notified]
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def wait(self, timeout: float | None = None) -> bool:
        """As that of `threading.Condition`."""
        token = [False]
        self._waiting.append(token)
        limit = math.inf if timeout is None else self._scheduler.now_seconds + timeout
        count = self._lock.give_up()
        try:
            return self._scheduler.block(lambda: token[0], limit)
        finally:
            if not self._scheduler.is_over:
                self._lock.take_again(count)
            self._waiting = [each for each in self._waiting if each is not token]

    def notify(self, n: int = 1) -> None:
        """As that of `threading.Condition`."""
        for token in [each for each in self._waiting if not each[0]][:n]:
            token[0] = True

    def notify_all(self) -> None:
        """As that of `threading.Condition`."""
        self.notify(len(self._waiting))

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class VirtualEvent:
    """`threading.Event`."""

    def __init__(self) -> None:
        self._scheduler = _current()
        self._is_set = False

    def is_set(self) -> bool:
        """As that of `threading.Event`; in a deadlock nobody is to wait for it again."""
        return self._is_set or bool(self._scheduler.is_stuck)

    def set(self) -> None:
        """As that of `threading.Event`."""
        self._is_set = True

    def wait(self, timeout: float | None = None) -> bool:
        """As that of `threading.Event`."""
        limit = math.inf if timeout is None else self._scheduler.now_seconds + timeout
        return self._scheduler.block(self.is_set, limit)


class _Threading:
    """What modules find under the name `threading`; the rest is the real one's."""

    Lock = staticmethod(VirtualLock)
    Condition = staticmethod(VirtualCondition)
    Event = staticmethod(VirtualEvent)
    Thread = staticmethod(VirtualThread)

    @staticmethod
    def RLock() -> VirtualLock:  # noqa: N802 - the name of `threading`
        return VirtualLock(reentrant=True)

    @staticmethod
    def current_thread() -> VirtualThread:
        return _current().running

    @staticmethod
    def main_thread() -> VirtualThread:
        return _current().main

    def __getattr__(self, name: str) -> Any:
        return getattr(threading, name)


class _Time:
    """What modules find under the name `time`."""

    @staticmethod
    def monotonic() -> float:
        return _current().now_seconds

    @staticmethod
    def sleep(seconds: float) -> None:
        _current().advance(seconds)

    perf_counter = monotonic

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


_scheduler: list[Scheduler] = []


def _current() -> Scheduler:
    return _scheduler[-1]


# These never wait, and are used by what is not simulated as well.
_REAL = ("offload.native", "offload.config", "offload.cli", "offload.optim.compilation")
_CLOCK = "offload.tiers.simulated"  # what it locks is the clock itself


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Inside, modules of `offload` that have been imported use what is here."""
    replaced: list[tuple[Any, str, Any]] = []
    put = [("threading", threading, _Threading()), ("time", time, _Time())]
    for name, module in list(sys.modules.items()):
        if name.startswith("offload.") and name != _CLOCK and not name.startswith(_REAL):
            for name_of, real, virtual in put:
                if getattr(module, name_of, None) is real:
                    replaced.append((module, name_of, real))
                    setattr(module, name_of, virtual)
    try:
        yield
    finally:
        for module, name, real in replaced:
            setattr(module, name, real)
