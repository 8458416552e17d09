from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.config import OffloadConfig, load_config
from offload.errors import DoesNotFitError
from offload.partition.layout import MIN_BUCKET_ELEMENTS, FieldSpec, ParamSpec
from offload.schedule.cost import LaneSpeeds
from offload.schedule.footprint import STATE_CLASSES, TIERS, Machine
from offload.schedule.forecast import StepTraffic, Workload, step_traffic
from offload.schedule.plan import (
    Plan,
    extend_plan,
    layout_state,
    plan_buckets,
    resolve_gradient_dtype,
)

MIB = 1 << 20
ADAM = (FieldSpec("exp_avg", "fp32", 4), FieldSpec("exp_avg_sq", "fp32", 4))
ROOMY = Machine(device_bytes=1 << 40, host_bytes=1 << 40, nvme_bytes=1 << 40)


def spec(*shape: int, trainable: bool = True, dtype: str = "bf16") -> ParamSpec:
    itemsize = 4 if dtype == "fp32" else 2
    return ParamSpec("weight", shape, math.prod(shape), dtype, itemsize, trainable)


MODEL = [spec(500, 256), *([spec(256, 256), spec(256), spec(256, 1024), spec(1024)] * 6)]


def plan(
    specs: list[ParamSpec], machine: Machine, workload: Workload | None = None, **sections: object
) -> Plan:
    config = load_config({"tiers": {"nvme": {"paths": ["."]}}, **sections})
    return plan_buckets(specs, config, machine=machine, moments=ADAM, workload=workload)


@settings(max_examples=40)
@given(
    data=st.data(),
    numels=st.lists(st.integers(0, 200_000), min_size=1, max_size=12),
    device=st.integers(0, 8 * MIB),
    host=st.integers(0, 8 * MIB),
    nvme=st.none() | st.integers(0, 16 * MIB),
)
def test_a_plan_fits_exactly_when_every_peak_is_within_its_budget(
    data: st.DataObject, numels: list[int], device: int, host: int, nvme: int | None
) -> None:
    specs = [spec(n, trainable=data.draw(st.booleans())) for n in numels]
    machine = Machine(device, host, nvme, host_addressable=data.draw(st.booleans()))
    planned = plan(specs, machine)
    within = all(planned.peak_bytes[t] <= planned.budget_bytes[t] for t in TIERS)
    assert planned.fits == within == (not planned.shortfalls)
    for tier in TIERS:
        assert planned.peak_bytes[tier] >= planned.need_bytes[tier]
        assert planned.need_bytes[tier] >= sum(planned.bytes[tier].values())
    trainable = sum(s.numel for s in specs if s.trainable)
    total = {c: sum(planned.bytes[t][c] for t in TIERS) for c in STATE_CLASSES}
    padding = 4 * 4096 * sum(len(b.chunks) for b in planned.buckets) + 64 * 12 * len(specs)
    exact = {
        "weights": 2 * sum(s.numel for s in specs),
        "gradients": 2 * trainable,
        "optimizer": (2 + 4 + 4) * trainable,
    }
    for state_class in STATE_CLASSES:
        assert exact[state_class] <= total[state_class] <= exact[state_class] + padding


@settings(max_examples=40)
@given(
    data=st.data(),
    numels=st.lists(st.integers(1, 200_000), min_size=1, max_size=12),
    host=st.integers(0, 8 * MIB),
)
def test_an_extended_plan_keeps_what_is_placed(
    data: st.DataObject, numels: list[int], host: int
) -> None:
    specs = [spec(n, trainable=data.draw(st.booleans())) for n in numels]
    more = [replace(s, trainable=s.trainable or data.draw(st.booleans())) for s in specs]
    machine = Machine(4 * MIB, host, 64 * MIB)
    config = load_config({"tiers": {"nvme": {"paths": ["."]}}})
    known = plan(specs, machine)
    dtype = resolve_gradient_dtype(config)
    extended = extend_plan(
        known,
        more,
        config,
        machine=machine,
        lay_out=lambda bucket: layout_state([bucket], gradient_dtype=dtype, moments=ADAM)[0],
    )
    assert known.placement.tier_of.items() <= extended.placement.tier_of.items()
    for before, after in zip(known.buckets, extended.buckets, strict=True):
        trained = any(more[slot.param].trainable for slot in after.slots)
        assert after == replace(before, trainable=trained)
        assert set(extended.layouts[after.index]) == set(STATE_CLASSES if trained else ["weights"])
    for tier in TIERS:
        assert extended.bytes[tier]["weights"] == known.bytes[tier]["weights"]
    within = all(extended.need_bytes[t] <= extended.budget_bytes[t] for t in TIERS)
    assert extended.fits == within
    assert extended.gradient_bytes == max((s.nbytes for s in more if s.trainable), default=0)


def test_with_room_for_all_everything_is_on_the_device() -> None:
    planned = plan(MODEL, ROOMY)
    assert planned.fits
    assert planned.peak_bytes["host"] == planned.peak_bytes["nvme"] == 0
    assert planned.working_bytes == 0
    assert {planned.tier(b.index, "optimizer") for b in planned.buckets} == {"device"}
    planned.require_fit()


