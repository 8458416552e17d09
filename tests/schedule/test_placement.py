from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import DoesNotFitError
from offload.schedule.footprint import STATE_CLASSES, TIERS, Machine, Staging, footprint
from offload.schedule.placement import PlacementChoice, assign, place, spread_order

PAGE = 4096
Blocks = list[dict[str, tuple[int, ...]]]


def bucket(weights: int, gradients: int = 0, optimizer: int = 0) -> dict[str, tuple[int, ...]]:
    """One chunk; sizes in pages."""
    sizes = {"weights": (weights * PAGE,)}
    if gradients:
        sizes |= {"gradients": (gradients * PAGE,), "optimizer": (optimizer * PAGE,)}
    return sizes


@st.composite
def models(draw: st.DrawFn) -> Blocks:
    blocks: Blocks = []
    for _ in range(draw(st.integers(0, 12))):
        chunks = draw(st.integers(1, 3))
        sizes = st.tuples(*[st.integers(1, 6).map(lambda n: n * PAGE)] * chunks)
        classes = {"weights": draw(sizes)}
        if draw(st.booleans()):
            classes["gradients"] = draw(sizes)
            classes["optimizer"] = draw(sizes | st.just((0,) * chunks))
        blocks.append(classes)
    return blocks


pages = st.integers(0, 250).map(lambda n: n * PAGE)
tier_names = st.sampled_from(["auto", *TIERS])
machines = st.builds(
    Machine,
    device_bytes=pages,
    host_bytes=pages,
    nvme_bytes=st.none() | pages,
    host_addressable=st.booleans(),
    pinned_versions=st.integers(0, 2),
    staging=st.builds(
        Staging,
        weights=st.integers(1, 4),
        update=st.integers(1, 3),
        gradients=st.integers(1, 4),
        landing=st.integers(1, 2),
        spare_extents=st.integers(1, 4),
    ),
)
choices = st.builds(PlacementChoice, tier_names, tier_names, tier_names)


@given(blocks=models(), machine=machines, choice=choices, gradient=pages)
def test_everything_has_one_home_and_budgets_hold(
    blocks: Blocks, machine: Machine, choice: PlacementChoice, gradient: int
) -> None:
    placement = assign(blocks, machine, choice, gradient_bytes=gradient)
    wanted = {(b, name) for b, classes in enumerate(blocks) for name in classes}
    assert set(placement.tier_of) == wanted
    taken = placement.footprint
    for name in STATE_CLASSES:
        total = sum(sum(classes.get(name, ())) for classes in blocks)
        assert sum(taken.homes[tier][name] for tier in TIERS) == total, "conservation"
        asked = getattr(choice, name)
        if asked != "auto":
            assert taken.homes[asked][name] == total
    short = {shortfall.tier for shortfall in placement.shortfalls}
    for tier in TIERS:
        assert (taken.need_bytes(tier) > machine.budget_bytes(tier)) == (tier in short)
        assert taken.need_bytes(tier) >= sum(taken.homes[tier].values())
    if "device" not in short:
        working = taken.working_bytes(machine.device_bytes)
        assert taken.min_working_bytes <= working <= taken.paged_bytes
        held = taken.home_bytes("device") + working + taken.gradient_bytes
        assert held <= machine.device_bytes


@given(data=st.data(), blocks=models(), machine=machines, choice=choices, gradient=pages)
def test_settled_homes_stay_and_the_rest_finds_its_place_within_the_budgets(
    data: st.DataObject, blocks: Blocks, machine: Machine, choice: PlacementChoice, gradient: int
) -> None:
    wanted = [(b, name) for b, classes in enumerate(blocks) for name in classes]
    settled = {
        home: data.draw(st.sampled_from(TIERS)) for home in wanted if data.draw(st.booleans())
    }
    placement = assign(blocks, machine, choice, gradient_bytes=gradient, settled=settled)
    assert set(placement.tier_of) == set(wanted)
    assert settled.items() <= placement.tier_of.items()
    for home in wanted:
        asked = getattr(choice, home[1])
        assert home in settled or asked in ("auto", placement.tier_of[home])
    short = {shortfall.tier for shortfall in placement.shortfalls}
    for tier in TIERS:
        need = placement.footprint.need_bytes(tier)
        assert (need > machine.budget_bytes(tier)) == (tier in short)
    again = assign(blocks, machine, choice, gradient_bytes=gradient, settled=placement.tier_of)
    assert (again.tier_of, again.footprint) == (placement.tier_of, placement.footprint)


