"""Every backend: what goes out comes back, whatever its alignment and size."""

from __future__ import annotations

import gc
import os
import threading
import time
import warnings
from pathlib import Path

import pytest

import offload.native.engine as engine_module
from offload.errors import (
    ConfigError,
    DeadlineError,
    EngineStateError,
    StorageError,
    UnsupportedPlatformError,
)
from offload.native import BACKENDS, IoEngine, crc32c
from offload.native.library import _ADDED, LIBRARY_AVAILABLE
from tests.threads import run_in_threads

BLOCK = 64 * 1024
OPEN_DESCRIPTORS = Path("/proc/self/fd")
CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL

SHAPES = [  # file offset, bytes, shift of the address
    pytest.param(0, 4096, 0, id="one-page"),
    pytest.param(4096, 5 * BLOCK, 0, id="several-blocks"),
    pytest.param(8192, 3 * BLOCK + 4096, 0, id="uneven-blocks"),
    pytest.param(100, 3 * BLOCK + 77, 100, id="unaligned-ends"),
    pytest.param(100, 3 * BLOCK, 7, id="address-does-not-fit-offset"),
    pytest.param(4095, 2, 4095, id="across-a-page"),
    pytest.param(512, 512, 512, id="one-sector"),
    pytest.param(0, 0, 0, id="nothing"),
]


@pytest.mark.parametrize(("offset", "nbytes", "shift"), SHAPES)
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_round_trip(backend, tmp_path, make_memory, offset, nbytes, shift, direct):
    source, target = make_memory(8 * BLOCK, 1), make_memory(8 * BLOCK)
    with (
        IoEngine(backend=backend, block_bytes=BLOCK, queue_depth=3) as engine,
        engine.open(str(tmp_path / "f"), flags=CREATE, direct=direct) as file,
    ):
        assert engine.backend == backend
        write = engine.start_write(file, offset, source.address + shift, nbytes, checksum_seed=9)
        expected = crc32c(source.address + shift, nbytes, 9)
        assert write.wait(30) == expected
        assert write.done()
        assert write.wait(30) == expected
        read = engine.start_read(file, offset, target.address + shift, nbytes, checksum_seed=9)
        assert read.wait(30) == expected
        assert target.part(shift, nbytes) == source.part(shift, nbytes)
        assert not target.array[:shift].any()
        assert not target.array[shift + nbytes :].any()
        assert engine.start_read(file, offset, target.address + shift, nbytes).wait(30) == 0
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o600


def test_many_in_flight(backend, tmp_path, make_memory):
    count, nbytes = 60, 3 * 4096
    source, target = make_memory(count * nbytes, 2), make_memory(count * nbytes)
    with (
        IoEngine(backend=backend, block_bytes=8192, queue_depth=4) as engine,
        engine.open(str(tmp_path / "f"), flags=CREATE) as file,
    ):
        writes = [
            engine.start_write(file, at, source.address + at, nbytes)
            for at in range(0, count * nbytes, nbytes)
        ]
        for write in reversed(writes):
            write.wait(30)
        reads = [
            engine.start_read(file, at, target.address + at, nbytes, checksum_seed=0)
            for at in range(0, count * nbytes, nbytes)
        ]
        for i, read in enumerate(reads):
            assert read.wait(30) == crc32c(source.address + i * nbytes, nbytes)
        assert (source.array == target.array).all()
        lanes = engine.lanes()
        assert lanes["nvme_write"][0] == lanes["nvme_read"][0] == count * nbytes
        assert lanes["nvme_write"][1] > 0 < lanes["nvme_read"][1]


def test_threads_share_an_engine_and_a_ticket(backend, tmp_path, make_memory):
    memory = make_memory(1 << 20, 3)
    with (
        IoEngine(backend=backend, block_bytes=BLOCK) as engine,
        engine.open(str(tmp_path / "f"), flags=CREATE) as file,
    ):
        shared = engine.start_write(file, 0, memory.address, 1 << 20, checksum_seed=0)
        results: list[int] = []
        run_in_threads(*[lambda: results.append(shared.wait(30))] * 4)
        assert results == [crc32c(memory.address, 1 << 20)] * 4


