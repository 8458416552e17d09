"""The way of an accelerator, on the CPU: a device that host code cannot address.

The simulated device's copies end in random order, and their targets hold NaNs until then, so a wait
that is missing shows as a wrong number. What is checked here is what a GPU would have to show.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import offload
from offload.engine import gradients
from offload.engine.activations.copies import ActivationCopy
from offload.tiers.simulated_streams import SimulatedAccelerator
from tests.engine.accelerator import ON_DEVICE, PLACEMENTS, make_model, train, use_accelerator
from tests.threads import run_in_threads


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines get a simulated accelerator for their device tier."""
    use_accelerator(monkeypatch)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("placement", list(PLACEMENTS))
def test_an_accelerator_gives_the_bits_of_host_memory(
    placement: str,
    compute: str,
    accumulation: int,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    losses, state, _ = train(tmp_path, ON_DEVICE, compute, accumulation)
    request.getfixturevalue("accelerator")
    simulated_losses, simulated_state, report = train(
        tmp_path, PLACEMENTS[placement], compute, accumulation
    )
    assert simulated_losses == losses
    for name, tensors in state.items():
        for field, tensor in tensors.items():
            assert torch.equal(simulated_state[name][field], tensor), (name, field)
    assert report.lanes["d2h"].bytes > 0, "gradients have left the device"


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("placement", list(PLACEMENTS))
def test_tiles_on_an_accelerator_give_the_bits_of_host_memory(
    placement: str, compute: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tiling = {"modules": ["*"], "tiles": 5}
    losses, state, _ = train(tmp_path, PLACEMENTS["host"], compute, 2, tiling=tiling)
    request.getfixturevalue("accelerator")
    found = train(tmp_path, PLACEMENTS[placement], compute, 2, tiling=tiling)
    assert found[0] == losses
    for name, tensors in state.items():
        for field, tensor in tensors.items():
            assert torch.equal(found[1][name][field], tensor), (name, field)


@pytest.mark.usefixtures("accelerator")
def test_a_missing_wait_for_a_tile_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiling = {"modules": ["*"], "tiles": 5}
    losses, _, _ = train(tmp_path, PLACEMENTS["host"], "fp32", 1, tiling=tiling)
    wait = SimulatedAccelerator.make_current_wait

    def wait_for_pages(tier: SimulatedAccelerator, transfer: Any) -> None:
        if "tiles.py" not in sys._getframe(1).f_code.co_filename:
            wait(tier, transfer)

    monkeypatch.setattr(SimulatedAccelerator, "make_current_wait", wait_for_pages)
    hasty_losses, _, _ = train(tmp_path, PLACEMENTS["host"], "fp32", 1, tiling=tiling)
    assert hasty_losses != losses


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("placement", list(PLACEMENTS))
def test_what_is_unfrozen_under_way_finds_a_place_beside_an_accelerator(
    placement: str, compute: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    losses, state, _ = train(tmp_path, ON_DEVICE, compute, 2, thaw=True)
    request.getfixturevalue("accelerator")
    simulated_losses, simulated_state, report = train(
        tmp_path, PLACEMENTS[placement], compute, 2, thaw=True
    )
    assert simulated_losses == losses
    for name, tensors in state.items():
        assert ("exp_avg" in tensors) == (name != "0.weight")
        for field, tensor in tensors.items():
            assert torch.equal(simulated_state[name][field], tensor), (name, field)
    for tier in report.tiers.values():
        assert tier.peak_bytes <= tier.budget_bytes


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("home", "section"),
    [
        ("host", {}),
        ("host", {"host_memory": "40KiB"}),
        ("nvme", {"host_memory": "64KiB"}),
        ("nvme", {"host_memory": "24KiB"}),
        ("auto", {"host_memory": "40KiB", "device_memory": "24KiB"}),
    ],
)
def test_activations_of_an_accelerator_come_back_as_they_were(
    home: str,
    section: dict[str, Any],
    checkpointed: bool,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if checkpointed:
        monkeypatch.setattr(nn.LayerNorm, "forward", _checkpointed_norm)
    losses, state, _ = train(tmp_path, ON_DEVICE, "fp32", 2)
    request.getfixturevalue("accelerator")
    placement = {**PLACEMENTS["host"], "activations": home}
    found_losses, found_state, report = train(
        tmp_path, placement, "fp32", 2, activations={"min_bytes": 1024, **section}
    )
    assert found_losses == losses
    for name, tensors in state.items():
        for field, tensor in tensors.items():
            assert torch.equal(found_state[name][field], tensor), (name, field)
    assert report.activations.moved_bytes > 0


def _checkpointed_norm(norm: nn.LayerNorm, x: torch.Tensor) -> Any:
    def normalize(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias)

    return checkpoint(normalize, x, use_reentrant=False)


@pytest.mark.usefixtures("accelerator")
def test_an_activation_that_is_not_waited_for_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placement = {**PLACEMENTS["host"], "activations": "host"}
    losses, _, _ = train(tmp_path, placement, "fp32", 1, activations={"min_bytes": 1024})

    def hasty(copy: ActivationCopy) -> torch.Tensor:
        copy.settle()
        copy.start_arrival()
        assert copy.arrived is not None
        return copy.arrived

    monkeypatch.setattr(ActivationCopy, "make_arrived", hasty)
    hasty_losses, _, _ = train(tmp_path, placement, "fp32", 1, activations={"min_bytes": 1024})
    assert hasty_losses != losses


@pytest.mark.parametrize("home", ["host", "nvme"])
def test_backward_may_run_in_a_thread_of_its_own(
    home: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd runs the nodes of an accelerator in another thread than the one of the forward."""
    sections: dict[str, Any] = {"tiling": {"modules": ["0", "13"], "tiles": 5}}
    monkeypatch.setattr(nn.LayerNorm, "forward", _checkpointed_norm)
    losses, state, _ = train(tmp_path, PLACEMENTS["host"], "fp32", 2, **sections)
    request.getfixturevalue("accelerator")
    backward = torch.Tensor.backward
    main_thread = threading.get_ident()

    def elsewhere(loss: torch.Tensor, **kwargs: Any) -> None:
        def run() -> None:
            assert threading.get_ident() != main_thread
            backward(loss, **kwargs)

        run_in_threads(run)

    monkeypatch.setattr(torch.Tensor, "backward", elsewhere)
    found_losses, found_state, report = train(
        tmp_path,
        {**PLACEMENTS["host"], "activations": home},
        "fp32",
        2,
        activations={"min_bytes": 1024, "host_memory": "64KiB"},
        **sections,
    )
    assert found_losses == losses
    for name, tensors in state.items():
        for field, tensor in tensors.items():
            assert torch.equal(found_state[name][field], tensor), (name, field)
    assert report.activations.moved_bytes > 0


@pytest.mark.usefixtures("accelerator")
def test_a_missing_wait_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, _, _ = train(tmp_path, PLACEMENTS["host"], "fp32", 1)
    monkeypatch.setattr(SimulatedAccelerator, "make_current_wait", lambda tier, transfer: None)
    hasty_losses, _, _ = train(tmp_path, PLACEMENTS["host"], "fp32", 1)
    assert hasty_losses != losses


@pytest.mark.usefixtures("accelerator")
def test_a_gradient_that_fails_to_land_leaves_no_staging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        "tiers": {"device": {"kind": "cpu", "memory": "200KiB"}, "host": {"memory": "8MiB"}},
        "placement": PLACEMENTS["host"],
        "precision": {"compute": "fp32"},
        "partition": {"bucket_elements": 8192},
    }

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such sum")

    with offload.initialize(make_model(), config) as engine:
        before = engine.report().tiers["host"].used_bytes
        loss = engine(torch.zeros(1, 4, dtype=torch.int64)).sum()
        with monkeypatch.context() as broken:
            broken.setattr(gradients, "accumulate_gradient", fail)
            with pytest.raises(RuntimeError, match="no such sum"):
                engine.backward(loss)
        assert engine.report().tiers["host"].used_bytes == before


def test_a_gathered_window_that_cannot_open_leaves_no_pin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        "tiers": {"device": {"kind": "cpu", "memory": "400KiB"}, "host": {"memory": "8MiB"}},
        "placement": PLACEMENTS["host"],
        "guard": {"gather": ["1"]},
    }

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no window")

    with offload.initialize(make_model(), config) as engine:
        pager = engine._parts.pager
        with monkeypatch.context() as broken:
            broken.setattr(pager, "open_window", fail)
            with torch.no_grad(), pytest.raises(RuntimeError, match="no window"):
                engine.module[1](torch.zeros(1, 64, dtype=torch.bfloat16))
        assert [page.pins for page in pager.pages] == [0] * len(pager.pages)
