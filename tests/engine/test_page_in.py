"""A page on its way from NVMe to a device that the CPU reaches: it lands where it will be used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offload.engine.paging.page_in import PageIn
from offload.errors import DeadlineError, StorageError
from offload.native import IoEngine
from offload.partition.blocks import Block, BlockStore
from offload.partition.layout import ClassLayout, FieldSpec, ParamSpec, pack
from offload.tiers.device import CpuDeviceTier
from offload.tiers.host import HostArena
from offload.tiers.nvme import NvmeStore
from offload.tiers.transfer import Urgency

CHUNK_BYTES = 65_536 * 4
NUM_CHUNKS = 4
PAGE_BYTES = NUM_CHUNKS * CHUNK_BYTES

MakeStore = Callable[..., BlockStore]


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[MakeStore]:
    """A function that makes a store with weights on NVMe; chunk `n` is full of `n + 1`."""
    closing: list[Callable[[], object]] = []

    def make(*, fault: str | None = None) -> BlockStore:
        numel = PAGE_BYTES // 4
        (bucket,) = pack([ParamSpec("w", (numel,), numel, "fp32", 4, True)], bucket_elements=65_536)
        io = IoEngine(backend="threads", threads=2, fault=fault)
        host, device = HostArena(CHUNK_BYTES), CpuDeviceTier(3 * PAGE_BYTES, io)
        nvme = NvmeStore([tmp_path], io, deadline_seconds=0.3)
        store = BlockStore(host=host, device=device, nvme=nvme, deadline_seconds=0.3)
        store.add(bucket, "weights", ClassLayout(bucket, [FieldSpec("weight", "fp32", 4)]), "nvme")
        store.reserve_records(spare=2)
        closing.extend((lambda: io.close(1.0), nvme.close, device.close, host.close))
        for chunk in range(NUM_CHUNKS):
            write(store, chunk, chunk + 1)
        store.drain()
        return store

    yield make
    for close in reversed(closing):
        try:
            close()
        except DeadlineError:  # a test let an operation hang
            continue


def write(store: BlockStore, chunk: int, value: int) -> None:
    staged = store.stage_or_raise(weights(store), chunk)
    staged.tensor.fill_(value)
    store.start_store(weights(store), chunk, staged)


def weights(store: BlockStore) -> Block:
    return store.block(0, "weights")


def page_in(store: BlockStore) -> tuple[PageIn, int]:
    """A page that is to come, and the address where it will be."""
    block = weights(store)
    lease = store.device.lease(block.layout.nbytes, block.name)
    lease.tensor.fill_(99)
    way = PageIn(block, lease, store, depth=1, urgency=Urgency.BULK)
    return way, lease.tensor.data_ptr()


def content(way: PageIn) -> list[int]:
    """The value of each chunk of the page."""
    chunks = way._lease.tensor.view(NUM_CHUNKS, CHUNK_BYTES)
    assert all(chunk.min() == chunk.max() for chunk in chunks)
    return [int(chunk[0]) for chunk in chunks]


def test_what_is_read_lands_in_the_page(make_store: MakeStore) -> None:
    store = make_store()
    host_bytes = store.host.peak_bytes
    everything = store.host.lease(CHUNK_BYTES, "somebody else")  # nothing is left for staging
    way, _ = page_in(store)
    assert way.start(wait=False)
    way.finish()
    assert content(way) == [1, 2, 3, 4]
    assert store.device.lanes()["h2d"][0] == 0
    assert store.host.peak_bytes == max(host_bytes, CHUNK_BYTES)
    everything.release()


def test_all_of_the_page_is_read_at_once(make_store: MakeStore) -> None:
    """However few chunks may be staged: these take no staging."""
    store = make_store(fault="op=read,count=0,delay=200")
    way, _ = page_in(store)
    assert way.start(wait=False)
    assert store.nvme is not None
    assert sum(len(each) for each in store.nvme._in_flight.values()) == NUM_CHUNKS
    way.finish()
    assert content(way) == [1, 2, 3, 4]


def test_what_is_on_its_way_home_is_taken_from_there(make_store: MakeStore) -> None:
    store = make_store(fault=f"op=write,nth={NUM_CHUNKS + 1},delay=300")
    write(store, 2, 7)
    way, _ = page_in(store)
    assert way.start(wait=False)
    way.finish()
    assert content(way) == [1, 2, 7, 4]
    store.drain()
    assert store.host.used_bytes == 0


def page_that_failed(store: BlockStore, error: type[StorageError]) -> tuple[PageIn, int]:
    """A page of which one read has not come, and its address."""
    way, address = page_in(store)
    way.start(wait=False)
    with pytest.raises(error):
        way.finish()
    return way, address


def test_a_read_that_failed_begins_again(make_store: MakeStore) -> None:
    way, _ = page_that_failed(make_store(fault="op=read,nth=3,errno=5"), StorageError)
    way.finish()
    assert content(way) == [1, 2, 3, 4]


def test_memory_is_given_back_after_an_error(make_store: MakeStore) -> None:
    store = make_store(fault="op=read,nth=3,errno=5")
    way, address = page_that_failed(store, StorageError)
    way.give_back()
    assert store.device.used_bytes == 0
    assert page_in(store)[1] == address


def test_memory_that_a_hung_read_may_write_is_nobodys(make_store: MakeStore) -> None:
    store = make_store(fault="op=read,nth=3,drop=1")
    way, address = page_that_failed(store, DeadlineError)
    assert not way.advance()
    with pytest.raises(DeadlineError):  # nor is anything else brought there
        way.finish()
    way.give_back()
    assert store.device.used_bytes == PAGE_BYTES
    again, other = page_in(store)
    assert other != address
    again.finish()
    assert content(again) == [1, 2, 3, 4]


def test_memory_of_a_late_read_comes_back_when_it_has_ended(make_store: MakeStore) -> None:
    store = make_store(fault="op=read,nth=3,delay=1500")
    way, _ = page_that_failed(store, DeadlineError)
    way.give_back()
    assert store.device.used_bytes == PAGE_BYTES
    limit = time.monotonic() + 20
    while store.device.used_bytes and time.monotonic() < limit:
        store.settle_ended()
    assert store.device.used_bytes == 0
