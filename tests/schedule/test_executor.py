from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection

import pytest

from offload.errors import DeadlineError, EngineStateError, OffloadError, StorageError
from offload.schedule.executor import Background, ComputePool, Pump
from offload.tiers.transfer import CompletedTransfer, Transfer


@pytest.fixture
def pool() -> Iterator[ComputePool]:
    pool = ComputePool(3)
    yield pool
    pool.close()


def pool_threads() -> list[str]:
    return sorted(t.name for t in threading.enumerate() if t.name.startswith("offload-compute"))


def test_results_are_in_the_order_of_the_calls(pool: ComputePool) -> None:
    def call(index: int) -> Callable[[], int]:
        def slower_first() -> int:
            time.sleep(0.002 * (5 - index))
            return index

        return slower_first

    assert pool.run([call(i) for i in range(5)]) == [0, 1, 2, 3, 4]
    assert pool.run([]) == []


def test_threads_start_when_needed_and_end_with_the_pool() -> None:
    pool = ComputePool(3)
    assert pool_threads() == []
    caller = threading.get_ident()
    assert pool.run([threading.get_ident]) == [caller]
    assert pool_threads() == [], "one call needs no thread"
    pool.run([lambda: None] * 2)
    assert pool_threads() == ["offload-compute-0"]
    pool.run([lambda: None] * 9)
    assert pool_threads() == ["offload-compute-0", "offload-compute-1"]
    pool.close()
    pool.close()
    assert pool_threads() == []
    with pytest.raises(EngineStateError, match="closed"):
        pool.run([lambda: None])


def test_as_many_calls_run_at_once_as_the_pool_has_threads(pool: ComputePool) -> None:
    barrier = threading.Barrier(3, timeout=20)
    pool.run([barrier.wait] * 3)


def test_all_calls_end_before_the_first_error_is_raised(pool: ComputePool) -> None:
    ended: list[int] = []

    def late(index: int) -> None:
        time.sleep(0.02)
        ended.append(index)

    def fail(message: str) -> None:
        raise ValueError(message)

    def slow_fail() -> None:
        time.sleep(0.02)
        fail("second call, first in order")

    calls = [lambda: late(0), slow_fail, lambda: fail("third call"), lambda: late(1)]
    with pytest.raises(ValueError, match="first in order"):
        pool.run(calls)
    assert sorted(ended) == [0, 1]
    assert pool.run([lambda: 1, lambda: 2]) == [1, 2]


def test_a_call_may_run_calls(pool: ComputePool) -> None:
    def inner(base: int) -> int:
        return sum(pool.run([lambda: base, lambda: base + 1, lambda: base + 2]))

    assert pool.run([lambda b=b: inner(b) for b in range(8)]) == [3 * b + 3 for b in range(8)]


def test_several_threads_share_the_pool(pool: ComputePool) -> None:
    answers: dict[int, list[int]] = {}

    def use(number: int) -> None:
        answers[number] = pool.run([lambda i=i: number * 100 + i for i in range(50)])

    users = [threading.Thread(target=use, args=(n,)) for n in range(4)]
    for user in users:
        user.start()
    for user in users:
        user.join(20)
    assert answers == {n: [n * 100 + i for i in range(50)] for n in range(4)}


