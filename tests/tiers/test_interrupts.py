"""An interrupt anywhere in the NVMe tier: no transfer is forgotten, nothing of it is given away."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from offload.native import IoEngine, IoFile
from offload.tiers.extents import ExtentPool
from offload.tiers.nvme import NvmeStore
from offload.tiers.records import Record
from offload.tiers.transfer import AsyncIo, Urgency
from tests.interrupts import InterruptAt, at_every_line

PAGE = 4096
_TIER = ("tiers/", "native/")


@dataclass
class LateTicket:
    """A request whose bytes move when somebody waits for it, or for one that was made before."""

    io: LateIo
    start: Callable[[], Any]
    writes: tuple[IoFile, int] | None
    ticket: Any = None

    def expedite(self, urgency: int) -> None:
        del urgency

    def done(self) -> bool:
        return self.ticket is not None

    def wait(self, timeout: float | None = None) -> int:
        if self.ticket is None:
            self.ticket = self.start()
            self.ticket.wait(timeout)
            self.io.pending.remove(self)
        return cast("int", self.ticket.wait(timeout))


@dataclass
class LateIo:
    """An I/O engine on a disk that takes its time."""

    engine: IoEngine
    pending: list[LateTicket] = field(default_factory=list)

    def from_fd(self, fd: int, path: str) -> IoFile:
        return self.engine.from_fd(fd, path)

    def start_read(self, file: IoFile, *place: int, **options: Any) -> LateTicket:
        return self._ticket(lambda: self.engine.start_read(file, *place, **options), None)

    def start_write(self, file: IoFile, *place: int, **options: Any) -> LateTicket:
        start = lambda: self.engine.start_write(file, *place, **options)  # noqa: E731
        return self._ticket(start, (file, place[0]))

    def _ticket(self, start: Callable[[], Any], writes: tuple[IoFile, int] | None) -> LateTicket:
        self.pending.append(LateTicket(self, start, writes))
        return self.pending[-1]

    def finish(self) -> None:
        """What nobody has waited for ends, too, and later than what has been waited for."""
        for ticket in list(self.pending):
            ticket.wait()


@dataclass
class Shelf:
    """A store with two records of one class, `a` = 1 and `b` = 2, and one shadow extent."""

    store: NvmeStore
    io: LateIo
    a: Record
    b: Record

    def buffer(self, value: int) -> torch.Tensor:
        return torch.full((PAGE,), value, dtype=torch.uint8)

    def write(self, record: Record, value: int) -> None:
        self.store.start_write(record, self.buffer(value)).wait()

    def read(self, record: Record) -> int:
        buffer = self.buffer(99)
        self.store.start_read(record, buffer).wait()
        assert bool((buffer == buffer[0]).all())
        return int(buffer[0])

    def check_and_go_on(self) -> None:
        """Whatever was cut off, the store is as good as new: nothing blames the disk."""
        for value in (10, 20, 30):
            self.write(self.b, value)
            self.write(self.a, value + 1)
        self.io.finish()
        assert (self.read(self.a), self.read(self.b)) == (31, 30)
        pool: ExtentPool = self.store._pools[PAGE]
        assert pool.num_free == 1
        assert pool.num_retired == 0
        self.store.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[], Shelf]]:
    with IoEngine(backend="threads", threads=1) as engine:

        def make() -> Shelf:
            io = LateIo(engine)
            store = NvmeStore([tmp_path], cast("AsyncIo", io))
            a, b = store.reserve([("a", PAGE), ("b", PAGE)], spare=1)
            shelf = Shelf(store, io, a, b)
            shelf.write(a, 1)
            shelf.write(b, 2)
            return shelf

        yield make


def test_a_write(make: Callable[[], Shelf]) -> None:
    """The extent of a write that was started is not anybody else's before it has ended."""
    for shelf, interrupt in at_every_line(make, *_TIER):
        buffer = shelf.buffer(7)
        with interrupt:
            shelf.store.start_write(shelf.a, buffer)
        shelf.check_and_go_on()


def test_a_read(make: Callable[[], Shelf]) -> None:
    """A read that was started is known with what it must find, and is settled when the store is."""
    for shelf, interrupt in at_every_line(make, *_TIER):
        with interrupt:
            shelf.store.start_read(shelf.a, shelf.buffer(0), urgency=Urgency.DEMAND)
        assert len(shelf.store._in_flight[PAGE]) == len(shelf.io.pending)
        for transfer in list(shelf.store._in_flight[PAGE]):
            transfer.wait()
        shelf.check_and_go_on()


@pytest.mark.parametrize("operation", ["read", "write"])
def test_a_wait(make: Callable[[], Shelf], operation: str) -> None:
    """A transfer settles once, as a whole, whenever it is waited for again."""
    for shelf, interrupt in at_every_line(make, *_TIER):
        start = shelf.store.start_read if operation == "read" else shelf.store.start_write
        transfer = start(shelf.a, shelf.buffer(7))
        with interrupt:
            transfer.wait()
        transfer.wait()
        assert transfer.done()
        assert shelf.a.generation == (1 if operation == "read" else 2)
        assert shelf.read(shelf.a) == (1 if operation == "read" else 7)
        shelf.check_and_go_on()


def test_a_pin(make: Callable[[], Shelf]) -> None:
    for shelf, interrupt in at_every_line(make, *_TIER):
        pins = []
        with interrupt:
            pins.append(shelf.store.pin(shelf.a))
            shelf.store.start_read_pinned(pins[0], shelf.buffer(0))  # type: ignore[arg-type]
        assert sum(shelf.store._pins.values()) in (0, 1)
        for extent in list(shelf.store._pins.elements()):
            assert extent == shelf.a.current
            shelf.store._pins[extent] -= 1
            shelf.store._pools[PAGE].end_read(extent)
        shelf.check_and_go_on()


def test_a_held_write(make: Callable[[], Shelf]) -> None:
    """Its extent stays taken until it is committed or dropped, whichever is told of it."""

    def with_held_extent() -> Shelf:
        shelf = make()
        shelf.store.reserve_held({PAGE: 1})
        return shelf

    for shelf, interrupt in at_every_line(with_held_extent, *_TIER):
        store, committed = shelf.store, []
        with interrupt:
            assert store.take_shadow(shelf.a)
            store.start_held_write(shelf.a, shelf.buffer(7))
            store.commit(shelf.a)
            committed.append(1)
        if shelf.a.pending is not None:
            shelf.a.pending.wait()
        assert not shelf.io.pending
        if shelf.a.shadow is not None:
            store.drop_shadow(shelf.a)
        assert shelf.read(shelf.a) == (7 if shelf.a.generation == 2 else 1)
        assert shelf.a.generation == 2 or not committed
        assert store._num_holdable[PAGE] == 1
        store.give_back_held()
        shelf.check_and_go_on()


def test_the_interrupt_is_not_lost(make: Callable[[], Shelf]) -> None:
    shelf = make()
    with pytest.raises(KeyboardInterrupt), shelf.store._lock:
        signal.raise_signal(signal.SIGINT)
    with InterruptAt(1, *_TIER) as interrupt:
        shelf.read(shelf.a)
    assert interrupt.came
    shelf.check_and_go_on()