@pytest.mark.parametrize("writer", BACKENDS)
def test_files_and_checksums_are_interchangeable(writer, backend, tmp_path, make_memory):
    if IoEngine.probe()[writer] != "ok":
        pytest.skip(f"{writer} does not work here")
    nbytes, offset = 5 * BLOCK + 123, 4096 * 3 + 17
    source, target = make_memory(6 * BLOCK, 4), make_memory(6 * BLOCK)
    path = str(tmp_path / "f")
    with (
        IoEngine(backend=writer, block_bytes=BLOCK) as engine,
        engine.open(path, flags=CREATE) as file,
    ):
        wrote = engine.start_write(file, offset, source.address, nbytes, checksum_seed=0)
        checksum = wrote.wait(30)
        engine.fsync(file)
    with (
        IoEngine(backend=backend, block_bytes=4096) as engine,
        engine.open(path, flags=os.O_RDONLY) as file,
    ):
        read = engine.start_read(file, offset, target.address, nbytes, checksum_seed=0)
        assert read.wait(30) == checksum
    assert target.part(0, nbytes) == source.part(0, nbytes)


@pytest.mark.parametrize("lane", ["h2d", "d2h"])
def test_copies(backend, make_memory, lane):
    nbytes = 3 * BLOCK + 5
    source, target = make_memory(4 * BLOCK, 5), make_memory(4 * BLOCK)
    with IoEngine(backend=backend, copy_threads=3) as engine:
        ticket = engine.start_copy(target.address + 1, source.address, nbytes, lane=lane)
        assert ticket.wait(30) == 0
        assert target.part(1, nbytes) == source.part(0, nbytes)
        assert target.array[nbytes + 1] == 0
        assert engine.lanes()[lane][0] == nbytes
        assert engine.start_copy(target.address, source.address, 0, lane=lane).wait(30) == 0


def test_registered_memory(backend, tmp_path, make_memory):
    memory, target = make_memory(4 * BLOCK, 6), make_memory(4 * BLOCK)
    with (
        IoEngine(backend=backend, block_bytes=BLOCK) as engine,
        engine.open(str(tmp_path / "f"), flags=CREATE) as file,
    ):
        assert engine.register(memory.address, 4 * BLOCK)  # "ok", or a reason
        engine.start_write(file, 0, memory.address, 4 * BLOCK).wait(30)
        engine.unregister(memory.address)
        engine.unregister(memory.address)
        engine.start_read(file, 0, target.address, 4 * BLOCK).wait(30)
        assert (memory.array == target.array).all()


def test_several_engines(backend, tmp_path, make_memory):
    memory = make_memory(BLOCK, 7)
    engines = [IoEngine(backend=backend) for _ in range(3)]
    for i, engine in enumerate(engines):
        with engine.open(str(tmp_path / str(i)), flags=CREATE) as file:
            engine.start_write(file, 0, memory.address, BLOCK).wait(30)
        engine.close()
        engine.close()
    assert [(tmp_path / str(i)).read_bytes() for i in range(3)] == [memory.part(0, BLOCK)] * 3


def test_a_closed_engine_keeps_results_and_takes_nothing(backend, tmp_path, make_memory):
    memory = make_memory(BLOCK, 7)
    engine = IoEngine(backend=backend)
    file = engine.open(str(tmp_path / "f"), flags=CREATE)
    ticket = engine.start_write(file, 0, memory.address, BLOCK, checksum_seed=0)
    engine.close()
    assert ticket.wait(30) == crc32c(memory.address, BLOCK)
    with pytest.raises(EngineStateError, match="closed"):
        engine.start_write(file, 0, memory.address, BLOCK)


