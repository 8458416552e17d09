"""What an engine records of a step: that it is all there, and that it changes nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload.timeline import StepTimeline
from tests.engine.accelerator import use_accelerator

STEPS = 6
RECORDED = 4


def build(placement: str, tmp_path: Path, backend: str = "threads") -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    return offload.initialize(
        model,
        {
            "tiers": {
                "device": {"kind": "cpu", "memory": "96KiB"},
                "host": {"memory": "4MiB"},
                "nvme": {"paths": [str(tmp_path)]},
            },
            "placement": {"weights": placement, "optimizer": "nvme", "gradients": placement},
            "precision": {"compute": "fp32"},
            "partition": {"bucket_elements": 4096},
            "overlap": {"prefetch": False},
            "io": {"backend": backend},
        },
    )


def train(engine: Any, record: int | None) -> tuple[list[float], StepTimeline | None, Any]:
    losses, report = [], None
    generator = torch.Generator().manual_seed(1)
    for number in range(1, STEPS + 1):
        if number == record:
            engine.record_timeline()
        loss = engine(torch.randn(4, 64, generator=generator)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        if number == record:
            report = engine.report()
    return losses, engine.recorded_timeline(), report


@pytest.mark.parametrize(
    ("placement", "backend"), [("nvme", "threads"), ("nvme", "python"), ("host", "threads")]
)
def test_a_recorded_step_has_all_that_its_lanes_did(
    tmp_path: Path, placement: str, backend: str
) -> None:
    with build(placement, tmp_path, backend) as engine:
        plain, nothing, _ = train(engine, None)
    assert nothing is None
    with build(placement, tmp_path, backend) as engine:
        losses, recorded, report = train(engine, RECORDED)
        assert engine.recorded_timeline(now=True) is None
    assert losses == plain, "recording changes no number"
    assert recorded is not None
    assert recorded.step == RECORDED
    assert recorded.num_dropped == 0
    for span in recorded.spans:
        assert span.queued <= span.began <= span.ended
        assert span.began <= recorded.seconds
        assert span.ended >= 0
    lanes = Counter(span.lane for span in recorded.spans)
    moving = "nvme_read" if placement == "nvme" else "h2d"
    assert {"compute", "cpu", moving, "nvme_write"} <= lanes.keys()
    assert [s.name for s in recorded.spans if s.lane == "compute"] == ["forward", "backward"]
    assert len(recorded.faults) == report.faults
    fetched = [s for s in recorded.spans if s.lane == moving and s.name.startswith("weights")]
    assert sum(span.nbytes for span in fetched) >= 6 * 64 * 64 * 4
    (forward,) = (span for span in recorded.spans if span.name == "forward")
    waits = sum(span.ended - span.began for span in recorded.spans if span.lane == "wait")
    assert waits < recorded.seconds
    assert forward.nbytes == 0


def test_faults_of_the_first_step_are_named(tmp_path: Path) -> None:
    with build("nvme", tmp_path) as engine:
        _, recorded, report = train(engine, 1)
    assert recorded is not None
    assert len(recorded.faults) == report.faults > 6
    assert {name.split()[0] for _, name in recorded.faults} == {"weights"}
    assert all(0 <= at <= recorded.seconds for at, _ in recorded.faults)


def test_occupancy_is_within_the_budget_and_has_the_peak(tmp_path: Path) -> None:
    with build("nvme", tmp_path) as engine:
        _, recorded, report = train(engine, RECORDED)
    assert recorded is not None
    times = [at for at, _ in recorded.occupancy]
    assert times == sorted(times)
    seen = {name: max(used[name] for _, used in recorded.occupancy) for name in report.tiers}
    for name, tier in report.tiers.items():
        assert seen[name] <= tier.step_peak_bytes <= tier.peak_bytes
        assert tier.used_bytes <= tier.step_peak_bytes
    assert len({used["device"] for _, used in recorded.occupancy}) > 1


def test_a_step_that_is_recorded_on_an_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_accelerator(monkeypatch)
    with build("host", tmp_path) as engine:
        _, recorded, _ = train(engine, RECORDED)
    assert recorded is not None
    copies = Counter(span.lane for span in recorded.spans)
    assert copies["h2d"] > 0
    assert copies["d2h"] > 0
    assert all(
        span.name != f"copy {span.lane}" for span in recorded.spans if span.lane in {"h2d", "d2h"}
    )


def test_two_engines_record_each_its_own(tmp_path: Path) -> None:
    with build("nvme", tmp_path) as one, build("nvme", tmp_path) as other:
        one.record_timeline()
        other.backward(other(torch.ones(1, 64)).sum())
        other.step()
        one.backward(one(torch.ones(1, 64)).sum())
        one.step()
        assert other.recorded_timeline(now=True) is None
        recorded = one.recorded_timeline(now=True)
    assert recorded is not None
    assert Counter(s.name for s in recorded.spans if s.lane == "compute")["forward"] == 1
