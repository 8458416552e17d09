"""A step of the command line computes where the engine does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from offload.cli.steps import on_device_of


def test_batches_go_where_the_parameters_are() -> None:
    engine: Any = SimpleNamespace(module=torch.nn.Linear(2, 2, device="meta"))
    placed = on_device_of(engine, {"input_ids": torch.zeros(3), "labels": torch.zeros(3)})
    assert {name: tensor.device.type for name, tensor in placed.items()} == {
        "input_ids": "meta",
        "labels": "meta",
    }
