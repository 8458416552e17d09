"""Which state leaves the host first, and how much of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from offload.config import load_config
from offload.partition.layout import FieldSpec, ParamSpec
from offload.schedule.demotion import demotion_order, least_demotion, with_homes_on_nvme
from offload.schedule.footprint import STATE_CLASSES, Machine, OverlapRoom
from offload.schedule.placement import Home
from offload.schedule.plan import Plan, extend_plan, plan_buckets

MIB = 1 << 20
ADAM = (FieldSpec("exp_avg", "fp32", 4), FieldSpec("exp_avg_sq", "fp32", 4))
BUCKETS = 16
MACHINE = Machine(device_bytes=MIB, host_bytes=1 << 40, nvme_bytes=1 << 40)
CONFIG = load_config(
    {
        "tiers": {"nvme": {"paths": ["."]}},
        "partition": {"bucket_elements": 256 * 256},
        "placement": {"weights": "host", "gradients": "host", "optimizer": "host"},
    }
)


def spec(*shape: int, trainable: bool = True) -> ParamSpec:
    return ParamSpec("weight", shape, math.prod(shape), "bf16", 2, trainable)


def planned(*, num_frozen: int = 0) -> Plan:
    specs = [spec(256, 256, trainable=number >= num_frozen) for number in range(BUCKETS)]
    return plan_buckets(specs, CONFIG, machine=MACHINE, moments=ADAM)


def classes_of(order: Sequence[Home], plan: Plan) -> list[str]:
    """The classes in the order in which they leave; neighbours that are equal once."""
    names = [
        home.state_class if plan.buckets[home.bucket].trainable else "frozen weights"
        for home in order
    ]
    return [name for index, name in enumerate(names) if index == 0 or names[index - 1] != name]


@pytest.mark.parametrize(
    ("accumulation_steps", "expected"),
    [
        (1, ["frozen weights", "optimizer", "gradients", "weights"]),
        (4, ["optimizer", "frozen weights", "gradients", "weights"]),
    ],
)
def test_what_costs_a_step_least_goes_first(accumulation_steps: int, expected: list[str]) -> None:
    plan = planned(num_frozen=4)
    order = demotion_order(plan, STATE_CLASSES, accumulation_steps=accumulation_steps)
    assert classes_of(order, plan) == expected
    assert len(set(order)) == len(order) == 4 + 3 * (BUCKETS - 4)


def test_named_classes_and_homes_elsewhere_stay() -> None:
    plan = planned()
    moved = with_homes_on_nvme(plan, [Home(3, "optimizer"), Home(5, "weights")])
    order = demotion_order(moved, ["optimizer", "weights"], accumulation_steps=1)
    assert {home.state_class for home in order} == {"optimizer", "weights"}
    assert len(order) == 2 * BUCKETS - 2
    assert not {Home(3, "optimizer"), Home(5, "weights")} & set(order)


def test_what_stays_of_a_class_is_spread_over_the_model() -> None:
    order = demotion_order(planned(), ["optimizer"], accumulation_steps=1)
    for left in (2, 4, 8):
        stay = sorted(home.bucket for home in order[-left:])
        gaps = [after - before for before, after in pairwise(stay)]
        assert set(gaps) == {BUCKETS // left}


def without(plan: Plan, homes: Sequence[Home], machine: Machine) -> Plan:
    specs = [spec(256, 256) for _ in range(BUCKETS)]
    known = with_homes_on_nvme(plan, homes)

    def never(bucket: object) -> dict[str, object]:
        raise AssertionError("no bucket is new")

    lay_out: object = never
    return extend_plan(known, specs, CONFIG, machine=machine, lay_out=lay_out)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.9, 0.6, 0.4])
def test_as_few_homes_as_suffice(share: float) -> None:
    plan = planned()
    machine = replace(MACHINE, host_bytes=int(plan.need_bytes["host"] * share))
    order = demotion_order(plan, STATE_CLASSES, accumulation_steps=1)
    found = least_demotion(order, lambda homes: without(plan, homes, machine))
    assert found is not None
    homes, shrunk = found
    assert shrunk.fits
    assert list(homes) == order[: len(homes)]
    assert 0 < len(homes) < len(order)
    assert not without(plan, homes[:-1], machine).fits
    assert {home for home in order if shrunk.tier(*home) == "nvme"} == set(homes)


def test_too_little_for_staging_is_none() -> None:
    plan = planned()
    order = demotion_order(plan, STATE_CLASSES, accumulation_steps=1)
    machine = replace(MACHINE, host_bytes=4096)
    assert least_demotion(order, lambda homes: without(plan, homes, machine)) is None


def test_a_disk_that_is_too_small_is_told_by_the_plan() -> None:
    plan = planned()
    order = demotion_order(plan, STATE_CLASSES, accumulation_steps=1)
    machine = replace(MACHINE, host_bytes=plan.need_bytes["host"] // 2, nvme_bytes=4096)
    found = least_demotion(order, lambda homes: without(plan, homes, machine))
    assert found is not None
    assert [short.tier for short in found[1].shortfalls] == ["nvme"]


def test_more_leaves_before_the_overlap_goes() -> None:
    """A plan with a flow is wanted as long as there is one."""
    plan = planned()
    order = demotion_order(plan, STATE_CLASSES, accumulation_steps=1)

    def plan_without(homes: Sequence[Home]) -> Plan:
        return replace(plan, overlap=OverlapRoom(flow_bytes=4096 * (len(homes) >= 7)))

    found = least_demotion(order, plan_without)
    assert found is not None
    assert len(found[0]) == 7
