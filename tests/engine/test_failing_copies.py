"""Copies between host and accelerator that fail: an error, or the right bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

import offload
from offload.errors import OffloadError
from tests.engine.accelerator import (
    ON_DEVICE,
    PLACEMENTS,
    loss_of,
    make_config,
    make_ids,
    make_model,
    use_accelerator,
)

STEPS = 3

T = TypeVar("T")


def train(path: Path, placement: dict[str, str]) -> tuple[list[float], Any]:
    """Losses and state; what raises is done again, as a user would."""
    config = make_config(path, placement, "fp32", 1)
    ids = make_ids()
    losses = []
    with offload.initialize(make_model(), config) as engine:

        def forward_and_backward() -> float:
            loss = loss_of(engine, ids[engine.global_steps % 4 :])
            engine.backward(loss)
            return float(loss.item())

        for _ in range(STEPS):
            losses.append(tried(forward_and_backward))
            tried(engine.step)
        return losses, tried(lambda: dict(engine.named_state()))


def tried(call: Callable[[], T]) -> T:
    """One copy fails: what it fails is done again, once."""
    try:
        return call()
    except OffloadError:
        return call()


# Copies home of what was updated in backward, or pending, are among these.
@pytest.mark.filterwarnings("ignore:.*is made again.*:RuntimeWarning")
@pytest.mark.parametrize("nth", [34, 35, 37, 38, 65, 66, 67])
def test_a_copy_that_fails_changes_no_bit(
    nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placement = {**PLACEMENTS["nvme"], "weights": "device"}
    losses, state = train(tmp_path, ON_DEVICE)
    use_accelerator(monkeypatch, fault=f"op=copy,nth={nth},errno=5")
    found_losses, found_state = train(tmp_path, placement)
    assert found_losses == losses
    for name, tensors in state.items():
        for field, tensor in tensors.items():
            assert torch.equal(found_state[name][field], tensor), (name, field)


def test_steps_and_reading_state_give_the_staging_of_pages_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_accelerator(monkeypatch)
    config = make_config(tmp_path, PLACEMENTS["nvme"], "fp32", 1)
    with offload.initialize(make_model(), config) as engine:
        before = engine._parts.host.used_bytes
        with torch.no_grad():
            loss_of(engine, make_ids())
        engine._parts.pager.write_edits()  # a step begins with it, and so does reading state
        assert engine._parts.host.used_bytes == before
