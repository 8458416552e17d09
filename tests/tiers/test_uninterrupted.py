"""Ctrl-C inside a block that is to be done whole takes effect at its end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from offload.tiers.uninterrupted import (
    UninterruptedLock,
    let_signals_in,
    num_cuts,
    uninterrupted,
)
from tests.threads import run_in_threads


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_waits_for_the_end() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        interrupt()
        with uninterrupted():
            interrupt()
        done.append(1)
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_an_error_passes() -> None:
    with pytest.raises(ValueError, match="of the block"), uninterrupted():
        raise ValueError("of the block")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_that_does_not_raise_is_called_at_the_end() -> None:
    calls: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: calls.append(number))
    try:
        with uninterrupted():
            interrupt()
            interrupt()
            assert calls == []
        assert calls == [signal.SIGINT] * 2
    finally:
        signal.signal(signal.SIGINT, previous)


def test_an_ignored_signal_stays_ignored() -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            interrupt()
    finally:
        signal.signal(signal.SIGINT, previous)


def test_other_threads_have_nothing_to_hold_back() -> None:
    done = []

    def work() -> None:
        with uninterrupted():
            done.append(signal.getsignal(signal.SIGINT))

    run_in_threads(work)
    assert done == [signal.default_int_handler]


def test_a_lock_holds_signals_back() -> None:
    lock, done = UninterruptedLock(reentrant=True), []
    with pytest.raises(KeyboardInterrupt), lock:
        with lock:
            interrupt()
        done.append(1)
    assert done == [1]
    assert lock.acquire(blocking=False)
    lock.release()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1])
def test_whatever_has_a_handler_is_held_back(number: signal.Signals) -> None:
    def handle(*_: object) -> None:
        raise TimeoutError

    previous, done = signal.signal(number, handle), []
    try:
        with pytest.raises(TimeoutError), uninterrupted():
            signal.raise_signal(number)
            done.append(1)
        assert done == [1]
        assert signal.getsignal(number) is handle
    finally:
        signal.signal(number, previous)


def test_signals_come_in_where_they_may() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        let_signals_in()
        interrupt()
        done.append(1)
        let_signals_in()
        done.append(2)
    assert done == [1]
    let_signals_in()


def test_the_third_signal_is_not_held_back() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        interrupt()
        interrupt()
        done.append(1)
        interrupt()
        done.append(2)
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with uninterrupted():
        done.append(3)  # nothing of it is left


def test_a_function_is_uninterrupted() -> None:
    done = []

    @uninterrupted()
    def work() -> None:
        interrupt()
        done.append(1)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [1]


def test_a_thread_that_forks_leaves_its_block_to_the_parent() -> None:
    """The main thread is in a block while another one forks: the child is in none."""
    statuses = []

    def fork() -> None:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                with contextlib.suppress(KeyboardInterrupt), uninterrupted():
                    interrupt()
                    status = 2
                if status == 2 and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                    status = 0
            finally:
                os._exit(status)
        statuses.append(os.waitpid(pid, 0)[1])

    with uninterrupted():
        run_in_threads(fork)
    assert statuses == [0]


@contextlib.contextmanager
def handled(number: signal.Signals, handler: Callable[..., object]) -> Iterator[None]:
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, previous)


def test_a_handler_that_takes_a_lock_itself_may_come_at_any_time() -> None:
    """An alarm of every tenth of a millisecond: also while handlers are taken and given back."""
    lock, count = UninterruptedLock(reentrant=True), []

    def handle(*_: object) -> None:
        with lock:
            count.append(1)

    with handled(signal.SIGALRM, handle):
        signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
        try:
            while len(count) < 500:
                with lock:
                    pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert signal.getsignal(signal.SIGALRM) is handle
    with pytest.raises(KeyboardInterrupt), lock:
        interrupt()


def test_another_signal_that_comes_often_does_not_bring_this_one_in() -> None:
    alarms, done = [], []
    handler = handled(signal.SIGALRM, lambda *_: alarms.append(1))
    with handler, pytest.raises(KeyboardInterrupt), uninterrupted():
        interrupt()
        for _ in range(6):
            signal.raise_signal(signal.SIGALRM)
        done.append(1)
    assert done == [1]
    assert alarms


def test_who_insists_while_waiting_for_a_lock_leaves_nothing_behind() -> None:
    lock = UninterruptedLock()
    lock.acquire()
    timers = [threading.Timer(0.05 * n, interrupt) for n in range(1, 4)]
    for timer in timers:
        timer.start()
    before = num_cuts()
    with pytest.raises(KeyboardInterrupt), lock:
        pytest.fail("somebody else has it")
    for timer in timers:
        timer.join()
    assert num_cuts() == before + 1
    lock.release()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt), lock:
        interrupt()


def test_a_signal_behind_one_that_raises_is_not_lost() -> None:
    seen = []
    with handled(signal.SIGUSR1, lambda *_: seen.append(1)):
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            interrupt()
            signal.raise_signal(signal.SIGUSR1)
        assert seen == []
        with uninterrupted():
            pass
        assert seen == [1]