@given(blocks=models(), machine=machines, choice=choices, gradient=pages)
def test_what_the_table_asks_for_is_enough(
    blocks: Blocks, machine: Machine, choice: PlacementChoice, gradient: int
) -> None:
    placement = assign(blocks, machine, choice, gradient_bytes=gradient)
    for short in placement.shortfalls:
        machine = replace(machine, **{f"{short.tier}_bytes": short.need_bytes})
        assert f"{short.need_bytes} bytes" in short.remedy
    place(blocks, machine, choice, gradient_bytes=gradient)


@given(blocks=models(), machine=machines, choice=choices)
def test_staging_and_spares_are_what_the_flows_hold(
    blocks: Blocks, machine: Machine, choice: PlacementChoice
) -> None:
    """The same numbers, counted chunk by chunk."""
    placement = assign(blocks, machine, choice, gradient_bytes=0)
    ring, open_gradients, landing, update = [0], [0], [0], [0]
    extents: dict[int, int] = {}
    for number, classes in enumerate(blocks):
        at = {name: placement.tier(number, name) for name in classes}
        for chunk in range(len(classes["weights"])):
            size = {name: sizes[chunk] for name, sizes in classes.items()}
            if at["weights"] == "nvme":
                ring.append(size["weights"])
            far = {"nvme"} if machine.host_addressable else {"nvme", "device"}
            if at.get("gradients") in far:
                open_gradients.append(size["gradients"])
            if "gradients" in at and not machine.host_addressable:
                landing.append(size["weights"])
            if "optimizer" in classes:
                update.append(sum(size[name] for name in classes if at[name] in far))
            for name in classes:
                if at[name] == "nvme":
                    extents[size[name]] = extents.get(size[name], 0) + 1
    flows = machine.staging
    passes = (
        max(ring) * flows.weights
        + max(open_gradients) * flows.gradients
        + max(landing) * flows.landing
    )
    taken = placement.footprint
    assert taken.staging_bytes == max(passes, max(update) * flows.update)
    spare = {size: min(n, flows.spare_extents) for size, n in extents.items()}
    pinned_bytes = sum(
        sum(classes[name])
        for bucket, classes in enumerate(blocks)
        for name in ("weights", "optimizer")
        if "optimizer" in classes and placement.tier_of[bucket, name] == "nvme"
    )
    assert taken.spare_bytes == (
        sum(size * n for size, n in spare.items()) + machine.pinned_versions * pinned_bytes
    )


def test_what_fits_stays_on_the_device() -> None:
    blocks = [bucket(2, 2, 4)] * 3
    machine = Machine(device_bytes=(24 + 1) * PAGE, host_bytes=0)
    placement = place(blocks, machine, PlacementChoice(), gradient_bytes=PAGE)
    assert set(placement.tier_of.values()) == {"device"}
    assert placement.footprint.working_bytes(machine.device_bytes) == 0


def test_the_device_keeps_its_working_set_and_spreads_its_homes() -> None:
    blocks = [bucket(1)] * 16
    machine = Machine(device_bytes=8 * PAGE, host_bytes=100 * PAGE)
    placement = place(blocks, machine, PlacementChoice(), gradient_bytes=0)
    homes = [b for b in range(16) if placement.tier(b, "weights") == "device"]
    assert homes == [0, 4, 8, 12]
    assert placement.footprint.working_bytes(machine.device_bytes) == 4 * PAGE


def test_one_bucket_in_use_and_one_arriving_is_the_least() -> None:
    blocks = [bucket(2), bucket(3), bucket(1)]
    machine = Machine(device_bytes=5 * PAGE + 1, host_bytes=6 * PAGE)
    on_host = PlacementChoice(weights="host")
    with pytest.raises(DoesNotFitError, match=f"at least {5 * PAGE + 2} bytes"):
        place(blocks, machine, on_host, gradient_bytes=2)
    placement = place(blocks, machine, on_host, gradient_bytes=1)
    assert placement.footprint.working_bytes(machine.device_bytes) == 5 * PAGE


def test_the_host_takes_what_fits_beside_staging_and_the_disk_the_rest() -> None:
    blocks = [bucket(1, 1, 4)] * 10
    machine = Machine(device_bytes=2 * PAGE, host_bytes=38 * PAGE, nvme_bytes=100 * PAGE)
    placement = place(
        blocks, machine, PlacementChoice(weights="host", gradients="host"), gradient_bytes=0
    )
    taken = placement.footprint
    assert taken.staging_bytes == 3 * 4 * PAGE
    assert taken.homes["host"] == {
        "weights": 10 * PAGE,
        "gradients": 10 * PAGE,
        "optimizer": 4 * PAGE,
    }
    assert taken.homes["nvme"]["optimizer"] == 36 * PAGE
    assert taken.need_bytes("nvme") == (36 + 4 * 4) * PAGE


