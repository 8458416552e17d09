"""Forecasts against closed forms: phases, shared cores, what stays on the device, the disk."""

from __future__ import annotations

import pytest

from offload.partition.layout import Bucket, ParamSpec, pack
from offload.schedule.cost import LaneSpeeds
from offload.schedule.forecast import Forecast, StepKind, Workload, forecast_step, step_traffic

SPEEDS = LaneSpeeds(
    h2d=100.0, d2h=50.0, nvme_read=10.0, nvme_write=5.0, nvme_mixed=8.0, cpu=20.0, flops=1000.0
)
BLOCKS = [{"weights": (20,), "gradients": (20,), "optimizer": (60,)}]
HOMES = {"weights": "host", "gradients": "host", "optimizer": "nvme"}


def buckets(numel: int = 10, *, trainable: bool = True) -> tuple[Bucket, ...]:
    return pack([ParamSpec("w", (numel,), numel, "bf16", 2, trainable)], bucket_elements=65_536)


def forecast(kind: StepKind, workload: Workload | None = None, **homes: str) -> Forecast:
    tier_of = {(0, name): tier for name, tier in (HOMES | homes).items()}
    return forecast_step(
        buckets(), BLOCKS, tier_of, kind, speeds=SPEEDS, workload=workload or Workload()
    )


def test_passes_and_update_come_one_after_the_other() -> None:
    found = forecast(StepKind(host_addressable=False), Workload(100, compute_seconds=0.3))
    # Passes: 40 in at 100, 20 out at 50, compute 0.3 s. Update: 120 through the disk at 8 a second.
    assert found.step_seconds == pytest.approx(0.4 + 15)
    assert found.update_seconds == pytest.approx(15)
    assert found.bottleneck == "nvme_write"
    assert found.lane_bytes == {
        "h2d": 40, "d2h": 20, "nvme_read": 60, "nvme_write": 60, "cpu": 100
    }  # fmt: skip
    assert found.lane_seconds["d2h"] == pytest.approx(0.4)
    assert found.lane_seconds["compute"] == 0.3


def test_an_overlapped_step_is_one_phase() -> None:
    kind = StepKind(host_addressable=False, is_overlapped=True)
    assert forecast(kind, Workload(1, compute_seconds=0.3)).step_seconds == pytest.approx(15)
    longer = forecast(kind, Workload(1, compute_seconds=16.0))
    assert (longer.step_seconds, longer.bottleneck) == (16.0, "compute")
    assert longer.update_seconds == 0


def test_compute_and_update_share_the_cores() -> None:
    kind = StepKind(host_addressable=True, is_overlapped=True)
    found = forecast(kind, Workload(1, compute_seconds=13.0))
    assert found.step_seconds == pytest.approx(13.0 + 100 / 20)
    apart = forecast(
        StepKind(host_addressable=False, is_overlapped=True), Workload(1, compute_seconds=13.0)
    )
    assert apart.step_seconds == pytest.approx(15)


def test_tokens_that_hide_the_lanes_beside_compute() -> None:
    kind = StepKind(host_addressable=False, is_overlapped=True)
    found = forecast(kind, Workload(10, compute_seconds=0.3))
    assert found.hiding_tokens == 500  # 0.03 s a token, 15 s of disk
    hidden = forecast(kind, Workload(found.hiding_tokens, compute_seconds=15.0))
    assert hidden.step_seconds == pytest.approx(15.0)
    on_cores = forecast(
        StepKind(host_addressable=True, is_overlapped=True), Workload(10, compute_seconds=0.3)
    )
    assert on_cores.hiding_tokens == 334  # 5 s of the 15 s the cores update
    assert forecast(kind).hiding_tokens is None


def test_without_a_measurement_compute_is_by_flops() -> None:
    found = forecast(StepKind(host_addressable=False), Workload(tokens=50))
    assert found.lane_seconds["compute"] == pytest.approx(6 * 10 * 50 / 1000)


@pytest.mark.parametrize(
    ("resident", "steps", "fetched"),
    [(0, 1, 40), (20, 1, 20), (10, 1, 30), (99, 1, 20), (20, 2, 20)],
)
def test_what_is_on_the_device_when_a_pass_ends_stays(
    resident: int, steps: int, fetched: int
) -> None:
    kind = StepKind(host_addressable=True, accumulation_steps=steps, resident_bytes=resident)
    assert forecast(kind).lane_bytes["h2d"] == fetched


def test_weights_on_nvme_are_read_into_a_page_that_the_cores_reach() -> None:
    reached = forecast(StepKind(host_addressable=True), weights="nvme")
    assert (reached.lane_bytes["h2d"], reached.lane_bytes["nvme_read"]) == (0, 40 + 20 + 60)
    away = forecast(StepKind(host_addressable=False), weights="nvme")
    assert (away.lane_bytes["h2d"], away.lane_bytes["nvme_read"]) == (40, 40 + 20 + 60)
    # The overlapped update finds them in their page.
    kind = StepKind(host_addressable=True, is_overlapped=True)
    assert forecast(kind, weights="nvme").lane_bytes["nvme_read"] == 40 + 60


def test_terabytes_a_day() -> None:
    found = Forecast(0.5, "nvme_write", {"nvme_write": 10**9})
    assert found.terabytes_a_day == pytest.approx(2 * 86_400 / 1000)
    assert Forecast(0.0, "h2d", {"nvme_write": 0}).terabytes_a_day == 0.0


def test_kept_fetches_are_counted_once() -> None:
    tier_of = {(0, name): tier for name, tier in HOMES.items()}
    for share, moved in ((0.0, 80), (0.5, 40), (0.75, 20)):
        traffic = step_traffic(
            BLOCKS, tier_of, host_addressable=True, accumulation_steps=2, kept_share=share
        )
        assert traffic.passes["h2d"] == moved
