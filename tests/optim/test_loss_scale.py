from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import CheckpointError
from offload.optim.loss_scale import LossScale


def scaler_of(*, initial: float, growth: float, backoff: float, interval: int):
    return torch.amp.GradScaler(
        "cpu",
        init_scale=initial,
        growth_factor=growth,
        backoff_factor=backoff,
        growth_interval=interval,
    )


def step_scaler(scaler: torch.amp.GradScaler, found_nonfinite: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    scaler.scale(torch.ones(1))
    parameter.grad = torch.full((2,), math.inf if found_nonfinite else 1.0)
    scaler.step(optimizer)
    scaler.update()


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([65536.0, 3.7, 2.0**126, 2.0**-148]),
    st.sampled_from([2.0, 1.7]),
    st.sampled_from([0.5, 0.3]),
    st.integers(1, 4),
    st.lists(st.booleans(), max_size=30),
)
def test_equals_grad_scaler(
    initial: float, growth: float, backoff: float, interval: int, found: list[bool]
) -> None:
    scaler = scaler_of(initial=initial, growth=growth, backoff=backoff, interval=interval)
    scale = LossScale(
        initial=initial, growth_factor=growth, backoff_factor=backoff, growth_interval=interval
    )
    for found_nonfinite in found:
        step_scaler(scaler, found_nonfinite)
        scale.update(found_nonfinite)
        assert scale.scale == scaler.get_scale()
        assert scale.state_dict() == scaler.state_dict()


def test_defaults_are_grad_scalers() -> None:
    assert LossScale().state_dict() == torch.amp.GradScaler("cpu").state_dict()


def test_state_moves_to_and_from_grad_scaler() -> None:
    scale = LossScale(growth_interval=3)
    for found_nonfinite in (False, True, False, False):
        scale.update(found_nonfinite)
    other = LossScale()
    other.load_state_dict(scale.state_dict())
    scaler = torch.amp.GradScaler("cpu")
    scaler.load_state_dict(scale.state_dict())
    step_scaler(scaler, found_nonfinite=False)
    for each in (scale, other):
        each.update(found_nonfinite=False)
        assert each.state_dict() == scaler.state_dict()


def test_incomplete_state() -> None:
    with pytest.raises(CheckpointError, match="_growth_tracker"):
        LossScale().load_state_dict(
            {k: v for k, v in LossScale().state_dict().items() if k != "_growth_tracker"}
        )
