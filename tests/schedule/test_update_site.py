"""The choice of what the device updates, in the model of lanes that work at the same time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.partition.layout import FieldSpec, ParamSpec, pack
from offload.schedule.plan import layout_state
from offload.schedule.update_site import (
    NUM_SLOTS,
    SiteSpeeds,
    UpdateBytes,
    choose_on_device,
    device_order,
    first_on_device,
    lane_seconds,
    update_bytes,
    update_scratch,
)

# AdamW in bf16: weight, gradient, remainder and two moments of a million parameters.
ADAMW = UpdateBytes(0, 14_000_000, 14_000_000, 12_000_000, 0, 0)
MOMENTS = (FieldSpec("exp_avg", "fp32", 4), FieldSpec("exp_avg_sq", "fp32", 4))
TIERS = ("device", "host", "nvme")


def alike(count: int, each: UpdateBytes = ADAMW) -> list[UpdateBytes]:
    return [
        UpdateBytes(
            i, each.state, each.host_read, each.host_written, each.device_read, each.device_written
        )
        for i in range(count)
    ]


def busiest(buckets: list[UpdateBytes], on_device: frozenset[int], speeds: SiteSpeeds) -> float:
    return max(lane_seconds(buckets, on_device, speeds).values())


speeds_drawn = st.builds(
    SiteSpeeds, *[st.floats(1e8, 1e12, allow_nan=False, allow_infinity=False) for _ in range(4)]
)


@st.composite
def buckets_drawn(draw: st.DrawFn) -> list[UpdateBytes]:
    blocks, tier_of = [], {}
    sizes = draw(st.lists(st.integers(1, 64).map(lambda pages: 4096 * pages), max_size=9))
    specs = [ParamSpec(f"p{i}", (n,), n, "bf16", 2, True) for i, n in enumerate(sizes)]
    for bucket, numel in enumerate(sizes):
        if draw(st.booleans()) and draw(st.booleans()):
            blocks.append({"weights": (4096,)})  # frozen
            continue
        blocks.append(
            {"weights": (2 * numel,), "gradients": (2 * numel,), "optimizer": (10 * numel,)}
        )
        for name in blocks[-1]:
            tier_of[bucket, name] = draw(st.sampled_from(TIERS))
    return update_bytes(pack(specs, bucket_elements=1), blocks, tier_of)


@given(buckets=buckets_drawn(), speeds=speeds_drawn)
def test_the_choice_is_no_worse_than_one_site_for_all(
    buckets: list[UpdateBytes], speeds: SiteSpeeds
) -> None:
    chosen = choose_on_device(buckets, speeds)
    every = frozenset(each.bucket for each in buckets)
    assert chosen <= every
    found = busiest(buckets, chosen, speeds)
    for other in (frozenset(), every):
        assert found <= busiest(buckets, other, speeds) * (1 + 1e-9)


@given(count=st.integers(1, 7), speeds=speeds_drawn, homed=st.booleans())
def test_of_buckets_of_one_kind_it_is_the_best_choice_of_all(
    count: int, speeds: SiteSpeeds, homed: bool
) -> None:
    at_home = UpdateBytes(0, 14_000_000, 2_000_000, 0, 12_000_000, 12_000_000)
    buckets = alike(count, at_home if homed else ADAMW)
    found = busiest(buckets, choose_on_device(buckets, speeds), speeds)
    best = min(
        busiest(buckets, frozenset(chosen), speeds)
        for size in range(count + 1)
        for chosen in itertools.combinations(range(count), size)
    )
    assert found <= best * (1 + 1e-9)


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        (1e6, 16),  # no CPU to speak of
        (300e9, 4),  # both: at a quarter, the CPU's share takes about what the link takes
        (1e15, 0),  # nothing is faster than the CPU
    ],
)
def test_a_slow_cpu_gets_the_help_of_the_device(cpu: float, expected: int) -> None:
    speeds = SiteSpeeds(h2d=100e9, d2h=100e9, cpu=cpu, device=1e12)
    chosen = choose_on_device(alike(16), speeds)
    assert len(chosen) == expected


def test_state_at_home_on_the_device_stays_there() -> None:
    buckets = [ADAMW, UpdateBytes(1, 14_000_000, 0, 0, 14_000_000, 12_000_000)]
    assert device_order(buckets) == [1, 0]
    # The CPU is as fast as the device, but what is at home there would have to travel.
    speeds = SiteSpeeds(h2d=10e9, d2h=10e9, cpu=1e12, device=1e12)
    assert choose_on_device(buckets, speeds) == {1}


def test_many_small_parameters_come_to_the_device_last() -> None:
    small = UpdateBytes(1, 14_000_000, 14_000_000, 12_000_000, 0, 0, pieces=100)
    buckets = [ADAMW, small, UpdateBytes(2, 14_000_000, 14_000_000, 12_000_000, 0, 0)]
    assert device_order(buckets) == [0, 2, 1]


def test_pieces_are_those_of_the_segments() -> None:
    specs = [ParamSpec(f"p{i}", (n,), n, "fp32", 4, True) for i, n in enumerate((3 << 20, 8, 8))]
    buckets = pack(specs, bucket_elements=1 << 21)
    blocks = [{"weights": (4096,), "gradients": (4096,)} for _ in buckets]
    tiers = {(b, name): "host" for b in range(len(buckets)) for name in ("weights", "gradients")}
    found = update_bytes(buckets, blocks, tiers)
    assert [each.pieces for each in found] == [3, 2]
    assert [each.is_small_cut for each in found] == [True, True]
    assert [each.is_small_cut for each in alike(1)] == [False]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_share_is_spread_over_the_model(share: float) -> None:
    chosen = first_on_device(alike(16), share)
    assert len(chosen) == 16 * share
    for quarter in range(4):
        assert len([b for b in chosen if b // 4 == quarter]) == 4 * share


@given(
    sizes=st.lists(st.integers(1, 400_000), min_size=1, max_size=6),
    elements=st.sampled_from([65_536, 131_072, 1 << 20]),
    dtype=st.sampled_from([("fp32", 4), ("bf16", 2), ("fp16", 2)]),
)
def test_the_scratch_has_room_for_every_chunk(
    sizes: list[int], elements: int, dtype: tuple[str, int]
) -> None:
    specs = [ParamSpec(f"p{i}", (n,), n, *dtype, True) for i, n in enumerate(sizes)]
    buckets = pack(specs, bucket_elements=elements)
    layouts = layout_state(buckets, gradient_dtype="fp32", moments=MOMENTS)
    blocks = [{name: each.chunk_nbytes for name, each in classes.items()} for classes in layouts]
    scratch = update_scratch(buckets, blocks, lambda numel: 16 * numel + 4)
    for bucket in buckets:
        assert scratch.covers(update_scratch([bucket], blocks, lambda numel: 16 * numel + 4))
        for chunk in bucket.chunks:
            assert scratch.piece_numel <= 1 << 20
            assert (
                sum(sizes[chunk.index] for sizes in blocks[bucket.index].values()) <= scratch.slot
            )
    assert scratch.total >= NUM_SLOTS * scratch.slot + 16 * scratch.piece_numel
    assert scratch.total % 4096 == 0


def test_a_model_without_trainable_parameters_takes_nothing() -> None:
    buckets = pack([ParamSpec("p", (8,), 8, "fp32", 4, False)], bucket_elements=65_536)
    assert update_scratch(buckets, [{"weights": (4096,)}], lambda numel: 16 * numel).total == 0
    assert choose_on_device([], SiteSpeeds(1.0, 1.0, 1.0, 1.0)) == frozenset()
