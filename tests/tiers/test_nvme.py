from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from offload.errors import BudgetError, ChecksumError, DeadlineError, EngineStateError, StorageError
from offload.native import IoEngine
from offload.tiers.nvme import NvmeStore
from offload.tiers.records import Record, checksum_seed
from offload.tiers.simulated import SimulatedIo

PAGE = 4096


def filled(value: int, nbytes: int = PAGE) -> torch.Tensor:
    return torch.full((nbytes,), value, dtype=torch.uint8)


def write(store: NvmeStore, record: Record, value: int) -> None:
    store.start_write(record, filled(value, record.nbytes)).wait()


def read(store: NvmeStore, record: Record) -> int:
    """Return the value that fills the record."""
    buffer = torch.empty(record.nbytes, dtype=torch.uint8)
    store.start_read(record, buffer).wait()
    assert bool((buffer == buffer[0]).all())
    return int(buffer[0])


@pytest.mark.parametrize("nbytes", [1, PAGE, 3 * PAGE, 3 * PAGE + 17, 5 << 20])
def test_reads_return_what_was_written(io: IoEngine, tmp_path: Path, nbytes: int) -> None:
    torch.manual_seed(0)
    with NvmeStore([tmp_path], io) as store:
        records = store.reserve([(f"bucket {i}", nbytes) for i in range(3)], spare=1)
        for generation in range(1, 4):
            data = [torch.randint(0, 256, (nbytes,), dtype=torch.uint8) for _ in records]
            for record, each in zip(records, data, strict=True):
                store.start_write(record, each).wait()
                assert record.generation == generation
            for record, each in zip(records, data, strict=True):
                buffer = filled(0, record.extent_bytes)
                store.start_read(record, buffer).wait()
                assert torch.equal(buffer[:nbytes], each)


def test_a_write_never_goes_over_the_current_extent(io: IoEngine, tmp_path: Path) -> None:
    with NvmeStore([tmp_path], io) as store:
        (record,) = store.reserve([("bucket", PAGE)], spare=1)
        places = []
        for value in range(4):
            before = record.current
            transfer = store.start_write(record, filled(value))
            assert record.current == before, "flipped before it was settled"
            assert record.generation == value
            transfer.wait()
            assert record.current != before
            places.append(record.current)
        assert places[0] == places[2] != places[1] == places[3]


@pytest.mark.parametrize(("spare", "extents"), [(1, 3 + 1 + 1 + 1), (9, 3 + 3 + 1 + 1)])
def test_reserve_counts_shadow_extents(
    io: IoEngine, tmp_path: Path, spare: int, extents: int
) -> None:
    sizes = [("a", PAGE), ("b", PAGE), ("c", PAGE - 9), ("d", 2 * PAGE)]
    with NvmeStore([tmp_path], io) as store:
        store.reserve(sizes, spare=spare)
        assert store.used_bytes == store.peak_bytes
        num_large = 2
        assert store.used_bytes == (extents - num_large) * PAGE + num_large * 2 * PAGE
        assert store.capacity_bytes > store.used_bytes
        assert store.bytes_free() > 0