def test_a_closed_file_stays_open_under_its_requests(backend, tmp_path, make_memory):
    memory = make_memory(BLOCK, 8)
    with IoEngine(backend=backend, fault="op=write,delay=100") as engine:
        file = engine.open(str(tmp_path / "f"), flags=CREATE)
        ticket = engine.start_write(file, 0, memory.address, BLOCK)
        file.close()
        with open(os.devnull, "rb"):  # would take the descriptor's number over
            ticket.wait(30)
        assert (tmp_path / "f").read_bytes() == memory.part(0, BLOCK)
        with pytest.raises(EngineStateError, match="closed"):
            engine.start_write(file, 0, memory.address, BLOCK)


def test_a_dropped_ticket_leaves_its_request_in_order(backend, tmp_path, make_memory):
    memory = make_memory(BLOCK, 8)
    with IoEngine(backend=backend, fault="op=write,delay=50") as engine:
        with engine.open(str(tmp_path / "f"), flags=CREATE) as file:
            engine.start_write(file, 0, memory.address, BLOCK)
        gc.collect()
    assert (tmp_path / "f").read_bytes() == memory.part(0, BLOCK)


def test_a_cycle_of_ticket_and_engine_is_collected(backend, tmp_path, make_memory):
    """The collector finalizes the members of a cycle in any order."""
    memory = make_memory(BLOCK, 8)
    for _ in range(5):
        engine = IoEngine(backend=backend)
        with engine.open(str(tmp_path / "f"), flags=os.O_RDWR | os.O_CREAT) as file:
            ticket = engine.start_write(file, 0, memory.address, BLOCK)
        cycle: list[object] = [engine, ticket]
        cycle.append(cycle)
        del engine, ticket, cycle
        gc.collect()
    assert (tmp_path / "f").read_bytes() == memory.part(0, BLOCK)


def test_descriptors_are_given_back(backend, tmp_path, make_memory):
    memory = make_memory(BLOCK, 8)

    def cycle() -> None:
        with IoEngine(backend=backend) as engine:
            for i in range(5):
                with engine.open(str(tmp_path / f"f{i}"), flags=os.O_RDWR | os.O_CREAT) as file:
                    engine.start_write(file, 0, memory.address, BLOCK).wait(30)
        del engine
        gc.collect()

    cycle()
    before = len(list(OPEN_DESCRIPTORS.iterdir())), threading.active_count()
    for _ in range(3):
        cycle()
    assert (len(list(OPEN_DESCRIPTORS.iterdir())), threading.active_count()) == before


def test_o_tmpfile_and_from_fd(backend, tmp_path, make_memory):
    memory, target = make_memory(BLOCK, 8), make_memory(BLOCK)
    with IoEngine(backend=backend) as engine:
        try:
            fd = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR, 0o600)
        except OSError as error:
            pytest.skip(f"no O_TMPFILE: {error}")
        with engine.from_fd(fd, "anonymous") as file:
            engine.start_write(file, 0, memory.address, BLOCK).wait(30)
            engine.start_read(file, 0, target.address, BLOCK).wait(30)
        assert (memory.array == target.array).all()
    assert list(tmp_path.iterdir()) == []


def test_links_are_not_followed(backend, tmp_path):
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with IoEngine(backend=backend) as engine:
        with pytest.raises(StorageError) as caught:
            engine.open(str(tmp_path / "link"), flags=os.O_RDWR)
        with pytest.raises(StorageError, match=r"open of .*missing/f failed: .*\[ENOENT\]"):
            engine.open(str(tmp_path / "missing/f"), flags=CREATE)
    assert caught.value.path.endswith("link")


def test_impossible_requests_are_refused(backend, tmp_path, make_memory):
    memory = make_memory(4096)
    with (
        IoEngine(backend=backend) as engine,
        engine.open(str(tmp_path / "f"), flags=CREATE) as file,
    ):
        for offset, address, nbytes in [
            (-1, memory.address, 1),
            (0, 0, 1),
            (0, memory.address, -1),
            (2**63 - 1, memory.address, 4096),
        ]:
            with pytest.raises(StorageError, match="EINVAL"):
                engine.start_read(file, offset, address, nbytes)


