"""What can be known of the CUDA tier without CUDA; the rest runs where there is a device."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from offload.errors import BudgetError, UnsupportedPlatformError
from offload.native import IoEngine
from offload.tiers.cuda import CudaDeviceTier, CudaTransfer, open_device_tier
from offload.tiers.device import CpuDeviceTier
from offload.tiers.host import HostArena
from offload.timeline import Timeline

MEBIBYTE = 1 << 20
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_the_kind_chooses_the_device(io: IoEngine) -> None:
    tier = open_device_tier("cpu", MEBIBYTE, io)
    assert isinstance(tier, CpuDeviceTier)
    assert (tier.device.type, tier.budget_bytes, tier.host_addressable) == ("cpu", MEBIBYTE, True)
    kind = CudaDeviceTier if torch.cuda.is_available() else CpuDeviceTier
    assert isinstance(open_device_tier("auto", MEBIBYTE, io), kind)


@pytest.mark.parametrize("kind", ["cuda", "cuda:0", "cuda:7"])
def test_a_missing_device_is_an_error(
    io: IoEngine, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedPlatformError, match=r"torch sees 0 .*tiers\.device\.kind"):
        open_device_tier(kind, MEBIBYTE, io)


@pytest.mark.gpu
@needs_cuda
def test_copies_there_and_back_are_exact(io: IoEngine) -> None:
    tier = open_device_tier("cuda", 64 * MEBIBYTE, io)
    with HostArena(16 * MEBIBYTE) as arena:
        arena.page_lock()
        source = arena.lease(4 * MEBIBYTE, "weights").tensor
        back = arena.lease(4 * MEBIBYTE, "gradients").tensor
        source.copy_(torch.randint(0, 256, source.shape, dtype=torch.uint8))
        lease = tier.lease(4 * MEBIBYTE, "bucket")
        tier.make_current_wait(tier.start_copy_in(lease.tensor, source))
        lease.tensor.bitwise_not_()  # on the compute stream, after the copy
        transfer = tier.start_copy_out(back, lease.tensor)
        transfer.wait()
        assert transfer.done()
        assert torch.equal(back, ~source)
        tier.start_copy_in(lease.tensor, source).wait()
        totals = tier.lanes()
        assert {lane: total for lane, (total, _) in totals.items()} == {
            "h2d": 8 * MEBIBYTE,  # also the one that was ordered and not waited for
            "d2h": 4 * MEBIBYTE,
        }
        assert all(seconds > 0 for _, seconds in totals.values())
        storage = lease.storage_at(512, 1024)
        assert storage.data_ptr() == lease.tensor.data_ptr() + 512
        assert storage.device.type == "cuda"
        lease.release()
        with pytest.raises(BudgetError):
            tier.lease(65 * MEBIBYTE, "too much")
    tier.close()


@pytest.mark.gpu
@needs_cuda
def test_memory_of_the_slab_is_reused_after_every_stream_that_used_it(io: IoEngine) -> None:
    tier = open_device_tier("cuda", 64 * MEBIBYTE, io)
    tier.reserve(16 * MEBIBYTE)
    side = torch.cuda.Stream(tier.device)
    with HostArena(64 * MEBIBYTE) as arena:
        arena.page_lock()
        source = arena.lease(16 * MEBIBYTE, "weights").tensor
        seen = []
        for number in range(1, 9):
            source.fill_(number)
            lease = tier.try_lease(16 * MEBIBYTE, "page")
            assert lease is not None
            transfer = tier.start_copy_in(lease.tensor, source)
            tier.make_current_wait(transfer)
            tier.enter(lease)
            with torch.cuda.stream(side):
                tier.enter(lease)
                torch.cuda._sleep(10_000_000)  # type: ignore[no-untyped-call]
                seen.append(lease.tensor.sum(dtype=torch.int64))
            lease.release()
            transfer.wait()  # only the copy: the side stream still reads
        torch.cuda.synchronize()
        assert [int(each) for each in seen] == [n * 16 * MEBIBYTE for n in range(1, 9)]
        tier.close()


def test_a_copy_of_a_recorded_step_is_as_long_as_the_device_says():
    class PassedEvent:
        def query(self):
            return True

        def elapsed_time(self, end):
            del end
            return 0.25  # milliseconds

    tier = SimpleNamespace(
        timeline=Timeline(), deadline_seconds=1.0, count_copy=lambda *counted: None
    )
    tier.timeline.start(1, dict)
    buffers = (torch.zeros(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8))
    copy = CudaTransfer(tier, "h2d", PassedEvent(), PassedEvent(), buffers, "weights")
    time.sleep(0.002)
    copy.wait()
    copy.wait()
    tier.timeline.end_step()
    (span,) = tier.timeline.take(now=True).spans
    assert (span.lane, span.name, span.nbytes) == ("h2d", "weights", 8)
    assert span.ended - span.began == pytest.approx(0.25e-3)
    assert 0 <= span.queued <= span.began
