"""Blocks at their homes, staging, failed writes: nothing is lost or read too early."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from offload.errors import BudgetError, DeadlineError, StorageError
from offload.native import IoEngine
from offload.partition.blocks import Block, BlockStore
from offload.partition.layout import Bucket, ClassLayout, FieldSpec, ParamSpec, pack
from offload.partition.staging import release_all
from offload.tiers.device import CpuDeviceTier
from offload.tiers.host import HostArena
from offload.tiers.nvme import NvmeStore

CHUNK_BYTES = 65_536 * 4
NUM_CHUNKS = 3
MakeStore = Callable[..., BlockStore]


def three_chunks(index: int = 0) -> Bucket:
    numel = NUM_CHUNKS * 65_536
    (bucket,) = pack([ParamSpec("w", (numel,), numel, "fp32", 4, True)], bucket_elements=65_536)
    return Bucket(
        index, bucket.dtype, bucket.itemsize, True, bucket.slots, bucket.numel, bucket.chunks
    )


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[MakeStore]:
    """A function that makes a store with a block of weights at each home asked for."""
    closing: list[Callable[[], object]] = []

    def make(
        *homes: str, fault: str | None = None, staging: int = 2, deadline_seconds: float = 30.0
    ) -> BlockStore:
        io = IoEngine(backend="threads", threads=2, fault=fault)
        homes_bytes = NUM_CHUNKS * CHUNK_BYTES
        host = HostArena(staging * CHUNK_BYTES + homes_bytes * homes.count("host"))
        device = CpuDeviceTier(4 * homes_bytes, io)
        nvme = NvmeStore([tmp_path], io, capacity_bytes=None, deadline_seconds=deadline_seconds)
        store = BlockStore(host=host, device=device, nvme=nvme, deadline_seconds=deadline_seconds)
        for index, home in enumerate(homes):
            bucket = three_chunks(index)
            layout = ClassLayout(bucket, [FieldSpec("weight", "fp32", 4)])
            store.add(bucket, "weights", layout, home)
        store.reserve_records(spare=2)
        closing.extend((lambda: io.close(1.0), nvme.close, device.close, host.close))
        return store

    yield make
    for close in reversed(closing):
        try:
            close()
        except DeadlineError:  # a test let an operation hang
            continue


def fill(store: BlockStore, block: Block, chunk: int, value: int) -> None:
    staged = store.stage_or_raise(block, chunk)
    staged.tensor.fill_(value)
    store.start_store(block, chunk, staged)


def fill_together(store: BlockStore, block: Block, *values: int) -> None:
    """Chunks 0, 1, ...: staged before the first is written, so that its error meets no call."""
    staged = [store.stage_or_raise(block, chunk) for chunk in range(len(values))]
    for chunk, (buffer, value) in enumerate(zip(staged, values, strict=True)):
        buffer.tensor.fill_(value)
        store.start_store(block, chunk, buffer)


def content(store: BlockStore, block: Block, chunk: int) -> set[int]:
    staged = store.load(block, chunk)
    found = set(staged.tensor.unique().tolist())
    staged.release()
    return found


@pytest.mark.parametrize("home", ["device", "host", "nvme"])
def test_what_is_stored_is_loaded(home: str, make_store: MakeStore) -> None:
    store = make_store(home)
    block = store.block(0, "weights")
    for chunk in range(NUM_CHUNKS):
        fill(store, block, chunk, chunk + 1)
    assert [content(store, block, chunk) for chunk in range(NUM_CHUNKS)] == [{1}, {2}, {3}]
    store.drain()
    assert store.in_place(block) == (home != "nvme")
    homes = NUM_CHUNKS * CHUNK_BYTES if home == "host" else 0
    assert store.host.used_bytes == homes, "staging is given back"


def test_a_record_that_was_never_written_reads_as_zeros(make_store: MakeStore) -> None:
    store = make_store("nvme")
    staged = store.stage_or_raise(store.block(0, "weights"), 0)
    staged.tensor.fill_(9)  # what the next lease finds there
    staged.release()
    assert content(store, store.block(0, "weights"), 0) == {0}


def test_a_chunk_is_read_only_after_its_write_has_ended(make_store: MakeStore) -> None:
    store = make_store("nvme", fault="op=write,nth=2,delay=200")
    block = store.block(0, "weights")
    fill(store, block, 0, 1)
    fill(store, block, 0, 2)
    assert content(store, block, 0) == {2}


def test_staging_is_all_or_nothing(make_store: MakeStore) -> None:
    store = make_store("nvme", "nvme", "nvme", staging=2)
    blocks = [store.block(index, "weights") for index in range(3)]
    assert store.start_loads(blocks, 0) is None
    assert store.host.used_bytes == 0
    with pytest.raises(BudgetError, match="staging for"):
        held = store.start_loads(blocks[:2], 0)
        assert held is not None
        store.load(blocks[2], 0)
    release_all(held)
    assert store.host.used_bytes == 0


def test_staging_in_pieces_is_waited_for_as_a_whole(make_store: MakeStore) -> None:
    store = make_store("nvme", "nvme", fault="op=write,nth=1,delay=200", staging=6)
    bucket = three_chunks(1)
    moments = [FieldSpec(f"moment {index}", "fp32", 4) for index in range(5)]
    store.add(bucket, "optimizer", ClassLayout(bucket, moments), "nvme")
    store.reserve_records(spare=2)
    fill(store, store.block(0, "weights"), 0, 1)  # is being written from the arena's first place
    blocks = [store.block(1, name) for name in ("weights", "optimizer")]
    held = store.start_loads(blocks, 0)
    assert held is not None, "together they are as large as the arena"
    release_all(held)
    assert store.host.used_bytes == 0


def test_waiting_for_staging_is_a_choice(make_store: MakeStore) -> None:
    store = make_store("nvme", fault="op=write,count=2,delay=200", staging=2)
    block = store.block(0, "weights")
    fill(store, block, 0, 1)
    fill(store, block, 1, 2)
    assert store.start_load(block, 2, wait=False) is None, "both buffers are being written"
    staged = store.start_load(block, 2, wait=True)
    assert staged is not None
    staged.release()


def test_a_failed_write_keeps_its_buffer_until_it_is_repeated(make_store: MakeStore) -> None:
    store = make_store("nvme", fault="op=write,nth=1,errno=28")
    block = store.block(0, "weights")
    fill_together(store, block, 7, 8)
    with pytest.raises(StorageError, match="weights of bucket 0, chunk 0"):
        store.drain()
    assert store.host.used_bytes == CHUNK_BYTES
    store.retry_failed()
    assert store.host.used_bytes == 0
    assert content(store, block, 0) == {7}
    assert content(store, block, 1) == {8}


def test_a_failed_write_is_repeated_before_its_chunk_is_read(make_store: MakeStore) -> None:
    store = make_store("nvme", fault="op=write,nth=2,errno=5")
    block = store.block(0, "weights")
    fill(store, block, 0, 1)
    store.drain()
    fill(store, block, 0, 2)
    with pytest.raises(StorageError):
        store.drain()
    assert content(store, block, 0) == {2}


def test_failed_writes_give_way_when_their_staging_is_wanted(make_store: MakeStore) -> None:
    """Else all staging could end up with writes that nobody repeats."""
    store = make_store("nvme", fault="op=write,nth=1,count=2,errno=5", staging=2)
    block = store.block(0, "weights")
    fill_together(store, block, 1, 2)
    with pytest.raises(StorageError):
        store.drain()
    assert store.host.used_bytes == 2 * CHUNK_BYTES
    assert content(store, block, 2) == {0}
    assert content(store, block, 0) == {1}


def test_a_write_that_fails_again_is_still_kept(make_store: MakeStore) -> None:
    store = make_store("nvme", fault="op=write,nth=1,count=3,errno=5")
    block = store.block(0, "weights")
    fill(store, block, 0, 3)
    for _ in range(2):
        with pytest.raises(StorageError):
            store.drain() if store._writing else store.retry_failed()
    with pytest.raises(StorageError):
        store.retry_failed()
    store.retry_failed()
    assert content(store, block, 0) == {3}


def test_a_failed_read_gives_its_staging_back(make_store: MakeStore) -> None:
    store = make_store("nvme", "nvme", fault="op=read,nth=2,errno=5")
    blocks = [store.block(index, "weights") for index in range(2)]
    for value, block in enumerate(blocks, 1):
        fill(store, block, 0, value)
    store.drain()
    assert content(store, blocks[0], 0) == {1}
    with pytest.raises(StorageError):
        store.load(blocks[1], 0)
    assert store.host.used_bytes == 0
    assert content(store, blocks[1], 0) == {2}


def test_a_hung_write_is_neither_failed_nor_done(make_store: MakeStore) -> None:
    store = make_store("nvme", fault="op=write,nth=1,drop=1", deadline_seconds=0.2)
    fill(store, store.block(0, "weights"), 0, 1)
    for _ in range(2):
        with pytest.raises(DeadlineError):
            store.drain()
    assert store.host.used_bytes == CHUNK_BYTES, "the buffer still belongs to the write"


def test_releasing_many_hung_reads_takes_one_deadline(make_store: MakeStore) -> None:
    store = make_store("nvme", fault="op=read,count=0,drop=1", staging=3, deadline_seconds=1.5)
    block = store.block(0, "weights")
    held = []
    for chunk in range(NUM_CHUNKS):
        fill(store, block, chunk, 1)
    store.drain()
    for chunk in range(NUM_CHUNKS):
        staged = store.start_load(block, chunk)
        assert staged is not None
        held.append(staged)
    started = time.monotonic()
    release_all(held, 1.5)
    assert time.monotonic() - started < 3.0  # one deadline each would be 4.5
    assert store.host.used_bytes == 3 * CHUNK_BYTES


def test_a_class_without_state_has_no_block(make_store: MakeStore) -> None:
    store = make_store("host")
    bucket = three_chunks(5)
    store.add(bucket, "optimizer", ClassLayout(bucket, []), "host")
    assert list(store.classes(0)) == ["weights"]
    with pytest.raises(KeyError):
        store.classes(5)


def test_homes_in_memory_are_reached_in_place(make_store: MakeStore) -> None:
    store = make_store("host")
    block = store.block(0, "weights")
    assert block.host_lease is not None
    staged = store.load(block, 1)
    staged.tensor.fill_(5)
    assert torch.equal(
        block.host_lease.tensor[CHUNK_BYTES : 2 * CHUNK_BYTES],
        torch.full((CHUNK_BYTES,), 5, dtype=torch.uint8),
    )
