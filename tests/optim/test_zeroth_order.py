"""Perturbation and update of weights, against numpy, in every precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from offload.optim.philox import Noise
from offload.optim.zeroth_order import perturb_weights, update_weights
from tests import zeroth_oracle

NUMEL = 5000
PLACE = {"seed": 1, "step": 2, "parameter": 3}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def weights(precision: str, *, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(NUMEL, generator=generator)).to(DTYPES[precision])


def bits(tensor: torch.Tensor) -> Any:
    return tensor.numpy() if tensor.dtype is torch.float32 else tensor.view(torch.uint16).numpy()


@pytest.mark.parametrize("precision", list(DTYPES))
def test_perturbation(precision: Any) -> None:
    weight, perturbed = weights(precision), weights(precision)
    before = weight.clone()
    perturb_weights(
        bits(weight),
        bits(perturbed),
        precision=precision,
        noise=Noise(**PLACE),
        start=0,
        scale=-1e-3,
    )
    noise = zeroth_oracle.normals(NUMEL, **PLACE)
    expected = torch.from_numpy(weight.float().numpy() + np.float32(-1e-3) * noise)
    assert torch.equal(perturbed, expected.to(weight.dtype))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("precision", list(DTYPES))
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_update(precision: Any, weight_decay: float) -> None:
    weight = weights(precision)
    value, noise = weight.float().numpy(), zeroth_oracle.normals(NUMEL, **PLACE)
    gradient = np.float32(0.7) * noise + np.float32(weight_decay) * value
    expected = torch.from_numpy(value - np.float32(1e-2) * gradient).to(weight.dtype)
    for start in range(0, NUMEL, 2048):  # in parts, as chunks come
        assert update_weights(
            bits(weight)[start : start + 2048],
            precision=precision,
            noise=Noise(**PLACE),
            start=start,
            projected_gradient=0.7,
            hyper={"lr": 1e-2, "weight_decay": weight_decay},
        )
    assert torch.equal(weight, expected)


@pytest.mark.parametrize(("precision", "lr"), [("fp32", 1e38), ("bf16", 1e38), ("fp16", 1e5)])
def test_a_weight_that_is_not_finite_is_told(precision: Any, lr: float) -> None:
    settings = {"precision": precision, "noise": Noise(**PLACE), "start": 0}
    weight = weights(precision)
    assert update_weights(bits(weight), projected_gradient=1.0, hyper={"lr": lr / 1e3}, **settings)
    assert not update_weights(bits(weight), projected_gradient=100.0, hyper={"lr": lr}, **settings)
    assert not torch.isfinite(weight).all()
