"""What the host holds of the state is not moved to and from NVMe, and no more than the rest is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.oracle import make_engine

WIDTH, LAYERS, STEPS = 64, 16, 4
STATE_CLASSES = ("weights", "optimizer")


def layers() -> nn.Module:
    """Equal layers, each a bucket of its own."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def config_of(path: Path, host_bytes: int, *, weights: str, optimizer: str) -> dict[str, object]:
    return {
        "tiers": {
            "device": {"kind": "cpu", "memory": 4 * WIDTH * WIDTH * 2 + (1 << 14)},
            "host": {"memory": host_bytes},
            "nvme": {"paths": [str(path)]},
        },
        "placement": {"weights": weights, "gradients": "host", "optimizer": optimizer},
        "partition": {"bucket_elements": WIDTH * WIDTH},
        "precision": {"compute": "bf16"},
    }


def moved_and_held(
    path: Path, host_bytes: int, *, weights: str, optimizer: str
) -> tuple[int, dict[str, float]]:
    """NVMe bytes of some steps, and the share of each state class that the host holds."""
    config = config_of(path, host_bytes, weights=weights, optimizer=optimizer)
    with make_engine(layers(), config) as engine:
        lanes = engine._parts.io.lanes
        before = lanes()
        for index in range(STEPS):
            drawn = torch.Generator().manual_seed(index)
            out = engine(torch.randn(4, WIDTH, generator=drawn).bfloat16())
            engine.backward(out.float().square().mean())
            taken = engine.step()
            assert taken
        engine.parameter_steps()  # what is pending is made
        moved = sum(lanes()[lane][0] - before[lane][0] for lane in ("nvme_read", "nvme_write"))
        held = {
            state_class: engine.plan.bytes["host"][state_class]
            / sum(engine.plan.bytes[tier][state_class] for tier in ("device", "host", "nvme"))
            for state_class in STATE_CLASSES
        }
        assert engine.plan.bytes["device"]["optimizer"] == 0
        return moved, held


@pytest.mark.usefixtures("by_itself")
def test_nvme_bytes_of_optimizer_state_fall_by_the_share_that_the_host_holds(
    tmp_path: Path,
) -> None:
    whole, none = moved_and_held(tmp_path, 2 << 20, weights="host", optimizer="nvme")
    assert none["optimizer"] == 0
    shares = []
    for host_bytes in (700_000, 800_000, 900_000, 1 << 20):
        moved, held = moved_and_held(tmp_path, host_bytes, weights="host", optimizer="auto")
        shares.append(held["optimizer"])
        assert moved == round(whole * (1 - held["optimizer"]))
    assert shares == sorted(shares)
    assert len(set(shares)) == len(shares), "every budget holds more than the one before"
    assert shares[-1] == 1


@pytest.mark.usefixtures("by_itself")
def test_nvme_bytes_of_weights_fall_by_the_share_that_the_host_holds(tmp_path: Path) -> None:
    """Weights are read for each pass, but for those that stay on the device between the two."""
    whole, none = moved_and_held(tmp_path, 4 << 20, weights="nvme", optimizer="host")
    assert none["weights"] == 0
    for host_bytes in (1_150_000, 1_200_000, 1_250_000):
        moved, held = moved_and_held(tmp_path, host_bytes, weights="auto", optimizer="host")
        assert 0 < held["weights"] < 1
        assert moved <= whole * (1 - held["weights"]) * 1.02
