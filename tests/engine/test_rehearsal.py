"""A rehearsal counts what torch itself does and saves, without memory; and knows what it cannot."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from offload.engine.rehearsal import Rehearsal, measure_operations, rehearse
from offload.errors import OffloadError

CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self, width: int, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.register_buffer("scale", torch.ones(width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden)) * self.scale
        return hidden.square().mean()


def on_meta(width: int) -> Model:
    with torch.device("meta"):
        return Model(width)


def rehearsed(width: int, tokens: int, dtype: torch.dtype = torch.float32) -> Rehearsal:
    return rehearse(
        on_meta(width).to(dtype), {"hidden": ((tokens, width), dtype)}, device=CPU, dtype=dtype
    )


def test_the_operations_are_those_of_real_training() -> None:
    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: Counter[str] = Counter()

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.names[str(func)] += 1
            return func(*args, **(kwargs or {}))

    model, given = Model(8), torch.zeros(5, 8)
    with Count() as real:
        model(given).backward()
    found: Counter[str] = Counter()
    for operation, count in rehearsed(8, 5).operations.items():
        found[str(operation.function)] += count
    assert {n: c for n, c in found.items() if "detach" not in n} == {
        n: c for n, c in real.names.items() if "detach" not in n
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_that_autograd_saves(dtype: torch.dtype) -> None:
    model, given = Model(8).to(dtype), torch.zeros(5, 8, dtype=dtype)
    own = {each.untyped_storage().data_ptr() for each in [*model.parameters()]}
    saved: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        model(given)
    assert rehearsed(8, 5, dtype).activation_bytes == sum(size for size, _ in saved.values())


def test_nothing_of_the_models_size_is_allocated() -> None:
    found = rehearsed(1 << 20, 4)  # 12 TiB of weights
    assert found.activation_bytes > 1 << 24
    with pytest.raises(OffloadError, match="too large to be measured in"):
        measure_operations(found, device=CPU, most_bytes=1 << 30)


def test_the_model_is_not_changed() -> None:
    model = Model(8)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    rehearse(model, {"hidden": ((5, 8), torch.float32)}, device=CPU, dtype=torch.bfloat16)
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, each in model.state_dict().items():
        assert torch.equal(each, before[name])
        assert each.dtype == torch.float32


def test_operations_are_measured_in_groups_that_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("offload.engine.rehearsal._SWEEP_SECONDS", 0.0)
    found = rehearsed(64, 16)
    assert measure_operations(found, device=CPU, most_bytes=1 << 30) > 0
    largest = max(each.nbytes for each in found.operations)
    assert measure_operations(found, device=CPU, most_bytes=3 * largest) > 0
    with pytest.raises(OffloadError, match="too large"):
        measure_operations(found, device=CPU, most_bytes=3 * largest - 1)


def test_each_operation_counts_as_often_as_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.engine.rehearsal._seconds", lambda *_: 2.0)
    found = rehearsed(8, 5)
    seconds = measure_operations(found, device=CPU, most_bytes=1 << 30)
    assert seconds == 2.0 * sum(found.operations.values())


@pytest.mark.parametrize("kind", ["by value", "no loss", "wrong input"])
def test_what_cannot_be_rehearsed_says_so(kind: str) -> None:
    class Odd(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> Any:
            made = super().forward(hidden)
            if kind == "by value" and made.sum().item() > 0:
                return -made.sum()
            return made.mean() if kind == "by value" else None

    name = "other" if kind == "wrong input" else "hidden"
    with pytest.raises(OffloadError, match="Odd cannot be rehearsed without weights"):
        rehearse(Odd(4, 4), {name: ((2, 4), torch.float32)}, device=CPU, dtype=torch.float32)
