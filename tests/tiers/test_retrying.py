"""Requests that fail for a reason that may pass are made again, a bounded number of times."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload.errors import ChecksumError, DeadlineError, EngineStateError, StorageError
from offload.native import IoEngine
from offload.telemetry import RetryLog
from offload.tiers import retrying
from offload.tiers.nvme import NvmeStore
from offload.tiers.retrying import TRANSIENT, RetryingIo, RetryingTicket
from offload.tiers.transfer import Urgency
from tests.threads import run_in_threads

NBYTES = 3 * 4096
Open = Callable[..., tuple[NvmeStore, RetryLog]]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "_FIRST_PAUSE_SECONDS", 0.002)
    monkeypatch.setattr(retrying, "_PAUSE_GROWTH", 2.0)


@pytest.fixture
def open_store(tmp_path: Path, quick: None) -> Iterator[Open]:
    closing: list[Callable[[], None]] = []

    def make(fault: str, *, retries: int = 3, deadline: float = 20.0) -> tuple[NvmeStore, RetryLog]:
        io = IoEngine(backend="threads", threads=2, fault=fault)
        log = RetryLog()
        wrapped = RetryingIo(io, retries=retries, log=log)
        store = NvmeStore([tmp_path], wrapped, deadline_seconds=deadline)
        closing.extend((lambda: io.close(1.0), store.close))
        return store, log

    yield make
    for close in reversed(closing):
        try:
            close()
        except (DeadlineError, StorageError):  # what a test has left hanging or failing
            continue


def filled(value: int) -> torch.Tensor:
    return torch.full((NBYTES,), value, dtype=torch.uint8)


@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_error_that_passes_is_healed_and_counted(
    operation: str, count: int, open_store: Open
) -> None:
    store, log = open_store(f"op={operation},count={count},errno={errno.EIO}")
    (record,) = store.reserve([("weights", NBYTES)], spare=1)
    store.start_write(record, filled(7)).wait()
    found = filled(0)
    store.start_read(record, found).wait()
    assert found.unique().tolist() == [7]
    assert record.generation == 1
    assert log.report().count == count
    assert f"{operation} of " in log.report().last
    assert "disk: " in log.report().last


@pytest.mark.parametrize("operation", ["read", "write"])
def test_one_that_stays_is_raised_with_the_disk_the_file_the_extent_and_the_record(
    operation: str, open_store: Open, tmp_path: Path
) -> None:
    store, log = open_store(f"op={operation},nth=2,count=0,errno={errno.EIO}")
    (record,) = store.reserve([("weights of bucket 3 (a.weight and 2 more)", NBYTES)], spare=1)
    store.start_write(record, filled(7)).wait()
    found = filled(0)
    if operation == "read":
        store.start_read(record, found).wait()
    with pytest.raises(StorageError) as caught:
        if operation == "read":
            store.start_read(record, found).wait()
        else:
            store.start_write(record, filled(9)).wait()
    error = caught.value
    assert (error.errno, error.num_tries, error.nbytes) == (errno.EIO, 4, NBYTES)
    assert error.offset is not None
    assert log.report().count == 3, "the last one is raised, not counted"
    for part in (
        f"{operation} of weights of bucket 3 (a.weight and 2 more) in {tmp_path}",
        "after 4 tries [EIO]",
        "mounted at",
        "backing file number 0",
    ):
        assert part in str(error)
    assert record.generation == 1


def test_a_failed_write_leaves_the_last_version(open_store: Open) -> None:
    store, _ = open_store(f"op=write,nth=2,count=4,errno={errno.EIO}")
    (record,) = store.reserve([("weights", NBYTES)], spare=1)
    store.start_write(record, filled(7)).wait()
    with pytest.raises(StorageError):
        store.start_write(record, filled(9)).wait()
    found = filled(0)
    store.start_read(record, found).wait()
    assert found.unique().tolist() == [7]
    store.start_write(record, filled(9)).wait()
    store.start_read(record, found).wait()
    assert found.unique().tolist() == [9]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.ENODATA, errno.EILSEQ])
def test_what_does_not_pass_is_raised_at_once(code: int, open_store: Open) -> None:
    assert code not in TRANSIENT
    store, log = open_store(f"op=write,count=1,errno={code}")
    (record,) = store.reserve([("weights", NBYTES)], spare=1)
    with pytest.raises(StorageError) as caught:
        store.start_write(record, filled(7)).wait()
    assert caught.value.num_tries == 1
    assert "tries" not in str(caught.value)
    assert log.report().count == 0


def test_damage_is_not_read_again(open_store: Open) -> None:
    store, log = open_store("op=read,count=1,corrupt=1")
    (record,) = store.reserve([("weights", NBYTES)], spare=1)
    store.start_write(record, filled(7)).wait()
    with pytest.raises(ChecksumError, match=r"disk: .*backing file number 0"):
        store.start_read(record, filled(0)).wait()
    assert log.report().count == 0


def test_without_retries_the_first_error_is_raised(open_store: Open) -> None:
    store, log = open_store("op=write,count=1,errno=5", retries=0)
    (record,) = store.reserve([("weights", NBYTES)], spare=1)
    with pytest.raises(StorageError):
        store.start_write(record, filled(7)).wait()
    assert log.report().count == 0


def test_who_only_asks_gets_it_done_too(open_store: Open) -> None:
    store, log = open_store("op=write,count=2,errno=5")
    (record,) = store.reserve([("weights", NBYTES)], spare=1)
    transfer = store.start_write(record, filled(7))
    deadline = time.monotonic() + 20
    while not transfer.done():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert log.report().count == 2
    transfer.wait(0.0)
    assert record.generation == 1


def test_a_deadline_counts_from_the_first_try(open_store: Open) -> None:
    store, log = open_store("op=write,count=1,errno=5;op=write,count=0,drop=1", deadline=0.3)
    (record,) = store.reserve([("weights", NBYTES)], spare=1)
    started = time.monotonic()
    with pytest.raises(DeadlineError, match="disk: "):
        store.start_write(record, filled(7)).wait()
    assert time.monotonic() - started < 5
    assert log.report().count == 1


class Try:
    """One try of a request, which ends when a test says so."""

    def __init__(self, urgency: int) -> None:
        self.urgency = urgency
        self.error: StorageError | None = None
        self.ended = threading.Event()

    def end(self, code: int = 0) -> None:
        if code:
            self.error = StorageError(operation="read", path="disk", errno=code)
        self.ended.set()

    def expedite(self, urgency: int) -> None:
        self.urgency = min(self.urgency, urgency)

    def done(self) -> bool:
        return self.ended.is_set()

    def wait(self, timeout: float | None = None) -> int:
        if not self.ended.wait(timeout):
            raise DeadlineError(operation="read", path="disk")
        if self.error is not None:
            raise self.error
        return 42


class Tries:
    """Starts tries, and remembers them."""

    def __init__(self) -> None:
        self.made: list[Try] = []
        self.refuses = False

    def __call__(self, *, urgency: int) -> Any:
        if self.refuses:
            raise EngineStateError("closed")
        self.made.append(Try(urgency))
        return self.made[-1]


def ticket_of(tries: Tries, *, retries: int = 3) -> RetryingTicket:
    return RetryingTicket(tries, Urgency.BULK, retries=retries, log=RetryLog())


@pytest.mark.usefixtures("quick")
def test_the_next_try_is_as_urgent_as_the_last_has_become() -> None:
    tries = Tries()
    ticket = ticket_of(tries)
    ticket.expedite(Urgency.DEMAND)
    assert tries.made[0].urgency == Urgency.DEMAND
    tries.made[0].end(errno.EIO)
    assert not ticket.done()
    time.sleep(0.01)
    assert not ticket.done()
    assert [each.urgency for each in tries.made] == [Urgency.DEMAND] * 2
    tries.made[1].end()
    assert ticket.done()
    assert ticket.wait() == ticket.wait(0.0) == 42


def test_pauses_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    now = [100.0]

    def sleep(seconds: float) -> None:
        slept.append(round(seconds, 6))
        now[0] += seconds

    clock = SimpleNamespace(sleep=sleep, monotonic=lambda: now[0])
    monkeypatch.setattr(retrying, "time", clock)
    log = RetryLog()

    def start(*, urgency: int) -> Any:
        made = Try(urgency)
        made.end(errno.EIO)
        return made

    ticket = RetryingTicket(start, Urgency.BULK, retries=3, log=log)
    with pytest.raises(StorageError):
        ticket.wait()
    assert slept == [0.02, 0.1, 0.5]
    with pytest.raises(StorageError):
        ticket.wait()
    assert len(slept) == log.report().count == 3


@pytest.mark.usefixtures("quick")
def test_an_engine_that_is_closed_meanwhile() -> None:
    tries = Tries()
    ticket = ticket_of(tries)
    tries.made[0].end(errno.EIO)
    tries.refuses = True
    with pytest.raises(EngineStateError):
        ticket.wait()
    assert ticket.done()


@pytest.mark.usefixtures("quick")
def test_several_threads_wait_for_one_request() -> None:
    """Each try is made once, however many have seen the one before it fail."""
    tries = Tries()
    log = RetryLog()
    ticket = RetryingTicket(tries, Urgency.BULK, retries=3, log=log)
    found: list[int] = []

    def work(number: int) -> None:
        if number == 0:
            for index in range(3):
                while len(tries.made) <= index:
                    time.sleep(0.001)
                tries.made[index].end(errno.EIO if index < 2 else 0)
        elif number % 2:
            found.append(ticket.wait(20.0))
        else:
            while not ticket.done():
                time.sleep(0.001)
            found.append(ticket.wait(0.0))

    run_in_threads(*(partial(work, number) for number in range(7)))
    assert found == [42] * 6
    assert len(tries.made) == 3
    assert log.report().count == 2
