"""The update lane counts the state that the configuration keeps; copies and disks move it all."""

from __future__ import annotations

from typing import Any

import pytest

from offload.cli import lanes
from offload.cli.lanes import measure
from offload.config import OffloadConfig
from offload.tiers.cuda import open_device_tier
from offload.tiers.device import DeviceTier

NUMEL = 65_536  # of the smallest update


@pytest.mark.parametrize(
    ("sections", "bytes_per_element"),
    [
        ({"precision": {"compute": "bf16"}}, 2 + 2 + 2 + 8),
        ({"precision": {"compute": "fp32"}}, 4 + 4 + 8),
        ({"precision": {"compute": "fp16"}}, 2 + 2 + 4 + 8),
        ({"training": {"gradient_accumulation_steps": 2}}, 2 + 4 + 2 + 8),
        ({"optimizer": {"moments": "8bit"}}, 2 + 2 + 2 + 2 * (1 + 4 / 64)),
        ({"optimizer": {"name": "sgd"}}, 2 + 2 + 2),
        ({"optimizer": {"name": "sgd", "momentum": 0.9}}, 2 + 2 + 2 + 4),
    ],
)
def test_the_update_moves_gradients_and_state_once(
    sections: dict[str, Any], bytes_per_element: float
) -> None:
    config = OffloadConfig(tiers={"device": {"kind": "cpu"}}, **sections)
    by_name = {lane.lane: lane for lane in measure(config, size_bytes=1 << 20, passes=1)}
    assert by_name["cpu"].nbytes == NUMEL * bytes_per_element
    assert config.optimizer.name in by_name["cpu"].where
    assert by_name["h2d"].nbytes == by_name["d2h"].nbytes == 1 << 20


def test_each_pass_copies_once_in_its_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[DeviceTier] = []

    def open_tier(*arguments: Any) -> DeviceTier:
        opened.append(open_device_tier(*arguments))
        return opened[0]

    monkeypatch.setattr(lanes, "open_device_tier", open_tier)
    config = OffloadConfig(tiers={"device": {"kind": "cpu"}})
    found = {}
    for lane in measure(config, size_bytes=1 << 20, passes=3):
        totals = opened[0].lanes() if opened else {}
        found[lane.lane] = {name: nbytes for name, (nbytes, _) in totals.items()}
    assert found["cpu"] == {"h2d": 0, "d2h": 0}
    assert found["h2d"] == {"h2d": 4 << 20, "d2h": 0}  # one pass is not timed
    assert found["d2h"] == {"h2d": 4 << 20, "d2h": 4 << 20}
