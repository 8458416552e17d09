"""Records by size, and the share of the arena that is divided further."""

from __future__ import annotations

import random
import weakref
from pathlib import Path

import pytest
import torch

from offload.errors import ChecksumError, EngineStateError
from offload.native import IoEngine
from offload.tiers.extents import PAGE_BYTES
from offload.tiers.host import HostArena
from offload.tiers.host_share import HostShare
from offload.tiers.nvme import NvmeStore
from offload.tiers.record_pool import RecordPool, class_bytes
from offload.tiers.simulated import SimulatedIo


def test_a_class_is_at_most_an_eighth_too_large() -> None:
    for pages in range(1, 4096):
        nbytes = pages * PAGE_BYTES
        size = class_bytes(nbytes)
        assert size % PAGE_BYTES == 0
        assert nbytes <= size <= nbytes * 9 // 8
        assert class_bytes(size) == size
        assert class_bytes(nbytes - 1) == size


def make_store(path: Path, capacity: int) -> NvmeStore:
    return NvmeStore([path], SimulatedIo(), capacity_bytes=capacity)


def test_records_are_reused_by_size(tmp_path: Path) -> None:
    with make_store(tmp_path, 1 << 20) as store:
        pool = RecordPool(store)
        first = [pool.take(nbytes, "x") for nbytes in (5000, 8192, 70_000)]
        assert [record.nbytes for record in first if record] == [8192, 8192, 73728]
        used = store.used_bytes
        assert pool.used_bytes == used == 8192 + 8192 + 73728
        for _ in range(10):
            for record in first:
                assert record is not None
                pool.give_back(record)
            assert pool.used_bytes == 0
            first = [pool.take(nbytes, "y") for nbytes in (8000, 8192, 73_000)]
        assert store.used_bytes == used
        assert pool.peak_bytes == used


def test_a_given_back_record_holds_nothing(tmp_path: Path) -> None:
    with make_store(tmp_path, 1 << 20) as store:
        pool = RecordPool(store)
        record = pool.take(4096, "x")
        assert record is not None
        store.start_write(record, torch.zeros(4096, dtype=torch.uint8)).wait()
        pool.give_back(record)
        again = pool.take(4096, "y")
        assert again is record
        with pytest.raises(EngineStateError, match="y"):
            store.start_read(record, torch.zeros(4096, dtype=torch.uint8))


def test_every_record_can_be_written_and_holds_its_own(tmp_path: Path) -> None:
    """Records change hands at random; no write lacks an extent, every read has its own bytes."""
    drawn = random.Random(0)
    with NvmeStore([tmp_path], IoEngine(backend="python"), capacity_bytes=8 << 20) as store:
        pool = RecordPool(store)
        held: list[tuple[object, torch.Tensor]] = []
        for index in range(200):
            record = pool.take(drawn.randrange(1, 60_000), f"record {index}")
            assert record is not None
            content = torch.randint(0, 256, (record.nbytes,), dtype=torch.uint8)
            store.start_write(record, content).wait()
            held.append((record, content))
            while len(held) > 12 or (held and drawn.random() < 0.4):
                record, content = held.pop(drawn.randrange(len(held)))
                found = torch.empty(record.nbytes, dtype=torch.uint8)
                store.start_read(record, found).wait()
                assert torch.equal(found, content)
                pool.give_back(record)
        assert store.used_bytes < 3 * pool.peak_bytes


def test_where_the_disk_takes_no_more_a_larger_extent_serves(tmp_path: Path) -> None:
    with make_store(tmp_path, 64 << 10) as store:
        pool = RecordPool(store)
        large, small = pool.take(40 << 10, "large"), pool.take(24 << 10, "small")
        assert large is not None
        assert small is not None
        assert pool.take(4096, "more") is None
        assert "only 0 bytes (0 B) are free" in str(pool.refusal)
        pool.give_back(large)
        assert pool.take(8 << 10, "tiny") is None, "it would be five times too large"
        between = pool.take(24 << 10, "between")
        assert between is large
        content = torch.arange(24 << 10).to(torch.uint8)
        store.start_write(between, content).wait()
        found = torch.empty(24 << 10, dtype=torch.uint8)
        store.start_read(between, found).wait()
        assert torch.equal(found, content)


def test_a_refusal_keeps_nothing_of_its_caller_alive(tmp_path: Path) -> None:
    class Local:
        pass

    def ask(pool: RecordPool) -> weakref.ref[Local]:
        local = Local()
        assert pool.take(8192, "more") is None
        return weakref.ref(local)

    with make_store(tmp_path, 4096) as store:
        pool = RecordPool(store)
        assert ask(pool)() is None
        assert pool.refusal is not None


def test_an_old_version_in_a_reused_extent_is_found(tmp_path: Path) -> None:
    """A lost write leaves what the record held before it changed hands."""
    store = NvmeStore([tmp_path], SimulatedIo(fault="op=write,nth=2,lost=1"), capacity_bytes=4096)
    with store:
        pool = RecordPool(store)
        content = torch.ones(4096, dtype=torch.uint8)
        record = pool.take(4096, "x")
        assert record is not None
        store.start_write(record, content).wait()
        pool.give_back(record)
        assert pool.take(4096, "y") is record
        store.start_write(record, content + 1).wait()
        with pytest.raises(ChecksumError, match="y"):
            store.start_read(record, content.clone()).wait()


def test_a_share_is_one_lease_of_the_arena() -> None:
    with HostArena(64 << 10) as arena:
        share = HostShare(arena, 32 << 10, "activations")
        assert arena.used_bytes == 32 << 10
        pieces = [share.take(5000) for _ in range(4)]
        assert share.take(1) is None
        assert share.used_bytes == share.peak_bytes == 32 << 10
        addresses = sorted(piece.tensor.data_ptr() for piece in pieces if piece)
        assert addresses == [arena.address + 8192 * index for index in range(4)]
        for piece in pieces:
            assert piece is not None
            piece.release()
        share.close()
        assert arena.used_bytes == 0
