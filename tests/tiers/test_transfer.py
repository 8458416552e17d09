from __future__ import annotations

import threading

import pytest
import torch

from offload.errors import DeadlineError, StorageError
from offload.native import IoEngine
from offload.tiers.device import CpuDeviceTier
from offload.tiers.simulated import SimulatedIo
from offload.tiers.transfer import CompletedTransfer, Transfer, wait_all


def start_copy(fault: str) -> Transfer:
    tier = CpuDeviceTier(1 << 20, SimulatedIo(fault=fault))
    lease = tier.lease(4096, "bucket")
    return tier.start_copy_in(lease.tensor, torch.zeros(4096, dtype=torch.uint8))


def test_an_error_is_raised_again_unchanged() -> None:
    transfer = start_copy("op=copy,errno=5")
    errors = []
    for _ in range(3):
        with pytest.raises(StorageError) as caught:
            transfer.wait()
        errors.append(caught.value)
    assert errors[0] is errors[1] is errors[2]
    depth, traceback = 0, errors[0].__traceback__
    while traceback is not None:
        depth, traceback = depth + 1, traceback.tb_next
    assert depth <= 3, "the traceback grows with every raise"


def test_a_deadline_settles_nothing() -> None:
    transfer = start_copy("op=copy,delay=90000")
    with pytest.raises(DeadlineError, match=r"not done after 60 s.*still in flight") as caught:
        transfer.wait()
    assert (caught.value.operation, caught.value.nbytes) == ("h2d", 4096)
    assert not transfer.done()
    transfer.wait(timeout=40.0)  # virtual time: the copy ends at 90 s
    assert transfer.done()
    transfer.wait()


def test_a_deadline_in_real_time() -> None:
    with IoEngine(backend="python", fault="op=copy,delay=300") as io:
        tier = CpuDeviceTier(1 << 20, io, deadline_seconds=0.05)
        lease = tier.lease(4096, "bucket")
        transfer = tier.start_copy_in(lease.tensor, torch.ones(4096, dtype=torch.uint8))
        with pytest.raises(DeadlineError):
            transfer.wait()
        transfer.wait(timeout=30.0)
        assert bool((lease.tensor == 1).all())


def test_two_threads_settle_once() -> None:
    with IoEngine(backend="python", fault="op=copy,delay=100") as io:
        tier = CpuDeviceTier(1 << 20, io)
        lease = tier.lease(4096, "bucket")
        transfer = tier.start_copy_in(lease.tensor, torch.ones(4096, dtype=torch.uint8))
        threads = [threading.Thread(target=transfer.wait) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30.0)
        assert transfer.done()


def test_wait_all_settles_all_and_raises_the_first_error() -> None:
    io = SimulatedIo(fault="op=copy,nth=2,errno=5;op=copy,nth=3,errno=28")
    tier = CpuDeviceTier(1 << 20, io)
    source = torch.zeros(4096, dtype=torch.uint8)
    transfers = [tier.start_copy_in(tier.lease(4096, "b").tensor, source) for _ in range(4)]
    with pytest.raises(StorageError) as caught:
        wait_all(transfers)
    assert caught.value.errno == 5
    assert all(transfer.done() for transfer in transfers)
    wait_all([CompletedTransfer("h2d", 7)])


def test_wait_all_waits_for_one_deadline_only() -> None:
    io = SimulatedIo(fault="op=copy,count=0,delay=90000")
    tier = CpuDeviceTier(1 << 20, io)
    source = torch.zeros(4096, dtype=torch.uint8)
    transfers = [tier.start_copy_in(tier.lease(4096, "b").tensor, source) for _ in range(4)]
    before = io.clock.now_seconds
    with pytest.raises(DeadlineError):
        wait_all(transfers)
    assert io.clock.now_seconds - before == pytest.approx(60), "not one deadline for each of them"
    assert not any(transfer.done() for transfer in transfers)
