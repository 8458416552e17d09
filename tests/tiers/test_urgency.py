"""The order of urgency on the virtual clock: what passes what, and exactly when it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offload.native.core import BULK_URGENCY
from offload.native.request_order import MAX_PASSED
from offload.tiers.nvme import NvmeStore
from offload.tiers.simulated import (
    LaneModel,
    SimulatedDeviceTier,
    SimulatedIo,
    SimulatedTicket,
)
from offload.tiers.transfer import CompletedTransfer, Urgency

MEBIBYTE = 1 << 20
# A mebibyte a second, in quanta of one second.
STEADY = LaneModel(
    bytes_per_second=MEBIBYTE, latency_seconds=0.0, jitter_seconds=0.0, quantum_bytes=MEBIBYTE
)
MEMORY = torch.zeros(4 * MEBIBYTE, dtype=torch.uint8)


def steady_io(**options: str) -> SimulatedIo:
    return SimulatedIo(lanes=dict.fromkeys(("h2d", "nvme_read", "nvme_write"), STEADY), **options)


def copy(io: SimulatedIo, mebibytes: int, urgency: int) -> SimulatedTicket:
    address = MEMORY.data_ptr()
    return io.start_copy(address, address, mebibytes * MEBIBYTE, lane="h2d", urgency=urgency)


def test_a_fetch_during_bulk_ends_within_a_quantum_of_its_own_time() -> None:
    io = steady_io()
    bulk = [copy(io, 2, Urgency.BULK) for _ in range(8)]
    io.clock.advance(0.5)
    copy(io, 2, Urgency.DEMAND).wait()
    # The quantum that had begun, and its own two; in the order of the starts it would be 18.
    assert io.clock.now_seconds == pytest.approx(3.0)
    assert not any(ticket.done() for ticket in bulk)
    for ticket in bulk:
        ticket.wait()
    assert io.clock.now_seconds == pytest.approx(18.0)  # the lane was never idle
    assert io.lanes()["h2d"] == (18 * MEBIBYTE, pytest.approx(18.0))


def ends(io: SimulatedIo, *tickets: SimulatedTicket) -> list[float]:
    """When each of them ends."""
    found: dict[SimulatedTicket, float] = {}
    while len(found) < len(tickets):
        io.clock.advance(0.5)
        for ticket in tickets:
            if ticket.done():
                found.setdefault(ticket, io.clock.now_seconds)
    return [found[ticket] for ticket in tickets]


def test_planned_fetches_go_in_the_order_of_their_places() -> None:
    io = steady_io()
    tickets = [copy(io, 1, Urgency.PLANNED + place) for place in (7, 9, 3, 3)]
    bulk = copy(io, 1, Urgency.BULK)
    urgent = copy(io, 1, Urgency.DEMAND)
    assert ends(io, *tickets, bulk, urgent) == [1.0, 5.0, 3.0, 4.0, 6.0, 2.0]


def test_bulk_moves_on_while_urgent_fetches_go_on_without_end() -> None:
    io = steady_io()
    bulk = copy(io, 2, Urgency.BULK)
    for _ in range(2 * MAX_PASSED):
        copy(io, 1, Urgency.DEMAND)
    # One quantum had begun; the other waits while MAX_PASSED urgent ones pass.
    assert ends(io, bulk) == [MAX_PASSED + 2.0]


def test_a_wait_makes_a_planned_transfer_urgent_and_bulk_the_first_of_bulk() -> None:
    io = steady_io()
    tier = SimulatedDeviceTier(16 * MEBIBYTE, io)
    source = torch.zeros(MEBIBYTE, dtype=torch.uint8)

    def start(urgency: int) -> object:
        transfer = tier.start_copy_in(tier.lease(MEBIBYTE, "bucket").tensor, source)
        transfer.expedite(urgency)
        return transfer

    begun, late, soon, waited, other = (
        start(urgency)
        for urgency in (
            Urgency.BULK,
            Urgency.PLANNED + 9,
            Urgency.PLANNED + 3,
            Urgency.BULK,
            Urgency.BULK,
        )
    )
    late.wait()
    assert io.clock.now_seconds == pytest.approx(2.0)
    other.wait()  # after `soon`, before the bulk that is older
    assert io.clock.now_seconds == pytest.approx(4.0)
    assert soon.done()
    assert begun.done()
    assert not waited.done()
    waited.expedite(Urgency.DEMAND)
    waited.wait()
    waited.expedite(Urgency.DEMAND)  # of what has ended nothing is left to raise
    CompletedTransfer("h2d").expedite(Urgency.DEMAND)


def test_classes_and_what_a_wait_makes_of_them() -> None:
    assert Urgency.DEMAND < Urgency.PLANNED < BULK_URGENCY < Urgency.BULK
    assert Urgency.when_waited_for(Urgency.PLANNED + 12) == Urgency.DEMAND
    assert Urgency.when_waited_for(Urgency.BULK) == BULK_URGENCY
    assert Urgency.when_waited_for(BULK_URGENCY) == BULK_URGENCY


def test_reads_and_writes_of_records_say_how_urgent_they_are(tmp_path: Path) -> None:
    io = steady_io()
    with NvmeStore([tmp_path], io, checksum=False) as store:
        records = store.reserve([(f"record {i}", MEBIBYTE) for i in range(6)], spare=6)
        data = torch.zeros(MEBIBYTE, dtype=torch.uint8)
        for write in [store.start_write(record, data) for record in records]:
            write.wait()
        began = io.clock.now_seconds
        bulk = [store.start_read(record, data.clone()) for record in records[:5]]
        store.start_read(records[5], data, urgency=Urgency.DEMAND).wait()
        assert io.clock.now_seconds - began == pytest.approx(2.0)
        assert sum(read.done() for read in bulk) == 1

        began = io.clock.now_seconds + 4  # when the reads are through
        writes = [store.start_write(record, data) for record in records[:5]]
        store.start_write(records[5], data, urgency=Urgency.PLANNED).wait()
        assert io.clock.now_seconds - began == pytest.approx(-2.0)
        assert sum(write.done() for write in writes) == 1