def test_records_are_dealt_over_paths_and_stay_there(io: IoEngine, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one", "two")]
    for path in paths:
        path.mkdir()
    with NvmeStore(paths, io) as store:
        records = store.reserve([(f"bucket {i}", PAGE) for i in range(6)], spare=2)
        for value in range(3):
            for record in records:
                write(store, record, value)
        assert Counter(record.path for record in records) == {str(path): 3 for path in paths}
        on_file = Counter(record.current.file for record in records if record.current)
        assert on_file == {0: 3, 1: 3}


def hold(store: NvmeStore, record: Record, value: int) -> None:
    """Write a next version beside the current one."""
    assert store.take_shadow(record)
    transfer = store.start_held_write(record, filled(value, record.nbytes))
    assert transfer is not None
    transfer.wait()


@pytest.mark.parametrize("paths", [1, 2])
def test_extents_for_held_writes_come_and_go(io: IoEngine, tmp_path: Path, paths: int) -> None:
    folders = [tmp_path / str(number) for number in range(paths)]
    for folder in folders:
        folder.mkdir()
    with NvmeStore(folders, io) as store:
        records = store.reserve([(f"bucket {i}", 4 * PAGE) for i in range(6)], spare=2)
        least = store.used_bytes
        for rounds in range(3):
            store.reserve_held({4 * PAGE: 4})
            store.reserve_held({4 * PAGE: 3})  # there are more
            assert store.used_bytes == store.peak_bytes == least + 16 * PAGE
            for value, record in enumerate(records):
                write(store, record, 10 * rounds + value)
            for record in records[:4]:
                hold(store, record, 99 - rounds)
            assert not store.take_shadow(records[4])
            for record in records[:2]:
                store.commit(record)
            for record in records[2:4]:
                store.drop_shadow(record)
            store.give_back_held()
            assert (store.used_bytes, store.peak_bytes) == (least, least + 16 * PAGE)
            assert not store.take_shadow(records[0])
            found = [read(store, record) for record in records]
            assert found == [99 - rounds] * 2 + [10 * rounds + i for i in range(2, 6)]
        for record in records:  # writes that are in flight together find their extents
            write(store, record, 7)
        assert {read(store, record) for record in records} == {7}


def test_reserve_can_be_called_again(io: IoEngine, tmp_path: Path) -> None:
    with NvmeStore([tmp_path], io) as store:
        (first,) = store.reserve([("first", PAGE)], spare=1)
        write(store, first, 1)
        (second,) = store.reserve([("second", PAGE)], spare=1)
        assert store.reserve([], spare=1) == []
        write(store, second, 2)
        assert (read(store, first), read(store, second)) == (1, 2)


def test_capacity_is_a_budget(io: IoEngine, tmp_path: Path) -> None:
    with NvmeStore([tmp_path], io, capacity_bytes=4 * PAGE) as store:
        with pytest.raises(BudgetError, match=r"tiers\.nvme\.capacity") as caught:
            store.reserve([("a", 2 * PAGE), ("b", PAGE)], spare=1)
        assert (caught.value.tier, caught.value.requested_bytes) == ("nvme", 6 * PAGE)
        assert store.used_bytes == 0
        store.reserve([("a", 2 * PAGE)], spare=1)
        assert store.bytes_free() == 0


def test_a_record_that_was_never_written_cannot_be_read(io: IoEngine, tmp_path: Path) -> None:
    with NvmeStore([tmp_path], io) as store:
        (record,) = store.reserve([("bucket 3", PAGE)], spare=1)
        with pytest.raises(EngineStateError, match=r"bucket 3 .* never written"):
            store.start_read(record, filled(0))


def test_spare_zero_allows_one_write_each(io: IoEngine, tmp_path: Path) -> None:
    """Frozen weights are written once and need no shadow extents."""
    with NvmeStore([tmp_path], io) as store:
        records = store.reserve([("a", PAGE), ("b", PAGE)], spare=0)
        for value, record in enumerate(records):
            write(store, record, value)
        with pytest.raises(EngineStateError, match="no shadow extent"):
            store.start_write(records[0], filled(9))
        assert [read(store, record) for record in records] == [0, 1]


def test_a_wrong_buffer_is_an_assertion(io: IoEngine, tmp_path: Path) -> None:
    with NvmeStore([tmp_path], io) as store:
        (record,) = store.reserve([("a", PAGE + 1)], spare=1)
        for nbytes in (PAGE, PAGE + 2, 3 * PAGE):
            with pytest.raises(AssertionError):
                store.start_write(record, filled(0, nbytes))


# Checksums (P4): each fault is made in the file itself.


def flip(store: NvmeStore, records: list[Record]) -> None:
    extent = records[0].current
    assert extent is not None
    fd = store._files[extent.file].io.fd
    (byte,) = os.pread(fd, 1, extent.offset + 1000)
    os.pwrite(fd, bytes([byte ^ 4]), extent.offset + 1000)


def swap(store: NvmeStore, records: list[Record]) -> None:
    first, second = (record.current for record in records)
    assert first is not None
    assert second is not None
    fd = store._files[first.file].io.fd
    one, other = os.pread(fd, PAGE, first.offset), os.pread(fd, PAGE, second.offset)
    os.pwrite(fd, other, first.offset)
    os.pwrite(fd, one, second.offset)


def zero(store: NvmeStore, records: list[Record]) -> None:
    extent = records[0].current
    assert extent is not None
    os.pwrite(store._files[extent.file].io.fd, bytes(PAGE), extent.offset)


@pytest.mark.parametrize("damage", [flip, swap, zero])
@pytest.mark.parametrize("checksum", [True, False])
def test_damage_in_the_file_is_a_checksum_error(
    io: IoEngine,
    tmp_path: Path,
    damage: Callable[[NvmeStore, list[Record]], None],
    checksum: bool,
) -> None:
    with NvmeStore([tmp_path], io, checksum=checksum) as store:
        records = store.reserve([("one", PAGE), ("two", PAGE)], spare=1)
        write(store, records[0], 1)
        write(store, records[1], 2)
        damage(store, records)
        buffer = filled(0)
        transfer = store.start_read(records[0], buffer)
        if not checksum:
            transfer.wait()  # the fault is real: without checksums it gives wrong numbers
            assert not torch.equal(buffer, filled(1))
            return
        with pytest.raises(ChecksumError) as caught:
            transfer.wait()
        error = caught.value
        assert (error.what, error.path, error.nbytes) == ("one", str(tmp_path), PAGE)
        assert records[0].current is not None
        assert error.offset == records[0].current.offset
        assert error.errno == errno.EBADMSG
        for part in ("one", str(tmp_path), "CRC32C", "resume from a checkpoint"):
            assert part in str(error)
        write(store, records[0], 3)  # the store stays usable
        assert read(store, records[0]) == 3


@pytest.mark.parametrize("fault", ["lost=1", "misdirect=4096", "corrupt=1"])
def test_a_write_that_lies_is_found_at_the_read(tmp_path: Path, fault: str) -> None:
    with (
        IoEngine(backend="python", fault=f"op=write,nth=3,{fault}") as io,
        NvmeStore([tmp_path], io) as store,
    ):
        records = store.reserve([("one", PAGE), ("two", PAGE)], spare=1)
        write(store, records[0], 1)
        write(store, records[1], 2)
        write(store, records[0], 3)  # reports success
        with pytest.raises(ChecksumError, match="one"):
            read(store, records[0])


def test_seeds_tell_files_offsets_and_generations_apart() -> None:
    seeds = {
        checksum_seed(salt, offset, generation)
        for salt in (b"a", b"b")
        for offset in range(0, 20 * PAGE, PAGE)
        for generation in range(20)
    }
    assert len(seeds) >= 2 * 20 * 20 - 1
    assert len({checksum_seed(b"a", 0, generation) for generation in range(10_000)}) == 10_000
    assert all(0 <= seed < 1 << 32 for seed in seeds)


# Failures (P13): the record keeps its version, the error says where, and the call can be repeated.


@pytest.mark.parametrize("backend", ["python", "simulated"])
def test_a_failed_write_keeps_the_old_version(tmp_path: Path, backend: str) -> None:
    fault = "op=write,nth=2,errno=5"
    simulated = backend == "simulated"
    io = SimulatedIo(fault=fault) if simulated else IoEngine(backend="python", fault=fault)
    with NvmeStore([tmp_path], io) as store:
        (record,) = store.reserve([("bucket 3", PAGE)], spare=1)
        write(store, record, 1)
        transfer = store.start_write(record, filled(2))
        for _ in range(2):
            with pytest.raises(StorageError) as caught:
                transfer.wait()
        error = caught.value
        assert (error.operation, error.what, error.path) == ("write", "bucket 3", str(tmp_path))
        assert (error.errno, error.nbytes) == (errno.EIO, PAGE)
        assert error.offset is not None
        for part in ("bucket 3", str(tmp_path), f"offset {error.offset}", "EIO", "4096 bytes"):
            assert part in str(error)
        assert "keeps its last committed version" in str(error)
        assert (record.generation, read(store, record)) == (1, 1)
        write(store, record, 2)  # the shadow extent was returned
        assert (record.generation, read(store, record)) == (2, 2)
    io.close()


def test_a_full_volume_below_the_file_system_says_so(tmp_path: Path) -> None:
    with (
        IoEngine(backend="python", fault=f"op=write,errno={errno.ENOSPC}") as io,
        NvmeStore([tmp_path], io) as store,
    ):
        (record,) = store.reserve([("bucket", PAGE)], spare=1)
        with pytest.raises(StorageError, match="thin volume") as caught:
            write(store, record, 1)
        assert caught.value.errno == errno.ENOSPC


def test_a_failed_read_can_be_repeated(tmp_path: Path) -> None:
    with (
        IoEngine(backend="python", fault="op=read,nth=1,errno=5") as io,
        NvmeStore([tmp_path], io) as store,
    ):
        (record,) = store.reserve([("bucket", PAGE)], spare=1)
        write(store, record, 1)
        with pytest.raises(StorageError, match="read of bucket"):
            read(store, record)
        assert read(store, record) == 1


def test_a_truncated_file_is_an_error(io: IoEngine, tmp_path: Path) -> None:
    with NvmeStore([tmp_path], io) as store:
        records = store.reserve([("a", PAGE), ("b", PAGE)], spare=1)
        for record in records:
            write(store, record, 1)
        last = max(records, key=lambda record: record.current.offset if record.current else 0)
        assert last.current is not None
        os.ftruncate(store._files[0].io.fd, last.current.offset + 100)
        with pytest.raises(StorageError, match=f"read of {last.name}") as caught:
            read(store, last)
        assert caught.value.errno == errno.EIO


# Waiting (P6)


def test_a_write_waits_for_a_shadow_extent(tmp_path: Path) -> None:
    io = SimulatedIo()
    with NvmeStore([tmp_path], io) as store:
        records = store.reserve([(f"bucket {i}", PAGE) for i in range(4)], spare=1)
        for record in records:
            write(store, record, 1)
        transfers = [store.start_write(record, filled(2)) for record in records]
        assert [transfer.done() for transfer in transfers] == [True, True, True, False]
        assert [record.generation for record in records] == [2, 2, 2, 1]
        transfers[-1].wait()
        assert [read(store, record) for record in records] == [2, 2, 2, 2]


def test_a_failed_write_that_was_waited_for_is_its_owners_error(tmp_path: Path) -> None:
    io = SimulatedIo(fault="op=write,nth=3,errno=5")
    with NvmeStore([tmp_path], io) as store:
        one, two = store.reserve([("one", PAGE), ("two", PAGE)], spare=1)
        write(store, one, 1)
        write(store, two, 1)
        failing = store.start_write(one, filled(2))
        store.start_write(two, filled(2)).wait()
        with pytest.raises(StorageError, match="write of one"):
            failing.wait()
        assert (read(store, one), read(store, two)) == (1, 2)


def test_a_second_write_of_a_record_waits_for_the_first(tmp_path: Path) -> None:
    io = SimulatedIo()
    with NvmeStore([tmp_path], io) as store:
        record, _ = store.reserve([("one", PAGE), ("two", PAGE)], spare=2)
        store.start_write(record, filled(1))
        store.start_write(record, filled(2)).wait()
        assert (record.generation, read(store, record)) == (2, 2)


def test_a_hanging_write_ends_in_deadlines_that_name_it(tmp_path: Path) -> None:
    io = SimulatedIo(fault="op=write,nth=3,drop=1")
    store = NvmeStore([tmp_path], io, deadline_seconds=5.0)
    one, two = store.reserve([("one", PAGE), ("two", PAGE)], spare=1)
    write(store, one, 1)
    write(store, two, 1)
    transfer = store.start_write(one, filled(2))
    with pytest.raises(DeadlineError, match=r"nvme_write of one.*not done after 5 s") as caught:
        transfer.wait()
    assert caught.value.what == "one"
    with pytest.raises(DeadlineError, match=r"write of two.*not started.*nvme_write of one"):
        store.start_write(two, filled(2))
    assert (read(store, one), read(store, two)) == (1, 1)
    with pytest.raises(DeadlineError):
        store.close()
    store.close()


def test_a_reader_keeps_its_extent_from_being_written(tmp_path: Path) -> None:
    """The read was started first; the commit retires its extent, which is not free before."""
    io = SimulatedIo(seed=1)
    with NvmeStore([tmp_path], io) as store:
        (record,) = store.reserve([("one", PAGE)], spare=1)
        write(store, record, 1)
        buffer = filled(0)
        reading = store.start_read(record, buffer)
        write(store, record, 2)
        last = store.start_write(record, filled(3))  # must wait for `reading`
        last.wait()
        reading.wait()
        assert torch.equal(buffer, filled(1))
        assert read(store, record) == 3


def test_records_from_many_threads(io: IoEngine, tmp_path: Path) -> None:
    with NvmeStore([tmp_path], io) as store:
        records = store.reserve([(f"bucket {i}", 2 * PAGE) for i in range(4)], spare=1)
        errors: list[BaseException] = []

        def work(record: Record, start: int) -> None:
            try:
                for value in range(start, start + 25):
                    write(store, record, value)
                    assert read(store, record) == value
            except BaseException as error:
                errors.append(error)

        threads = [
            threading.Thread(target=work, args=(record, 40 * index))
            for index, record in enumerate(records)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60.0)
        assert not errors
        assert [record.generation for record in records] == [25] * 4
        assert store._pools[2 * PAGE].num_free == 1


# The end


def test_close_settles_what_is_in_flight_and_is_final(io: IoEngine, tmp_path: Path) -> None:
    store = NvmeStore([tmp_path], io)
    (record,) = store.reserve([("one", PAGE)], spare=1)
    transfer = store.start_write(record, filled(1))
    store.close()
    store.close()
    assert record.generation == 1
    assert transfer.done()
    transfer.wait()
    for call in (
        lambda: store.start_read(record, filled(0)),
        lambda: store.start_write(record, filled(0)),
        lambda: store.reserve([("two", PAGE)], spare=1),
    ):
        with pytest.raises(EngineStateError, match="store is closed"):
            call()


def test_close_raises_the_error_nobody_waited_for(tmp_path: Path) -> None:
    store = NvmeStore([tmp_path], SimulatedIo(fault="op=write,errno=5"))
    (record,) = store.reserve([("one", PAGE)], spare=1)
    store.start_write(record, filled(1))
    with pytest.raises(StorageError, match="write of one"):
        store.close()
    assert not any(tmp_path.iterdir())


def test_no_paths_is_an_error(io: IoEngine) -> None:
    with pytest.raises(ValueError, match="at least one path"):
        NvmeStore([], io)