def test_gradients_accumulate_in_fp32_only_when_they_add_up() -> None:
    one = plan(MODEL, ROOMY)
    two = plan(MODEL, ROOMY, training={"gradient_accumulation_steps": 2})
    kept = plan(
        MODEL, ROOMY, training={"gradient_accumulation_steps": 2, "gradient_dtype": "compute"}
    )
    ratio = two.bytes["device"]["gradients"] / one.bytes["device"]["gradients"]
    assert ratio == pytest.approx(2, rel=0.01)
    assert kept.bytes == one.bytes


def test_buckets_get_smaller_until_the_plan_fits() -> None:
    machine = Machine(device_bytes=64 * MIB, host_bytes=12 * MIB, nvme_bytes=1 << 40)
    nvme = dict.fromkeys(STATE_CLASSES, "nvme")
    large = plan(MODEL, machine, placement=nvme, partition={"bucket_elements": 1 << 20})
    small = plan(MODEL, machine, placement=nvme)
    assert not large.fits
    assert small.fits
    assert len(small.buckets) > len(large.buckets)
    tiny = plan(MODEL, replace(machine, host_bytes=4096), placement=nvme)
    assert not tiny.fits
    assert max(c.numel for b in tiny.buckets for c in b.chunks) <= MIN_BUCKET_ELEMENTS


def test_a_plan_that_does_not_fit_says_what_would() -> None:
    machine = Machine(device_bytes=2 * MIB, host_bytes=4 * MIB)
    planned = plan(MODEL, machine)
    with pytest.raises(DoesNotFitError) as caught:
        planned.require_fit()
    assert caught.value.table == str(planned)
    for text in ("host", "budget", "tiers.host.memory of at least", "tiers.nvme.paths with"):
        assert text in caught.value.table
    host = replace(machine, host_bytes=planned.need_bytes["host"])
    plan(MODEL, host).require_fit()


def test_the_table_is_readable() -> None:
    lines = str(plan(MODEL, ROOMY)).splitlines()
    assert lines[0].split() == ["tier", *STATE_CLASSES, "moving", "peak", "least", "budget"]
    assert [line.split()[0] for line in lines[1:4]] == list(TIERS)
    assert "bound by" in lines[-1]


def test_traffic_of_a_bucket_by_home() -> None:
    blocks = [{"weights": (2,), "gradients": (30,), "optimizer": (500,)}]

    def traffic(w: str, g: str, o: str, *, cpu: bool, steps: int = 1) -> StepTraffic:
        tier_of = {(0, "weights"): w, (0, "gradients"): g, (0, "optimizer"): o}
        return step_traffic(blocks, tier_of, host_addressable=cpu, accumulation_steps=steps)

    moved = traffic("device", "device", "device", cpu=True)
    assert not any(moved.passes.values())
    assert {k: v for k, v in moved.update.items() if v} == {"cpu": 500 + 2 + 30}
    moved = traffic("nvme", "nvme", "nvme", cpu=False, steps=3)
    assert moved.passes == {
        "h2d": 3 * 2 * 2,
        "d2h": 3 * 2,
        "nvme_read": 3 * 2 * 2 + 2 * 30,
        "nvme_write": 3 * 30,
    }
    assert moved.update["nvme_read"] == 532
    assert moved.update["nvme_write"] == 502
    moved = traffic("device", "device", "device", cpu=False)
    assert (moved.update["d2h"], moved.update["h2d"]) == (532, 502)


def test_forward_only_training_keeps_weights_only() -> None:
    specs = [*MODEL, replace(MODEL[0], name="frozen", trainable=False)]
    config = OffloadConfig()
    planned = plan_buckets(specs, config, machine=ROOMY, moments=None)
    assert planned.fits
    assert planned.gradient_bytes == 0
    for bucket, layouts in zip(planned.buckets, planned.layouts, strict=True):
        assert list(layouts) == ["weights"]
        # What is on the device is perturbed, so the home of a trained bucket is elsewhere.
        assert planned.tier(bucket.index, "weights") == ("host" if bucket.trainable else "device")
    blocks = [{"weights": (2,)}, {"weights": (30,)}]
    tier_of = {(0, "weights"): "nvme", (1, "weights"): "nvme"}
    moved = step_traffic(
        blocks,
        tier_of,
        host_addressable=True,
        accumulation_steps=1,
        forward_only=frozenset({0}),
    )
    assert (moved.passes["nvme_read"], moved.passes["nvme_write"]) == (2 * 2 + 2 * 30, 2)
    busy = plan_buckets(specs, config, machine=ROOMY, moments=None, workload=Workload(tokens=10**9))
    flops = 2 * 2 * 10**9 * sum(s.numel for s in specs)
    assert busy.step_seconds == pytest.approx(flops / LaneSpeeds().flops, rel=0.01)


def test_slower_homes_cost_time_and_name_the_lane() -> None:
    fast = plan(MODEL, ROOMY)
    slow = plan(MODEL, ROOMY, placement={"optimizer": "nvme"})
    assert slow.step_seconds > fast.step_seconds
    assert slow.bottleneck.startswith("nvme")
    busy = plan(MODEL, ROOMY, Workload(tokens=10**9))
    assert busy.bottleneck == "compute"
    flops = 6 * 10**9 * sum(s.numel for s in MODEL)
    assert busy.step_seconds == pytest.approx(flops / LaneSpeeds().flops, rel=0.01)


def test_config_defaults_make_a_plan() -> None:
    planned = plan_buckets(MODEL, OffloadConfig(), machine=ROOMY, moments=())
    assert planned.fits


def test_planning_imports_no_torch() -> None:
    code = "import offload.schedule, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