def test_an_accelerator_gets_optimizer_state_only_after_the_host() -> None:
    blocks = [bucket(1, 1, 4)] * 10
    roomy = Machine(device_bytes=100 * PAGE, host_bytes=100 * PAGE, host_addressable=False)
    placement = place(blocks, roomy, PlacementChoice(), gradient_bytes=0)
    assert {placement.tier(b, "optimizer") for b in range(10)} == {"host"}
    assert {placement.tier(b, "weights") for b in range(10)} == {"device"}
    tight = replace(roomy, host_bytes=30 * PAGE)
    placement = place(blocks, tight, PlacementChoice(), gradient_bytes=0)
    assert placement.footprint.staging_bytes == 3 * 6 * PAGE
    tiers = [placement.tier(b, "optimizer") for b in range(10)]
    assert (tiers.count("host"), tiers.count("device")) == (3, 7)


def test_the_table_names_tiers_keys_and_bytes() -> None:
    blocks = [bucket(1, 1, 4)] * 4
    machine = Machine(device_bytes=PAGE, host_bytes=21 * PAGE)
    with pytest.raises(DoesNotFitError) as caught:
        place(blocks, machine, PlacementChoice(weights="device"), gradient_bytes=PAGE)
    table = caught.value.table
    assert f"tiers.device.memory of at least {5 * PAGE} bytes" in table
    assert "placement.weights to auto" in table
    assert "host " not in table, "the host has room"
    with pytest.raises(DoesNotFitError) as caught:
        place(blocks, replace(machine, device_bytes=3 * PAGE), PlacementChoice(), gradient_bytes=0)
    table = caught.value.table
    assert f"tiers.host.memory of at least {24 * PAGE} bytes" in table
    assert "tiers.nvme.paths with" in table


def test_a_disk_that_is_not_there_is_a_shortfall() -> None:
    machine = Machine(device_bytes=100 * PAGE, host_bytes=100 * PAGE)
    with pytest.raises(DoesNotFitError, match=r"tiers\.nvme\.paths with") as caught:
        place([bucket(1, 1, 4)], machine, PlacementChoice(optimizer="nvme"), gradient_bytes=0)
    assert "placement.optimizer to auto" in caught.value.table


def test_checkpoints_that_pin_take_the_updated_state_once_more() -> None:
    blocks = [bucket(1, 1, 4)] * 9
    tier_of = {(b, name): "nvme" for b in range(9) for name in STATE_CLASSES}
    machine = Machine(device_bytes=0, host_bytes=0, nvme_bytes=0)
    without = footprint(blocks, tier_of, machine, gradient_bytes=0)
    assert without.need_bytes("nvme") == (54 + 4 * 4 + 4 * 1) * PAGE
    pinned = footprint(blocks, tier_of, replace(machine, pinned_versions=2), gradient_bytes=0)
    assert pinned.need_bytes("nvme") == without.need_bytes("nvme") + 2 * 9 * (1 + 4) * PAGE


@given(count=st.integers(1, 300), part=st.integers(1, 300))
def test_spread_order_is_even_in_every_first_part(count: int, part: int) -> None:
    order = spread_order(count)
    assert sorted(order) == list(range(count))
    chosen = sorted(order[:part])
    gaps = [b - a for a, b in zip(chosen, [*chosen[1:], count], strict=True)]
    assert max(gaps) <= max(1, 4 * count // len(chosen))


def test_gradients_at_home_on_an_accelerator_are_staged_on_their_way_back() -> None:
    tier_of = {(0, "weights"): "nvme", (0, "gradients"): "device", (0, "optimizer"): "nvme"}
    staging = Staging(weights=4, update=1, gradients=3, landing=2)
    machine = Machine(device_bytes=0, host_bytes=0, nvme_bytes=0, staging=staging)
    beside_the_cpu = footprint([bucket(1, 2, 4)], tier_of, machine, gradient_bytes=0)
    assert beside_the_cpu.passes_staging_bytes == 4 * PAGE
    accelerator = replace(machine, host_addressable=False)
    beside_a_gpu = footprint([bucket(1, 2, 4)], tier_of, accelerator, gradient_bytes=0)
    assert beside_a_gpu.passes_staging_bytes == (4 + 3 * 2 + 2 * 1) * PAGE
