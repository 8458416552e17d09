from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import pytest

from offload.errors import EngineStateError
from offload.schedule.executor import ComputePool


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
