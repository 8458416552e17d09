"""The memory of an accelerator: what is cut from the slab, and what lies beside it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import BudgetError
from offload.tiers.device import DeviceLease
from offload.tiers.simulated import LaneModel, SimulatedIo
from offload.tiers.simulated_streams import SimulatedAccelerator

PAGE = 4096


def open_tier(pages: int, slab_pages: int) -> SimulatedAccelerator:
    tier = SimulatedAccelerator(pages * PAGE, SimulatedIo(lanes={"h2d": LaneModel()}))
    tier.reserve(slab_pages * PAGE)
    return tier


def address_of(lease: DeviceLease) -> int:
    return lease.tensor.data_ptr()


def is_in_slab(tier: SimulatedAccelerator, lease: DeviceLease) -> bool:
    assert tier._slab is not None
    return 0 <= address_of(lease) - tier._slab.data_ptr() < tier._slab.numel()


def test_pages_come_from_the_slab_and_homes_do_not() -> None:
    tier = open_tier(8, 4)
    page = tier.try_lease(PAGE, "page")
    home = tier.lease(PAGE, "home")
    assert page is not None
    assert is_in_slab(tier, page)
    assert not is_in_slab(tier, home)
    assert tier.used_bytes == 2 * PAGE
    page.release()
    again = tier.try_lease(PAGE - 1, "page")
    assert again is not None
    assert address_of(again) == address_of(page)


def test_a_steady_state_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of several sizes come and go in a fixed order, as in a step."""
    tier = open_tier(16, 12)
    sizes = [3, 1, 4, 2, 3, 1, 2, 4] * 20
    held: list[DeviceLease] = []

    def refuse(nbytes: int) -> torch.Tensor:
        raise AssertionError(f"{nbytes} bytes allocated")

    monkeypatch.setattr(tier, "_allocate", refuse)
    for size in sizes:
        while (lease := tier.try_lease(size * PAGE, "page")) is None:
            held.pop(0).release()
        held.append(lease)


def test_what_must_be_and_fits_no_range_lies_beside_the_slab() -> None:
    tier = open_tier(8, 4)
    leases = [tier.lease(4 * PAGE, "homes"), *(tier.try_lease(PAGE, "page") for _ in range(4))]
    for lease in (leases[1], leases[3]):
        assert lease is not None
        lease.release()
    assert not tier.has_room(2 * PAGE)
    assert tier.try_lease(2 * PAGE, "page") is None
    beside = tier.try_lease(2 * PAGE, "page", beside=True)
    assert beside is not None
    assert not is_in_slab(tier, beside)
    with pytest.raises(BudgetError):
        tier.lease(PAGE, "more")
    beside.release()
    assert tier.has_room(PAGE)


def test_the_slab_changes_only_while_nobody_uses_it() -> None:
    tier = open_tier(8, 4)
    page = tier.try_lease(PAGE, "page")
    assert page is not None
    slab = tier._slab
    tier.reserve(2 * PAGE)
    assert tier._slab is slab
    page.release()
    tier.reserve(2 * PAGE)
    assert tier._slab is not None
    assert tier._slab.numel() == 2 * PAGE
    tier.reserve(0)
    assert tier._slab is None


def test_a_device_without_memory_for_the_slab_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = open_tier(8, 0)

    def refuse(nbytes: int) -> torch.Tensor:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(tier, "_allocate", refuse)
    with pytest.raises(BudgetError, match=r"out of memory.*tiers\.device\.memory"):
        tier.reserve(4 * PAGE)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["page", "beside", "back"]), st.integers(1, 3 * PAGE)),
        max_size=60,
    )
)
def test_leases_never_overlap_and_the_count_is_right(steps: list[tuple[str, int]]) -> None:
    tier = open_tier(12, 8)
    held: list[DeviceLease] = []
    for action, number in steps:
        if action == "back":
            if held:
                held.pop(number % len(held)).release()
            continue
        lease = tier.try_lease(number, "test", beside=action == "beside")
        if lease is not None:
            held.append(lease)
        places = sorted((address_of(each), address_of(each) + each.nbytes) for each in held)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
        assert tier.used_bytes == sum(-(-each.nbytes // PAGE) * PAGE for each in held)
        assert tier.used_bytes <= tier.budget_bytes
