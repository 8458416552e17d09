"""Ctrl-C at lines all over the engine: whoever repeats what was cut off gets the same bits."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload.errors import EngineStateError
from offload.state import stored
from offload.tiers.uninterrupted import uninterrupted
from tests.interrupts import at_every_line

_FOLDERS = ("engine/", "optim/", "partition/", "tiers/", "state/")
_MIB = 1 << 20
_STRIDE = 211  # lines between two interrupts; prime, so that loops are met at all their lines


class Training:
    """Two steps of a tiny model whose state is on NVMe."""

    def __init__(self, folder: Path, *, overlapped: bool = True) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.Linear(32, 4))
        config = {
            "tiers": {
                "device": {"kind": "cpu", "memory": _MIB},
                "host": {"memory": 4 * _MIB},
                "nvme": {"paths": [str(folder)]},
            },
            "placement": {"weights": "nvme", "gradients": "nvme", "optimizer": "nvme"},
            "partition": {"bucket_elements": 1024},
            "precision": {"compute": "fp32"},
            "optimizer": {"name": "adamw", "lr": 1e-2},
            "overlap": {"optimizer": overlapped},
        }
        self.engine: Any = offload.initialize(model, config)
        self.step()

    def batch(self) -> None:
        """A forward and a backward, again if it was cut off."""
        drawn = torch.Generator().manual_seed(self.engine.global_steps)
        loss = self.engine(torch.randn(8, 16, generator=drawn)).square().mean()
        self.engine.backward(loss)

    def step(self) -> None:
        self.batch()
        self.engine.step()

    def end(self) -> list[torch.Tensor]:
        """All state, after which the engine is closed."""
        found = [
            tensor.clone()
            for _, tensors in self.engine.named_state()
            for _, tensor in sorted(tensors.items())
        ]
        self.engine.close()
        return found


@pytest.fixture(params=[True, False], ids=["overlapped", "by itself"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Training]:
    return lambda: Training(tmp_path, overlapped=request.param)


@pytest.fixture(autouse=True)
def torch_calls_guards_afterwards() -> Iterator[None]:
    yield
    assert torch._C._is_torch_function_enabled()


def expected(make: Callable[[], Training], num_steps: int = 1) -> list[torch.Tensor]:
    training = make()
    for _ in range(num_steps):
        training.step()
    return training.end()


def check(training: Training, wanted: list[torch.Tensor]) -> None:
    for page in training.engine._parts.pages:
        assert (page.pins, page.windows) == (0, 0), "who was cut off still uses it"
    for found, right in zip(training.end(), wanted, strict=True):
        assert torch.equal(found, right)


def test_in_a_step(make: Callable[[], Training]) -> None:
    wanted = expected(make)
    for training, interrupt in at_every_line(make, *_FOLDERS, step=_STRIDE):
        training.batch()
        with interrupt:
            training.engine.step()
        if training.engine.global_steps == 1:
            training.engine.step()
        assert training.engine.global_steps == 2
        check(training, wanted)


def test_in_forward_and_backward(make: Callable[[], Training]) -> None:
    wanted = expected(make)
    for training, interrupt in at_every_line(make, *_FOLDERS, step=_STRIDE):
        with interrupt:
            training.batch()
        if interrupt.came:
            training.engine.optimizer.zero_grad()
            training.batch()
        training.engine.step()
        check(training, wanted)


def test_in_a_save(make: Callable[[], Training], tmp_path: Path) -> None:
    wanted = expected(make)
    for number, (training, interrupt) in enumerate(at_every_line(make, *_FOLDERS, step=_STRIDE)):
        folder = tmp_path / f"checkpoints {number}"
        with interrupt:
            training.engine.save_checkpoint(folder)
        training.step()
        training.engine.save_checkpoint(folder)
        training.engine.wait_for_checkpoint()
        with stored.find(folder, None) as checkpoint:
            checkpoint.verify()
            assert checkpoint.content.values["global_steps"] == 2
        check(training, wanted)


def test_in_close(make: Callable[[], Training]) -> None:
    for training, interrupt in at_every_line(make, *_FOLDERS, step=_STRIDE):
        training.step()
        with interrupt:
            training.engine.close()
        training.engine.close()
        parts = training.engine._parts
        assert parts.host._closed
        assert parts.nvme._closed


def test_what_a_third_signal_has_cut_off_is_void_until_a_load(
    make: Callable[[], Training], tmp_path: Path
) -> None:
    training = make()
    training.engine.save_checkpoint(tmp_path / "checkpoints")
    training.engine.wait_for_checkpoint()
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(EngineStateError, match="third time"):
        training.step()
    with pytest.raises(EngineStateError, match="third time"):
        training.engine.save_checkpoint(tmp_path / "checkpoints")
    training.engine.load_checkpoint(tmp_path / "checkpoints")
    training.step()
    training.engine.close()