def _run_in_fork(pool: ComputePool, parent_pid: int, out: Connection) -> None:
    assert os.getpid() != parent_pid
    results = pool.run([lambda i=i: i * i for i in range(20)])
    started = pool_threads()
    pool.close()
    out.send((results, started, pool_threads()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_gets_threads_of_its_own(pool: ComputePool) -> None:
    pool.run([lambda: None] * 5)
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_run_in_fork, args=(pool, os.getpid(), send))
    child.start()
    assert receive.poll(20), "the child hangs"
    assert receive.recv() == (
        [i * i for i in range(20)],
        ["offload-compute-0", "offload-compute-1"],
        [],
    )
    child.join(20)
    assert child.exitcode == 0
    assert len(pool_threads()) == 2, "the parent keeps its threads"
    assert pool.run([lambda: 1] * 4) == [1] * 4


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_closing_an_inherited_pool_in_a_fork_returns_at_once(pool: ComputePool) -> None:
    pool.run([lambda: None] * 5)
    child = multiprocessing.get_context("fork").Process(target=pool.close)
    child.start()
    child.join(20)
    assert child.exitcode == 0


def test_a_pool_needs_a_thread() -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        ComputePool(0)


class Gate(CompletedTransfer):
    """A transfer that ends when it is told, or that fails."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("cpu")
        self.opened = threading.Event()
        self.reached = threading.Event()
        self.error = error

    def wait(self, timeout: float | None = None) -> None:
        del timeout
        self.reached.set()
        if self.error is not None:
            raise self.error
        assert self.opened.wait(SECONDS)


SECONDS = 20.0


class Worker:
    """Counts the turns of its pump; each waits for the next of some transfers."""

    def __init__(self, *transfers: Transfer) -> None:
        self.turns = 0
        self.transfers = list(transfers)
        self.error: BaseException | None = None
        self.pump = Pump(self.turn, name="offload-test", what="the work")

    def turn(self) -> Sequence[Transfer]:
        self.turns += 1
        if self.error is not None:
            raise self.error
        return [self.transfers.pop(0)] if self.transfers else []

    def has_taken(self, turns: int) -> bool:
        limit = time.monotonic() + SECONDS
        while self.turns < turns and time.monotonic() < limit:
            time.sleep(0.001)
        time.sleep(0.02)  # for one too many
        return self.turns == turns


def pump_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "offload-test"]


def test_a_pump_sleeps_until_it_is_told_or_what_it_waits_for_has_ended() -> None:
    gate = Gate()
    worker = Worker(gate, CompletedTransfer("cpu"))
    assert pump_threads() == [], "there was nothing to do yet"
    worker.pump.notify()
    assert gate.reached.wait(SECONDS)
    assert worker.has_taken(1)
    worker.pump.notify()
    assert worker.has_taken(1), "it waits"
    gate.opened.set()
    assert worker.has_taken(4), "one after each transfer, and one for the notice"
    worker.pump.notify()
    assert worker.has_taken(5)
    worker.pump.close()
    worker.pump.notify()
    worker.pump.close()
    assert pump_threads() == []
    assert worker.turns == 5


def test_a_transfer_that_fails_is_for_the_next_turn_and_a_late_one_for_the_next_notice() -> None:
    failed = StorageError(operation="read", path="p")
    late = DeadlineError(operation="read", path="p")
    worker = Worker(Gate(failed), Gate(late), CompletedTransfer("cpu"))
    worker.pump.notify()
    assert worker.has_taken(2)
    worker.pump.notify()
    assert worker.has_taken(4)
    worker.pump.close()


def test_what_a_turn_raises_is_told_until_it_is_forgotten() -> None:
    worker = Worker()
    worker.error = KeyError("broken")
    worker.pump.raise_error()
    worker.pump.notify()
    assert worker.has_taken(1)
    for _ in range(2):
        with pytest.raises(OffloadError, match="the work failed: KeyError: 'broken'") as raised:
            worker.pump.raise_error()
        assert raised.value.__cause__ is worker.error
        worker.pump.notify()
    assert worker.has_taken(1), "nothing is built on what has failed"
    worker.error = None
    worker.pump.forget_error()
    worker.pump.raise_error()
    worker.pump.notify()
    assert worker.has_taken(2)
    worker.pump.close()


def test_closing_a_pump_waits_for_its_turn() -> None:
    ended = []

    class Slow(Worker):
        def turn(self) -> Sequence[Transfer]:
            self.turns += 1
            time.sleep(0.1)
            ended.append(True)
            return [CompletedTransfer("cpu")]  # without end

    slow = Slow()
    slow.pump.notify()
    while not slow.turns:
        time.sleep(0.001)
    slow.pump.close()
    assert len(ended) == slow.turns
    assert pump_threads() == []


def test_a_pump_ends_with_the_object_it_works_for() -> None:
    worker = Worker()
    worker.pump.notify()
    assert worker.has_taken(1)
    (thread,) = pump_threads()
    del worker
    gc.collect()
    thread.join(SECONDS)
    assert not thread.is_alive()


class Locked:
    """A pump whose turns hold a lock most of the time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pump = Pump(self.turn, name="offload-test", what="the work")

    def turn(self) -> Sequence[Transfer]:
        with self.lock:
            time.sleep(0.002)
        return [CompletedTransfer("cpu")]


def _take_lock(locked: Locked, out: Connection) -> None:
    taken = locked.lock.acquire(timeout=5)
    locked.pump.notify()
    locked.pump.close()
    out.send((taken, pump_threads()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_finds_no_lock_of_a_turn_and_has_no_pump() -> None:
    locked = Locked()
    locked.pump.notify()
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=_take_lock, args=(locked, send))
        child.start()
        assert receive.poll(SECONDS), "the child hangs"
        assert receive.recv() == (True, [])
        child.join(SECONDS)
    assert len(pump_threads()) == 1, "the parent keeps its own"
    locked.pump.close()


@pytest.mark.parametrize("when", ["before the thread", "while it starts"])
def test_an_interrupt_while_a_background_call_starts(
    monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    background = Background("test")
    made = []
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if when == "while it starts":
            start(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            background.start(lambda: made.append(1))
    assert not background.is_busy, "not made, or through"
    assert made in ([], [1])
    assert when == "while it starts" or not made
    background.wait()
    background.start(lambda: made.append(2))
    background.wait()
    assert made[-1] == 2