def test_bad_settings_are_told_together():
    with pytest.raises(ConfigError) as caught:
        IoEngine(backend="tape", queue_depth=0, block_bytes=1000, fault="op=write,bend=1")
    assert len(caught.value.problems) == 4


def test_a_backend_that_does_not_work_says_why(monkeypatch):
    monkeypatch.setattr(engine_module.library, "LIBRARY_AVAILABLE", False)
    monkeypatch.setattr(engine_module.library, "UNAVAILABLE_REASON", "the library is away")
    with pytest.raises(UnsupportedPlatformError, match="the library is away"):
        IoEngine(backend="io_uring")


def test_without_the_library_there_is_one_warning(monkeypatch):
    monkeypatch.setattr(engine_module.library, "LIBRARY_AVAILABLE", False)
    monkeypatch.setattr(engine_module.library, "UNAVAILABLE_REASON", "the library is away")
    monkeypatch.setattr(engine_module, "_missing_library_was_told", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with IoEngine() as engine:
                assert engine.backend == "python"
    assert len(caught) == 1
    assert "the library is away" in str(caught[0].message)


def test_busy_seconds_are_a_union(backend, tmp_path, make_memory):
    memory = make_memory(4 * 4096, 9)
    with (
        IoEngine(backend=backend, threads=4, fault="op=write,count=0,delay=100") as engine,
        engine.open(str(tmp_path / "f"), flags=CREATE) as file,
    ):
        started = time.monotonic()
        tickets = [
            engine.start_write(file, i * 4096, memory.address + i * 4096, 4096) for i in range(4)
        ]
        for ticket in tickets:
            ticket.wait(30)
        elapsed = time.monotonic() - started
        busy = engine.lanes()["nvme_write"][1]
        assert 0.1 <= busy <= elapsed


def test_close_has_a_deadline(backend, tmp_path, make_memory):
    memory = make_memory(4096, 9)
    engine = IoEngine(backend=backend, fault="op=write,delay=300")
    with engine.open(str(tmp_path / "f"), flags=CREATE) as file:
        ticket = engine.start_write(file, 0, memory.address, 4096)
    with pytest.raises(DeadlineError, match="in flight"):
        engine.close(0.02)
    assert not ticket.done()
    engine.close()
    assert ticket.wait(30) == 0


def test_when_a_request_was_begun_and_ended(backend, tmp_path, make_memory):
    memory = make_memory(BLOCK, 9)
    with (
        IoEngine(backend=backend, fault="op=write,count=1,delay=20") as engine,
        engine.open(str(tmp_path / "f"), flags=CREATE) as file,
    ):
        before = time.perf_counter()
        ticket = engine.start_write(file, 0, memory.address, BLOCK)
        assert ticket.span() is None, "it goes on"
        ticket.wait(30)
        nothing = engine.start_write(file, 0, memory.address, 0)
        nothing.wait(30)
        after = time.perf_counter()
        if backend != "python" and not _knows_spans(engine):
            pytest.skip("the native library was built before it had offload_ticket_span")
        for each, least in ((ticket, 0.02), (nothing, 0.0)):
            began, ended = each.span()
            assert before <= began <= began + least <= ended <= after


def test_an_older_library_of_the_same_interface_does_not_know_when(
    tmp_path, make_memory, monkeypatch
):
    if not LIBRARY_AVAILABLE:
        pytest.skip("there is no native library")
    memory = make_memory(BLOCK, 9)
    with (
        IoEngine(backend="threads") as engine,
        engine.open(str(tmp_path / "f"), flags=CREATE) as file,
    ):
        monkeypatch.setattr(engine._core, "_library", Without(engine._core._library))
        ticket = engine.start_write(file, 0, memory.address, BLOCK)
        ticket.wait(30)
        assert ticket.span() is None


def _knows_spans(engine):
    return hasattr(engine._core._library, "offload_ticket_span")


class Without:
    """A library that lacks the functions that were added to its interface."""

    def __init__(self, library):
        self._library = library

    def __getattr__(self, name):
        if name.removeprefix("offload_") in _ADDED:
            raise AttributeError(name)
        return getattr(self._library, name)
