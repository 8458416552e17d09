from __future__ import annotations

import math

import pytest
import torch

from offload.optim.clipping import clip_coefficient, global_norm, square_sum


def test_norm_and_coefficient_equal_torch() -> None:
    torch.manual_seed(5)
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (1000, 3, 70_000)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    gradients = [parameter.grad.clone() for parameter in parameters]
    sums = [square_sum(g.double().square().split(65_536)[0].tolist()) for g in gradients[:2]]
    sums.append(
        square_sum(block.double().square().sum().item() for block in gradients[2].split(65_536))
    )
    expected = torch.nn.utils.clip_grad_norm_(parameters, 1.5)
    norm = global_norm(sums)
    assert norm == pytest.approx(expected.item(), rel=1e-6)
    coefficient = clip_coefficient(norm, 1.5)
    for gradient, parameter in zip(gradients, parameters, strict=True):
        torch.testing.assert_close(gradient * coefficient, parameter.grad, rtol=1e-6, atol=0)


def test_order_does_not_matter() -> None:
    sums = [1e16, 1.0, 3.0, 1e-8, 1e16] * 7
    assert global_norm(sums) == global_norm(sums[::-1]) == global_norm(sorted(sums))


def test_loss_scale_is_taken_out() -> None:
    assert global_norm([9.0, 16.0], loss_scale=4.0) == 1.25


@pytest.mark.parametrize(("value", "test"), [(math.inf, math.isinf), (math.nan, math.isnan)])
def test_what_is_not_finite_stays_so(value: float, test) -> None:
    assert test(global_norm([1.0, square_sum([2.0, value]), math.inf]))


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0, 2.0, math.inf, math.nan])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 10.0])
def test_coefficient_is_torchs(norm: float, max_norm: float) -> None:
    expected = torch.clamp(max_norm / (torch.tensor(norm, dtype=torch.float64) + 1e-6), max=1.0)
    assert clip_coefficient(norm, max_norm) == pytest.approx(expected.item(), nan_ok=True)


def test_zero_means_no_clipping() -> None:
    assert clip_coefficient(1e9, 0.0) == 1.0


def test_nothing_has_no_norm() -> None:
    assert global_norm([]) == 0.0
