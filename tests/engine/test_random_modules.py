"""Random modules, control flow and budgets: the bits of plain PyTorch, always."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from offload.engine.engine import Engine
from tests.faults.lab import LEARNING_RATE, make_engine

WIDTH = 32
KINDS = ("linear", "borrow", "view", "product", "checkpoint", "tied", "clamp", "skip", "norm")

layers = st.lists(st.sampled_from(KINDS), min_size=2, max_size=7)
# What a step does: the layers that run, in order; whether it is evaluated first; an edit after it.
steps = st.lists(
    st.tuples(
        st.lists(st.integers(0, 6), min_size=1, max_size=6),
        st.booleans(),
        st.sampled_from(("none", "scale", "data", "view")),
    ),
    min_size=2,
    max_size=4,
)


class Layer(nn.Module):
    """One layer of any kind: (4, 32) -> (4, 32)."""

    def __init__(self, kind: str, shared: nn.Parameter) -> None:
        super().__init__()
        self.kind = kind
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.weight = shared if kind == "tied" else nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        match self.kind:
            case "borrow":
                return torch.tanh(torch.addmm(self.inner.bias, x, self.inner.weight.t()))
            case "view":
                first, second = self.weight.chunk(2)
                return torch.tanh(self.inner(x) @ first.t() @ second)
            case "product":
                return torch.tanh(x @ (self.weight * self.scale))
            case "checkpoint":
                return torch.as_tensor(checkpoint(self._body, x, use_reentrant=False))
            case "clamp":
                with torch.no_grad():
                    self.weight.clamp_(-0.25, 0.25)
                return torch.tanh(x @ self.weight)
            case "skip":
                return x + torch.tanh(self.inner(x)) * self.scale
            case "norm":
                return nn.functional.layer_norm(x, (WIDTH,), self.scale, self.inner.bias)
        return torch.tanh(self.inner(x) @ self.weight)

    def _body(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(torch.tanh(x @ self.weight)))


class Random(nn.Module):
    """Runs the layers that it is told to."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        shared = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)
        self.layers = nn.ModuleList(Layer(kind, shared) for kind in kinds)

    def forward(self, x: torch.Tensor, order: list[int]) -> torch.Tensor:
        for index in order:
            x = self.layers[index % len(self.layers)](x)
        return x


def _edit(module: Random, how: str, order: list[int]) -> None:
    layer = module.layers[order[0] % len(module.layers)]
    with torch.no_grad():
        if how == "scale":
            layer.weight.mul_(0.5)
        elif how == "data":
            layer.inner.weight.data[3] = 0.25
        elif how == "view":
            layer.inner.weight.detach()[:, 1].fill_(0.125)


def _train(module: Random, engine: Engine | None, script: Any) -> list[torch.Tensor]:
    call = engine or module
    records = []
    for number, (order, evaluates, edit) in enumerate(script):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(4, WIDTH, generator=generator)
        if evaluates:
            with torch.no_grad():
                records.append(call(x, order[::-1]))
        loss = call(x, order).square().mean()
        records.append(loss.detach())
        try:
            (engine.backward if engine is not None else torch.Tensor.backward)(loss)
        except RuntimeError as error:  # a layer that clamps its weight ran twice
            assert "modified by an inplace" in str(error)  # noqa: PT017
            records.append(torch.tensor(float(number)))
            break
        if engine is not None:
            assert engine.step()
            assert not any(p.pins or p.windows or p.kept for p in engine._parts.pages)
            assert engine._parts.device.peak_bytes <= engine._parts.device.budget_bytes
        else:
            with torch.no_grad():
                for parameter in module.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=LEARNING_RATE)
                        parameter.grad = None
        _edit(module, edit, order)
    if engine is None:
        records += [parameter.detach() for parameter in module.parameters()]
    else:
        records += [state["master"] for _, state in engine.named_state()]
    return records


def _check(kinds: list[str], script: Any, pages: int, home: str) -> None:
    results = []
    for kind in ("plain", home):
        torch.manual_seed(0)
        module = Random(kinds)
        if kind == "plain":
            results.append(_train(module, None, script))
            continue
        with tempfile.TemporaryDirectory() as folder:
            engine = make_engine(module, kind, Path(folder), pages=pages)
            try:
                results.append(_train(module, engine, script))
            finally:
                engine.close()
    expected, got = results
    assert len(expected) == len(got)
    for number, (a, b) in enumerate(zip(expected, got, strict=True)):
        assert torch.equal(a, b), f"record {number} of {len(expected)}"


_cases = given(layers, steps, st.integers(3, 6), st.sampled_from(("host", "nvme", "device")))
_dose = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=30, derandomize=True, **_dose)
@_cases
def test_random_module_gives_the_bits_of_plain_pytorch(
    kinds: list[str], script: Any, pages: int, home: str
) -> None:
    _check(kinds, script, pages, home)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=1000, **_dose)
@_cases
def test_many_random_modules_give_the_bits_of_plain_pytorch(
    kinds: list[str], script: Any, pages: int, home: str
) -> None:
    _check(kinds, script, pages, home)
