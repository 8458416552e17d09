from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import BudgetError, EngineStateError
from offload.native import IoEngine
from offload.tiers import device as device_module
from offload.tiers.device import CpuDeviceTier, DeviceLease
from offload.tiers.simulated import SimulatedIo

PAGE = 4096


@pytest.fixture
def tier(io: IoEngine) -> CpuDeviceTier:
    return CpuDeviceTier(16 * PAGE, io)


class CountingTier(CpuDeviceTier):
    """Knows what is really allocated, to test the budget against it."""

    def __init__(self, budget_bytes: int) -> None:
        super().__init__(budget_bytes, SimulatedIo())
        self.allocated_bytes = 0
        self.num_allocations = 0

    def _allocate(self, nbytes: int) -> torch.Tensor:
        memory = super()._allocate(nbytes)
        self.allocated_bytes += nbytes
        self.num_allocations += 1
        assert self.allocated_bytes <= self.budget_bytes, "over the budget"
        import weakref

        weakref.finalize(memory, self._gone, nbytes)
        return memory

    def _gone(self, nbytes: int) -> None:
        self.allocated_bytes -= nbytes


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["lease", "lease", "release", "hold", "unhold"]),
            st.integers(1, 7 * PAGE),
        ),
        max_size=50,
    )
)
def test_memory_stays_in_the_budget_and_nothing_fails_by_fragmentation(
    steps: list[tuple[str, int]],
) -> None:
    tier = CountingTier(16 * PAGE)
    leases: list[DeviceLease] = []
    held = 0
    for step, nbytes in steps:
        used = sum(-(-each.nbytes // PAGE) * PAGE for each in leases) + held
        assert tier.used_bytes == used
        if step == "lease":
            lease = tier.try_lease(nbytes, "x")
            assert (lease is None) == (used + -(-nbytes // PAGE) * PAGE > tier.budget_bytes)
            if lease is not None:
                assert lease.tensor.shape == (nbytes,)
                leases.append(lease)
            del lease
        elif step == "release" and leases:
            leases.pop(nbytes % len(leases)).release()
        elif step == "hold":
            fits = tier.try_hold(nbytes, "gradients")
            assert fits == (used + nbytes <= tier.budget_bytes)
            held += nbytes if fits else 0
        elif step == "unhold" and held:
            tier.unhold(min(held, nbytes))
            held -= min(held, nbytes)
        assert tier.allocated_bytes + held <= tier.budget_bytes
    peak = tier.peak_bytes
    assert tier.used_bytes <= peak <= tier.budget_bytes


def test_released_memory_is_reused_by_size_and_given_back_for_room() -> None:
    tier = CountingTier(4 * PAGE)
    first = tier.lease(2 * PAGE, "a")
    address = first.tensor.data_ptr()
    first.release()
    second = tier.lease(2 * PAGE - 5, "b")
    assert second.tensor.data_ptr() == address
    assert tier.num_allocations == 1
    second.release()
    del first, second
    gc.collect()
    assert (tier.used_bytes, tier.allocated_bytes) == (0, 2 * PAGE)
    tier.hold(4 * PAGE, "gradients")
    assert tier.allocated_bytes == 0
    tier.unhold(4 * PAGE)
    tier.lease(3 * PAGE, "c").release()
    tier.lease(2 * PAGE, "d").release()  # 3 + 2 would be over the budget
    assert tier.allocated_bytes == 2 * PAGE
    tier.close()
    gc.collect()
    assert tier.allocated_bytes == 0
    with pytest.raises(EngineStateError, match="closed"):
        tier.lease(1, "late")


class Registrations(SimulatedIo):
    """Knows what memory is registered with it."""

    def __init__(self) -> None:
        super().__init__()
        self.registered: dict[int, int] = {}
        self.asked = 0

    def register(self, address: int, nbytes: int) -> str:
        self.asked += 1
        self.registered[address] = nbytes
        return "ok"

    def unregister(self, address: int) -> None:
        del self.registered[address]


def test_memory_that_is_leased_again_is_registered_while_it_exists() -> None:
    io = Registrations()
    tier = CpuDeviceTier(4 * PAGE, io)
    tier.lease(PAGE, "home").release()
    assert not io.registered
    for _ in range(3):
        lease = tier.lease(PAGE, "page")
        address = lease.tensor.data_ptr()
        assert io.registered == {address: PAGE}
        lease.release()
    assert io.asked == 1
    tier.hold(4 * PAGE, "gradients")  # the memory goes back to the system
    assert not io.registered
    tier.unhold(4 * PAGE)
    tier.lease(2 * PAGE, "page").release()
    late = tier.lease(2 * PAGE, "page")
    assert list(io.registered.values()) == [2 * PAGE]
    tier.close()
    late.release()
    assert not io.registered


def test_budget_error_says_who_holds_what(tier: CpuDeviceTier) -> None:
    tier.lease(4 * PAGE, "bucket 3")
    tier.hold(100, "gradients")
    with pytest.raises(BudgetError) as caught:
        tier.lease(12 * PAGE, "bucket 4")
    error = caught.value
    assert (error.tier, error.owner, error.requested_bytes) == ("device", "bucket 4", 12 * PAGE)
    assert error.free_bytes == 12 * PAGE - 100
    assert "bucket 3 1 x (16.00 KiB in all)" in str(error)
    assert "held by others: 100 bytes" in str(error)
    with pytest.raises(BudgetError, match="gradients needs"):
        tier.hold(12 * PAGE, "gradients")
    with pytest.raises(AssertionError, match="more than is held"):
        tier.unhold(101)


def test_a_device_that_refuses_is_a_budget_error_and_nothing_is_counted(io: IoEngine) -> None:
    tier = CpuDeviceTier(1 << 61, io)
    with pytest.raises(BudgetError, match="the device itself refuses"):
        tier.lease(1 << 60, "everything")
    assert tier.used_bytes == 0
    tier.lease(PAGE, "little").release()


def test_double_release_is_an_assertion(tier: CpuDeviceTier) -> None:
    lease = tier.lease(PAGE, "a")
    lease.release()
    with pytest.raises(AssertionError, match="lease of a released twice"):
        lease.release()
    assert tier.used_bytes == 0


@pytest.mark.parametrize("feature", [True, False], ids=["constructed", "fallback"])
def test_storage_aliases_the_lease(
    tier: CpuDeviceTier, feature: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not feature:
        monkeypatch.setattr(device_module, "_construct_storage", None)
    lease = tier.lease(2 * PAGE, "bucket")
    storage = lease.storage_at(64, 256)
    assert (storage.nbytes(), storage.data_ptr()) == (256, lease.tensor.data_ptr() + 64)
    tensor = torch.empty(0, dtype=torch.float32).set_(storage, 0, (64,))
    tensor.fill_(3.0)
    assert bool((lease.tensor[64:320].view(torch.float32) == 3.0).all())
    with pytest.raises(AssertionError, match="storage beyond the lease"):
        lease.storage_at(PAGE, PAGE + 1)


@pytest.mark.parametrize("direction", ["in", "out"])
def test_copies_move_bytes_and_count_on_their_lane(tier: CpuDeviceTier, direction: str) -> None:
    host = torch.arange(PAGE, dtype=torch.int32).view(torch.uint8)[: 3 * PAGE].clone()
    lease = tier.lease(3 * PAGE, "bucket")
    if direction == "in":
        transfer = tier.start_copy_in(lease.tensor, host)
    else:
        lease.tensor.copy_(host)
        host.zero_()
        transfer = tier.start_copy_out(host, lease.tensor)
    tier.make_current_wait(transfer)
    assert transfer.done()
    transfer.wait()
    assert torch.equal(lease.tensor, host)
    assert int(host.sum()) > 0
    lane = "h2d" if direction == "in" else "d2h"
    assert transfer.lane == lane
    assert tier.lanes()[lane][0] == 3 * PAGE
    assert sum(total for total, _ in tier.lanes().values()) == 3 * PAGE


def test_a_dropped_copy_keeps_its_buffers(io: IoEngine) -> None:
    """P18: nobody waits, nobody keeps the source; the bytes arrive all the same."""
    simulated = SimulatedIo()
    tier = CpuDeviceTier(16 * PAGE, simulated)
    lease = tier.lease(PAGE, "bucket")
    tier.start_copy_in(lease.tensor, torch.full((PAGE,), 5, dtype=torch.uint8))
    gc.collect()
    simulated.clock.advance(10.0)
    assert bool((lease.tensor == 5).all())


def test_empty_copy(tier: CpuDeviceTier) -> None:
    nothing = torch.empty(0, dtype=torch.uint8)
    transfer = tier.start_copy_in(nothing, nothing)
    assert transfer.done()
    transfer.wait()
