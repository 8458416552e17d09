from __future__ import annotations

import pytest

from offload.schedule.cost import (
    LaneSpeeds,
    bound_of_step,
    bound_seconds,
    compute_flops,
    lane_seconds,
)
from offload.telemetry import LaneReport

SPEEDS = LaneSpeeds(
    h2d=10.0, d2h=20.0, nvme_read=4.0, nvme_write=2.0, nvme_mixed=2.5, cpu=100.0, flops=1.0
)


def test_each_lane_is_bytes_over_speed() -> None:
    assert lane_seconds({"h2d": 20, "d2h": 20, "cpu": 50}, SPEEDS, compute_seconds=3.0) == {
        "h2d": 2.0,
        "d2h": 1.0,
        "nvme_read": 0.0,
        "nvme_write": 0.0,
        "cpu": 0.5,
        "compute": 3.0,
    }


def test_the_busiest_lane_sets_the_bound() -> None:
    assert bound_seconds({"h2d": 20, "nvme_read": 40}, SPEEDS, 3.0) == (10.0, "nvme_read")
    assert bound_seconds({"h2d": 20, "nvme_read": 4}, SPEEDS, 3.0) == (3.0, "compute")


def test_reads_and_writes_share_the_disk() -> None:
    # 30 bytes at 2.5 a second take longer than 20 at 4 (5 s) or 10 at 2 (5 s) alone.
    assert bound_seconds({"nvme_read": 20, "nvme_write": 10}, SPEEDS) == (12.0, "nvme_read")
    assert bound_seconds({"nvme_read": 2, "nvme_write": 18}, SPEEDS) == (9.0, "nvme_write")


def test_compute_and_update_add_up_on_shared_cores() -> None:
    work = {"cpu": 400, "h2d": 45}
    assert bound_seconds(work, SPEEDS, 3.0) == (4.5, "h2d")
    assert bound_seconds(work, SPEEDS, 3.0, shared_cores=True) == (7.0, "cpu")


def test_the_bound_of_what_lanes_did_at_speeds_that_are_known() -> None:
    lanes = {
        "nvme_read": LaneReport(20, 9.0),
        "nvme_write": LaneReport(10, 9.0),
        "cpu": LaneReport(400, 9.0),
        "compute": LaneReport(0, 9.5),
    }
    shown = {"nvme_read": 4.0, "nvme_write": 2.0, "nvme_mixed": 2.5, "cpu": 100.0}
    assert bound_of_step(lanes, shown, shared_cores=False) == (12.0, "nvme_read")
    assert bound_of_step(lanes, shown, shared_cores=True) == (13.5, "compute")
    del shown["nvme_mixed"]
    assert bound_of_step(lanes, shown, shared_cores=False) == (9.5, "compute")
    assert bound_of_step(lanes, {}, shared_cores=False) == (9.5, "compute")
    assert bound_of_step({}, shown, shared_cores=True)[0] == 0.0


@pytest.mark.parametrize(("recompute", "per_weight"), [(False, 6), (True, 8)])
def test_flops_a_token(recompute: bool, per_weight: int) -> None:
    assert compute_flops(tokens=7, trainable_numel=11, recompute=recompute) == per_weight * 77


def test_frozen_weights_need_no_gradient_of_their_own() -> None:
    assert compute_flops(tokens=1, trainable_numel=0, frozen_numel=1) == 4
