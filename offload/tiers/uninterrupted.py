"""Ctrl-C and other signals are held back while state and its book-keeping are changed.

[Note: Signals]
Python runs signal handlers in its main thread, between any two bytecodes there. One that raises, as
that of Ctrl-C does, would come between the start of a transfer and the line that remembers it: its
memory or its extent would be given away while bytes still move there, and later reads would find
what nobody has written. So the main thread holds signals back wherever two things must change
together: in `uninterrupted` blocks, and while it has an `UninterruptedLock`. They take effect when
the outermost such block ends, or where `let_signals_in` says that all is in order. In a block, an
error of a transfer is the only thing that can cut work off, and that is provided for (P18).

What is held back waits as long as the block waits, that is for transfers up to their deadline. The
third signal of a kind is not held back any more: whoever insists ends what hangs.
"""

from __future__ import annotations

import contextlib
import os
import signal
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
_held: list[tuple[int, FrameType | None]] = []  # what came meanwhile


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
        self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
        let_go()


def hold_back() -> None:
    """Begin a block; `let_go` has to end it."""
    global _depth  # noqa: PLW0603  the signals are the process's
    if threading.get_ident() != _main_thread:
        return
    if not _depth:
        try:
            for number in _NUMBERS:
                handler = getsignal(number)
                if callable(handler):
                    _handlers[number] = handler
                    set_handler(number, _note)
        except BaseException:  # of a handler whose turn had not come
            _restore()
            raise
    _depth += 1


def let_go() -> None:
    """End a block; at the end of the outermost one, what was held back takes effect.

    Raises:
        BaseException: what the handlers raise.
    """
    global _depth  # noqa: PLW0603
    if threading.get_ident() != _main_thread:
        return
    _depth -= 1
    if not _depth:
        handlers = dict(_handlers)
        _restore()
        if _held:
            _deliver(handlers)


def let_signals_in() -> None:
    """What is held back takes effect now: all is in order, also if it raises.

    Raises:
        BaseException: what the handlers raise.
    """
    if _held and threading.get_ident() == _main_thread:
        _deliver(_handlers)


def _note(number: int, frame: FrameType | None) -> None:
    """The handler while signals are held back."""
    _held.append((number, frame))
    if sum(each == number for each, _ in _held) > _MOST_HELD:
        _deliver(_handlers)


def _deliver(handlers: dict[int, Callable[[int, FrameType | None], object]]) -> None:
    """Call the handlers in order, up to one that raises: that ends whatever was asked to end."""
    held = list(_held)
    _held.clear()
    for number, frame in held:
        handlers[number](number, frame)


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
