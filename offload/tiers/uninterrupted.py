"""Ctrl-C and other signals are held back while state and its book-keeping are changed.

[Note: Signals]
Python runs signal handlers in its main thread, between any two bytecodes there. One that raises, as
that of Ctrl-C does, would come between the start of a transfer and the line that remembers it: its
memory or its extent would be given away while bytes still move there, and later reads would find
what nobody has written. So the main thread holds signals back wherever two things must change
together: in `uninterrupted` blocks, and while it has an `UninterruptedLock`. They take effect when
the outermost such block ends, or where `let_signals_in` says that all is in order. In a block, an
error of a transfer is the only thing that can cut work off, and that is provided for (P18). Of
several signals, others behind one whose handler raises take effect at the end of the next block.

What is held back waits as long as the block waits, that is for transfers up to their deadline. The
third signal of a kind is not held back any more: whoever insists ends what hangs. If its handler
raises, something has been changed by half: `num_cuts` tells it to the engines, which refuse all but
a load and `close` from then on.

A handler may itself enter blocks, whenever it comes: the depth is counted before the first handler
is taken and until the last one is back, and only the outermost block touches them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading

# The functions below signal's own, whose conversions from and to enums cost more than a lock.
from _signal import getsignal  # type: ignore[import-not-found]
from _signal import signal as set_handler
from collections.abc import Callable
from types import FrameType, TracebackType

# What is sent to ask for something, so that a handler may raise.
_NUMBERS = tuple(
    int(number)
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGALRM,
        signal.SIGUSR1,
        signal.SIGUSR2,
    )
)
_MOST_HELD = 2  # signals of a kind in a block

# Of the main thread only; nothing else reads or writes these.
_main_thread = threading.main_thread().ident
_depth = 0  # blocks it is in
_handlers: dict[int, Callable[[int, FrameType | None], object]] = {}  # of who is held back
_held: list[int] = []  # what came meanwhile
_num_cuts = 0


class uninterrupted(contextlib.ContextDecorator):  # noqa: N801  a block, read as a word
    """For a block or a function that has to be done whole; see [Note: Signals].

    It may be inside another.

    Other threads than the main one need nothing.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        hold_back()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        let_go()


class UninterruptedLock:
    """A lock whose holder is `uninterrupted`. `acquire` and `release` are those of the lock alone.

    `reentrant`: a thread may take it several times.
    """

    __slots__ = ("_lock", "acquire", "release")

    def __init__(self, *, reentrant: bool = False) -> None:
        self._lock = threading.RLock() if reentrant else threading.Lock()
        self.acquire = self._lock.acquire
        self.release = self._lock.release

    def condition(self) -> threading.Condition:
        """A condition to wait for by who has the lock; it is not to be entered itself."""
        return threading.Condition(self._lock)

    def __enter__(self) -> None:
        hold_back()
        try:
            self.acquire()
        except BaseException:
            let_go()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.release()
        finally:
            let_go()


def num_cuts() -> int:
    """How often a signal that was not held back any more has ended a block by an error."""
    return _num_cuts


def hold_back() -> None:
    """Begin a block; `let_go` has to end it."""
    global _depth  # noqa: PLW0603  the signals are the process's
    if threading.get_ident() != _main_thread:
        return
    _depth += 1
    if _depth > 1:
        return
    try:
        for number in _NUMBERS:
            handler = getsignal(number)
            if callable(handler) and handler is not _note:
                _handlers[number] = handler
                set_handler(number, _note)
    except BaseException:  # of a handler whose turn had not come
        let_go()
        raise


def let_go() -> None:
    """End a block; at the end of the outermost one, what was held back takes effect.

    Raises:
        BaseException: what the handlers raise.
    """
    global _depth  # noqa: PLW0603
    if threading.get_ident() != _main_thread:
        return
    if _depth > 1:
        _depth -= 1
        return
    try:
        _restore()
    finally:
        _depth = 0
    _deliver(signal.raise_signal)


def let_signals_in() -> None:
    """What is held back takes effect now: all is in order, also if it raises.

    Raises:
        BaseException: what the handlers raise.
    """
    if threading.get_ident() == _main_thread:
        _deliver(_take)


def _deliver(deliver: Callable[[int], object]) -> None:
    """Deliver what is held; behind one that raises, others of its kind are not."""
    while _held:
        number = _held.pop(0)
        try:
            deliver(number)
        except BaseException:
            _held[:] = [each for each in _held if each != number]
            raise


def _note(number: int, _frame: FrameType | None) -> None:
    """The handler while signals are held back."""
    global _num_cuts  # noqa: PLW0603
    if _held.count(number) < _MOST_HELD:
        _held.append(number)
        return
    _held[:] = [each for each in _held if each != number]
    try:
        _take(number)
    except BaseException:
        _num_cuts += 1
        raise


def _take(number: int) -> None:
    handler = _handlers.get(number) or getsignal(number)
    if callable(handler) and handler is not _note:
        handler(number, sys._getframe(1))


def _restore() -> None:
    """Give the signals their handlers back, also if one of these raises at once."""
    try:
        while _handlers:
            number = next(iter(_handlers))
            if getsignal(number) is _note:
                set_handler(number, _handlers[number])
            del _handlers[number]
    finally:
        if _handlers:
            _restore()


def _after_fork() -> None:
    """The thread that has forked is the child's main thread."""
    global _main_thread, _depth
    if threading.get_ident() != _main_thread:
        _main_thread, _depth = threading.get_ident(), 0
        _held.clear()
        _restore()


os.register_at_fork(after_in_child=_after_fork)
