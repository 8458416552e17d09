from __future__ import annotations

import pytest
import torch

from offload.config import LrSchedulerSection
from offload.errors import ConfigError
from offload.optim.schedulers import make_lr_scheduler


def rates(
    section: LrSchedulerSection, num_steps: int, total_steps: int | None = None
) -> list[float]:
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": [parameters[0]]}, {"params": [parameters[1]], "lr": 20.0}]
    optimizer = torch.optim.SGD(groups, lr=2.0)
    scheduler = make_lr_scheduler(section, optimizer, total_steps=total_steps)
    seen = []
    for _ in range(num_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == pytest.approx(10 * seen[-1])
        optimizer.step()
        scheduler.step()
    return seen


def test_constant() -> None:
    assert rates(LrSchedulerSection(), 3) == [2.0] * 3


def test_warmup() -> None:
    assert rates(LrSchedulerSection(warmup_steps=4), 7) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_linear_ends_at_its_floor_and_stays() -> None:
    section = LrSchedulerSection(name="linear", warmup_steps=2, min_lr_ratio=0.5)
    assert rates(section, 9, total_steps=6) == pytest.approx(
        [0.0, 1.0, 2.0, 1.75, 1.5, 1.25, 1.0, 1.0, 1.0]
    )


def test_cosine_equals_torch() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.2)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    section = LrSchedulerSection(name="cosine", total_steps=10, min_lr_ratio=0.1)
    assert rates(section, 10, total_steps=99) == pytest.approx(expected)


def test_a_decay_needs_an_end() -> None:
    with pytest.raises(ConfigError, match="total_steps"):
        rates(LrSchedulerSection(name="linear"), 1)
