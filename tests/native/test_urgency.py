"""Every backend: the order in which blocks go, seen by what is left where they overlap.

What is written last at a place stays there, and what is read tells what was written before. The
first write is as urgent as any, so it goes first, and long enough in flight for all others to be
queued behind it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from offload.errors import ConfigError, StorageError
from offload.native import IoEngine, IoFile

BLOCK = 64 * 1024
CREATE = os.O_RDWR | os.O_CREAT
FIRST, BULK, URGENT, RAISED = range(4)  # parts of the memory, two blocks each


@contextmanager
def one_at_a_time(backend: str, path: str, fault: str = "") -> Iterator[tuple[IoEngine, IoFile]]:
    held = "op=write,nth=1,delay=300"
    with (
        IoEngine(
            backend=backend,
            block_bytes=BLOCK,
            queue_depth=1,
            threads=1,
            fault=f"{held};{fault}" if fault else held,
        ) as engine,
        engine.open(path, flags=CREATE) as file,
    ):
        os.posix_fallocate(file.fd, 0, 8 * BLOCK)
        yield engine, file


def test_urgent_requests_pass_bulk_ones_of_both_lanes(backend, tmp_path, make_memory):
    memory, seen = make_memory(8 * BLOCK, 1), make_memory(2 * BLOCK)

    def part(number: int, block: int = 0) -> int:
        return memory.address + (2 * number + block) * BLOCK

    with one_at_a_time(backend, str(tmp_path / "f")) as (engine, file):
        tickets = [
            engine.start_write(file, 7 * BLOCK, part(FIRST), BLOCK, urgency=0),
            engine.start_write(file, 0, part(BULK), 2 * BLOCK),
            engine.start_read(file, 2 * BLOCK, seen.address, 2 * BLOCK),
            engine.start_write(file, 0, part(URGENT), BLOCK, urgency=0),
            engine.start_write(file, 2 * BLOCK, part(URGENT, 1), BLOCK, urgency=0),
            engine.start_write(file, 3 * BLOCK, part(RAISED), BLOCK),
        ]
        tickets[-1].expedite(0)
        for ticket in tickets:
            ticket.wait(30)
            ticket.expedite(0)  # of what has ended nothing is left to raise
    assert seen.part(0, BLOCK) == memory.part((2 * URGENT + 1) * BLOCK, BLOCK)
    assert seen.part(BLOCK, BLOCK) == memory.part(2 * RAISED * BLOCK, BLOCK)
    left = (tmp_path / "f").read_bytes()
    assert left[: 2 * BLOCK] == memory.part(2 * BULK * BLOCK, 2 * BLOCK)


def test_places_in_a_class_order_it_and_equals_keep_their_order(backend, tmp_path, make_memory):
    memory = make_memory(6 * BLOCK, 2)
    writes = [(5, 0), (0, 7), (0, 3), (0, 5), (1, 3), (1, 3)]  # where, how urgent
    with one_at_a_time(backend, str(tmp_path / "f")) as (engine, file):
        tickets = [
            engine.start_write(
                file, place * BLOCK, memory.address + i * BLOCK, BLOCK, urgency=urgency
            )
            for i, (place, urgency) in enumerate(writes)
        ]
        for ticket in tickets:
            ticket.wait(30)
    left = (tmp_path / "f").read_bytes()
    assert left[:BLOCK] == memory.part(1 * BLOCK, BLOCK)
    assert left[BLOCK : 2 * BLOCK] == memory.part(5 * BLOCK, BLOCK)


def test_a_failed_urgent_request_holds_nobody_up(backend, tmp_path, make_memory):
    memory = make_memory(4 * BLOCK, 3)
    fault = "op=read,count=0,errno=5"
    with one_at_a_time(backend, str(tmp_path / "f"), fault) as (engine, file):
        bulk = engine.start_write(file, 0, memory.address, 4 * BLOCK)
        urgent = [engine.start_read(file, 0, memory.address, BLOCK, urgency=i) for i in range(40)]
        for ticket in urgent:
            with pytest.raises(StorageError):
                ticket.wait(30)
        bulk.wait(30)


def test_bulk_ends_while_urgent_requests_go_on(backend, tmp_path, make_memory):
    memory = make_memory(8 * BLOCK, 4)
    with (
        IoEngine(backend=backend, block_bytes=BLOCK, queue_depth=2, threads=1) as engine,
        engine.open(str(tmp_path / "f"), flags=CREATE) as file,
    ):
        os.posix_fallocate(file.fd, 0, 8 * BLOCK)
        target = make_memory(4 * BLOCK)

        def start():
            return engine.start_read(file, 0, target.address, 4 * BLOCK, urgency=0)

        urgent = [start() for _ in range(16)]
        bulk = engine.start_write(file, 0, memory.address, 8 * BLOCK)
        while not bulk.done():  # there are always urgent ones left
            urgent.append(start())
            urgent.pop(0).wait(30)
        bulk.wait()


def test_urgent_passes_what_the_disk_is_not_given(backend, tmp_path, make_memory):
    memory, target = make_memory(4 * BLOCK, 5), make_memory(BLOCK)
    with (
        IoEngine(
            backend=backend,
            block_bytes=BLOCK,
            threads=2,
            held_depth=1,
            fault="op=write,nth=1,delay=1500",
        ) as engine,
        engine.open(str(tmp_path / "f"), flags=CREATE) as file,
    ):
        os.posix_fallocate(file.fd, 0, 8 * BLOCK)
        bulk = engine.start_write(file, 0, memory.address, 4 * BLOCK)
        while engine.lanes()["nvme_write"][1] == 0.0:  # the first block is in flight
            time.sleep(1e-3)
        engine.start_read(file, 4 * BLOCK, target.address, BLOCK, urgency=0).wait(30)
        assert not bulk.done()
        assert engine.lanes()["nvme_write"][0] == 0  # the other three blocks are held back
        bulk.wait(30)


def test_an_urgent_copy_passes_between_the_blocks_of_a_bulk_one(backend, make_memory):
    bulk, urgent, target = make_memory(4 * BLOCK, 6), make_memory(BLOCK, 7), make_memory(4 * BLOCK)
    with IoEngine(backend=backend, block_bytes=BLOCK, fault="op=copy,nth=1,delay=300") as engine:
        first = engine.start_copy(target.address, bulk.address, 4 * BLOCK, lane="d2h")
        last_block = target.address + 3 * BLOCK
        second = engine.start_copy(last_block, urgent.address, BLOCK, lane="d2h", urgency=0)
        first.wait(30)
        second.wait(30)
        assert engine.lanes()["d2h"][0] == 5 * BLOCK
    assert target.part(0, 4 * BLOCK) == bulk.part(0, 4 * BLOCK)


def test_a_held_depth_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="held_depth is 0"):
        IoEngine(backend="python", held_depth=0)
