from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from offload.errors import DeadlineError, StorageError
from offload.tiers.device import CpuDeviceTier
from offload.tiers.simulated import LaneModel, SimulatedDeviceTier, SimulatedIo, VirtualClock
from offload.tiers.transfer import Transfer

MEBIBYTE = 1 << 20
STEADY = LaneModel(bytes_per_second=MEBIBYTE, latency_seconds=0.0, jitter_seconds=0.0)


def steady_tier(**faults: str) -> SimulatedDeviceTier:
    io = SimulatedIo(lanes={"h2d": STEADY, "d2h": STEADY}, **faults)
    return SimulatedDeviceTier(8 * MEBIBYTE, io)


def start(tier: CpuDeviceTier, value: int, nbytes: int = MEBIBYTE) -> tuple[torch.Tensor, Transfer]:
    lease = tier.lease(nbytes, "bucket")
    source = torch.full((nbytes,), value, dtype=torch.uint8)
    return lease.tensor, tier.start_copy_in(lease.tensor, source)


def test_bytes_move_at_the_end_and_the_target_is_poison_before() -> None:
    tier = steady_tier()
    target, transfer = start(tier, 3)
    assert bool(target.view(torch.float32).isnan().all())
    assert not transfer.done()
    tier.clock.advance(0.9)
    assert not transfer.done()
    tier.clock.advance(0.2)
    assert transfer.done()
    assert bool((target == 3).all())
    assert tier.clock.now_seconds == pytest.approx(1.1)
    transfer.wait()
    assert tier.clock.now_seconds == pytest.approx(1.1)


def test_a_source_that_changes_in_flight_shows() -> None:
    tier = steady_tier()
    lease = tier.lease(16, "bucket")
    source = torch.zeros(16, dtype=torch.uint8)
    transfer = tier.start_copy_in(lease.tensor, source)
    source.fill_(1)
    transfer.wait()
    assert bool((lease.tensor == 1).all())


def test_a_lane_is_a_pipe_and_lanes_overlap() -> None:
    tier = steady_tier()
    _, first = start(tier, 1)
    out = torch.zeros(MEBIBYTE, dtype=torch.uint8)
    target, second = start(tier, 2)
    departing = tier.start_copy_out(out, tier.lease(MEBIBYTE, "gradient").tensor)
    first.wait()
    assert tier.clock.now_seconds == pytest.approx(1.0)
    departing.wait()
    assert tier.clock.now_seconds == pytest.approx(1.0)
    second.wait()
    assert tier.clock.now_seconds == pytest.approx(2.0)
    assert tier.lanes() == {"h2d": (2 * MEBIBYTE, 2.0), "d2h": (MEBIBYTE, 1.0)}
    assert bool((target == 2).all())


def order_of_ends(seed: int) -> list[int]:
    io = SimulatedIo(seed=seed)
    tier = SimulatedDeviceTier(MEBIBYTE, io)
    transfers = [start(tier, value, 64)[1] for value in range(8)]
    order: list[int] = []
    while len(order) < 8:
        io.clock.advance(1e-5)
        order += [i for i, each in enumerate(transfers) if each.done() and i not in order]
    return order


def test_the_seed_decides_the_order_of_ends() -> None:
    orders = [order_of_ends(seed) for seed in range(4)]
    assert orders[0] == order_of_ends(0)
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(8)) for order in orders)


def test_an_empty_queue_is_a_deadlock_that_ends_in_a_deadline() -> None:
    tier = steady_tier(fault="op=copy,drop=1")
    target, transfer = start(tier, 1)
    with pytest.raises(DeadlineError, match="still in flight"):
        transfer.wait()
    assert tier.clock.now_seconds == 60.0
    assert bool((target == 0xFF).all())
    ticket = SimulatedIo(fault="op=copy,drop=1").start_copy(
        target.data_ptr(), target.data_ptr(), 8, lane="h2d"
    )
    with pytest.raises(DeadlineError):
        ticket.wait()


def test_faults_act_as_in_the_real_engine(tmp_path: Path) -> None:
    io = SimulatedIo(
        fault="op=fsync,nth=2,errno=5;op=write,nth=2,delay=5000;op=read,nth=2,corrupt=1"
    )
    file = io.open(str(tmp_path / "file"), flags=os.O_RDWR | os.O_CREAT)
    data = torch.arange(64, dtype=torch.uint8)
    for _ in range(2):
        before = io.clock.now_seconds
        io.start_write(file, 0, data.data_ptr(), 64).wait()
    assert io.clock.now_seconds - before > 5.0
    for expected in (True, False):
        buffer = torch.zeros(64, dtype=torch.uint8)
        io.start_read(file, 0, buffer.data_ptr(), 64).wait()
        assert torch.equal(buffer, data) is expected
    with pytest.raises(StorageError) as caught:
        io.start_read(file, 32, buffer.data_ptr(), 64).wait()
    assert caught.value.errno == errno.EIO
    io.fsync(file)
    with pytest.raises(StorageError):
        io.fsync(file)
    assert io.lanes()["nvme_write"][0] == 128
    assert io.register(0, 1) == "ok"
    io.close()


def test_a_device_can_be_told_to_be_no_host_memory() -> None:
    assert SimulatedDeviceTier(4096, SimulatedIo()).host_addressable
    assert not SimulatedDeviceTier(4096, SimulatedIo(), host_addressable=False).host_addressable


def test_ends_at_one_time_run_in_the_order_of_their_start() -> None:
    clock, order = VirtualClock(), []
    for value in range(5):
        clock.at(1.0, lambda value=value: order.append(value))
    clock.advance(1.0)
    assert order == [0, 1, 2, 3, 4]
