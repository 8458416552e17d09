"""What a step says of itself: bytes of lanes as the plan has them, faults, peaks; no leaks."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload.engine.report import StepMeter
from offload.telemetry import LaneMeter, RetryLog, ShrinkReport, UpdateReport
from tests.oracle import (
    assert_identical,
    continue_engine,
    language_loss,
    make_engine,
    settings,
    small_loss,
    small_model,
    train_engine,
    transformers_model,
    two_buckets_bytes,
)

TIERS = ("device", "host", "nvme")
TRAINING_STEPS = 4


def step(engine: Any) -> None:
    taken = False
    while not taken:
        engine.backward(small_loss(engine, engine.micro_steps))
        taken = engine.step()


def block_bytes(engine: Any, state_class: str) -> int:
    return sum(
        block.layout.nbytes
        for block in engine._parts.store.blocks()
        if block.state_class == state_class
    )


@pytest.mark.usefixtures("by_itself")
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_an_nvme_optimizer_moves_its_state_once_each_way(compute: str, tmp_path: Path) -> None:
    config = settings("host", tmp_path, compute=compute, placement={"optimizer": "nvme"})
    with make_engine(small_model(), config) as engine:
        for number in range(3):
            step(engine)
            expected = block_bytes(engine, "optimizer")
            lanes = engine.report().lanes
            assert lanes["nvme_write"].bytes == expected
            # fp32 moments are zeros that were never written when the first step wants them
            reads = 0 if number == 0 and compute == "fp32" else expected
            assert lanes["nvme_read"].bytes == reads


@pytest.mark.usefixtures("by_itself")
@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradients_on_nvme_move_as_they_are_added_up(accumulation: int, tmp_path: Path) -> None:
    config = settings(
        "host",
        tmp_path,
        placement={"gradients": "nvme"},
        training={"gradient_accumulation_steps": accumulation},
    )
    with make_engine(small_model(), config) as engine:
        for _ in range(2):
            step(engine)
            size = block_bytes(engine, "gradients")
            lanes = engine.report().lanes
            assert lanes["nvme_write"].bytes == accumulation * size
            assert lanes["nvme_read"].bytes == accumulation * size


@pytest.mark.usefixtures("by_itself")
def test_weights_on_nvme_are_read_for_each_pass_and_for_the_update(tmp_path: Path) -> None:
    """At most twice and the update; less, where a bucket is still there when backward wants it."""
    model = small_model()
    smallest = two_buckets_bytes(model, itemsize=4, bucket_elements=1024)
    config = settings(
        "host", tmp_path, placement={"weights": "nvme"}, device=smallest, bucket_elements=1024
    )
    with make_engine(model, config) as engine:
        for _ in range(4):
            step(engine)
        size = block_bytes(engine, "weights")
        lanes = engine.report().lanes
        assert lanes["nvme_write"].bytes == size
        assert 2 * size <= lanes["nvme_read"].bytes <= 3 * size
        assert lanes["h2d"].bytes == 0, "what is read lands in the page"


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_static_model_does_not_fault_from_the_third_step(
    name: str, tier: str, tmp_path: Path
) -> None:
    model = transformers_model(name)
    smallest = two_buckets_bytes(model, itemsize=4, bucket_elements=4096)
    device = (64 << 20) if tier == "device" else 2 * smallest
    with make_engine(model, settings(tier, tmp_path, device=device)) as engine:
        faults = []
        for _ in range(5):
            engine.backward(language_loss(engine, engine.micro_steps))
            engine.step()
            faults.append(engine.report().faults)
        assert faults[2:] == [0, 0, 0]
        assert (faults[0] > 0) == (tier != "device")


@pytest.mark.parametrize("optimizer", ["kernel", "generic"])
@pytest.mark.parametrize("tier", [*TIERS, "auto"])
def test_peaks_stay_within_budgets_and_plan(tier: str, optimizer: str, tmp_path: Path) -> None:
    factories = {}
    if optimizer == "generic":
        factories["optimizer"] = lambda p: torch.optim.RMSprop(p, foreach=False)
    run = train_engine(
        small_model(),
        settings(tier, tmp_path, bucket_elements=1024, device=256 << 10, host=2 << 20),
        small_loss,
        steps=TRAINING_STEPS,
        **factories,
    )
    for name, report in run.report.tiers.items():
        assert report.used_bytes <= report.peak_bytes <= report.budget_bytes, name
        assert report.peak_bytes <= run.plan.peak_bytes[name], name
    assert run.report.tiers["device"].peak_bytes > 0


@pytest.mark.usefixtures("by_itself")
def test_the_report_has_every_number(tmp_path: Path) -> None:
    with make_engine(small_model(), settings("nvme", tmp_path)) as engine:
        assert engine.report().step == 0
        step(engine)
        step(engine)
        report = engine.report()
        assert report.step == 2
        assert 0 < report.bound_seconds <= report.measured_seconds
        assert 0 < report.efficiency <= 1
        assert report.bottleneck in report.lanes
        assert report.critical in report.lanes
        for name in ("nvme_read", "nvme_write", "cpu"):
            assert report.lanes[name].bytes > 0, name
            assert 0 < report.lanes[name].busy_seconds <= report.measured_seconds, name
        assert report.lanes["compute"].busy_seconds > 0
        assert set(report.to_dict()["tiers"]) == {"device", "host", "nvme"}


def test_the_mixed_speed_of_a_disk_is_that_of_both_directions_together() -> None:
    """Each alone moves 10 bytes/s; reads beside writes get 5 together, not 20."""
    lanes: dict[str, tuple[int, float]] = {"nvme_read": (0, 0.0), "nvme_write": (0, 0.0)}
    tier = SimpleNamespace(
        budget_bytes=1, used_bytes=0, peak_bytes=0, step_peak_bytes=0, lanes=dict
    )
    parts: Any = SimpleNamespace(
        meter=LaneMeter(),
        io=SimpleNamespace(lanes=lambda: lanes),
        device=SimpleNamespace(**vars(tier), host_addressable=True),
        host=tier,
        nvme=None,
        plan=SimpleNamespace(budget_bytes={"host": 1}),
        pager=SimpleNamespace(faults=0),
        activations=None,
        sites=SimpleNamespace(report=UpdateReport),
        updates=SimpleNamespace(retries=RetryLog()),
        shrinks=ShrinkReport(),
    )
    meter = StepMeter(parts)
    lanes["nvme_read"] = (10, 1.0)
    meter.end_step()
    lanes["nvme_write"] = (10, 1.0)
    meter.end_step()
    assert (meter.report(2).bound_seconds, meter.report(2).critical) == (1.0, "nvme_write")
    lanes |= {"nvme_read": (20, 5.0), "nvme_write": (20, 5.0)}
    meter.end_step()
    assert meter.report(3).bound_seconds == 4.0


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def num_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("tier", ["host", "nvme"])
def test_memory_does_not_grow(tier: str, tmp_path: Path) -> None:
    """Less than 1 KiB and no object a step. A leak shows in every window, warm-up in the first."""
    model = small_model()
    smallest = two_buckets_bytes(model, itemsize=4, bucket_elements=1024)
    config = settings(tier, tmp_path, bucket_elements=1024, device=smallest)
    grown = []
    with make_engine(model, config) as engine:
        for _ in range(10):
            gc.collect()
            objects, before = len(gc.get_objects()), resident_bytes()
            for _ in range(100):
                step(engine)
            gc.collect()
            grown.append((resident_bytes() - before, len(gc.get_objects()) - objects))
            if grown[-1][0] < 100 << 10 and grown[-1][1] < 50:
                return
    pytest.fail(f"bytes and objects that 100 steps left behind, window by window: {grown}")


@pytest.mark.parametrize("tier", TIERS)
def test_engines_leave_nothing_behind(tier: str, tmp_path: Path) -> None:
    def once() -> None:
        with make_engine(small_model(), settings(tier, tmp_path)) as engine:
            continue_engine(engine, small_loss, steps=2)

    for _ in range(3):
        once()
    gc.collect()
    descriptors, before = num_descriptors(), resident_bytes()
    for _ in range(10):
        once()
    gc.collect()
    assert num_descriptors() == descriptors
    assert resident_bytes() - before < 4 << 20


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_huge_parameters_move_in_quanta_within_the_smallest_budgets(
    compute: str, accumulation: int, tmp_path: Path
) -> None:
    """Four parameters of four chunks each; the device holds two, staging a few chunks."""

    def huge() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(64, 32), *(nn.Linear(512, 512) for _ in range(4)))

    def loss(model: Any, index: int) -> torch.Tensor:
        drawn = torch.Generator().manual_seed(index)
        values = torch.randn(3, 512, generator=drawn).to(torch.bfloat16 if bf16 else torch.float32)
        return model(values).float().square().mean()

    bf16 = compute == "bf16"
    options: dict[str, Any] = {
        "compute": compute,
        "bucket_elements": 4096,
        "training": {"gradient_accumulation_steps": accumulation},
    }
    make = lambda: nn.Sequential(*huge()[1:])  # noqa: E731
    plan = offload.plan(make(), settings("nvme", tmp_path, **options))
    assert max(len(bucket.chunks) for bucket in plan.buckets) == 4
    options |= {tier: plan.need_bytes[tier] for tier in ("device", "host")}
    found = train_engine(make(), settings("nvme", tmp_path, **options), loss, steps=3)
    options |= {"device": 64 << 20}
    assert_identical(found, train_engine(make(), settings("device", **options), loss, steps=3))
