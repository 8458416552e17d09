"""Loops of one's own: `loss.backward()`, `engine.optimizer.step()`, and what counts by itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from tests.oracle import ADAMW, make_engine, relative_difference, settings, small_loss, small_model

TOLERANCE = 1e-6
HOST: dict[str, Any] = {
    "tiers": {"device": {"memory": "64KiB"}},
    "placement": dict.fromkeys(("weights", "gradients", "optimizer"), "host"),
    "precision": {"compute": "fp32"},
    "optimizer": {"name": "adamw", **ADAMW},
}
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "one_cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=8),
    "restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=2),
            torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.9),
        ],
        milestones=[2],
    ),
}


def groups_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not and learn faster."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.2},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0, "lr": 3e-3},
    ]


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, foreach=False, **ADAMW)


def train(
    module: Any,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    *,
    zero: Callable[[], object],
    micro_batches: int = 2,
) -> list[float]:
    """The loop of PyTorch's tutorials, the same for a model and for an engine."""
    losses = []
    for step in range(6):
        for micro in range(micro_batches):
            loss = small_loss(module, step * micro_batches + micro)
            (loss / micro_batches).backward()
            losses.append(loss.item())
        optimizer.step()
        scheduler.step()
        zero()
    return losses


def assert_same_weights(engine: Any, model: torch.nn.Module) -> None:
    state = engine.state_dict()
    for name, weight in model.state_dict().items():
        assert relative_difference(state[name], weight) <= TOLERANCE, name


@pytest.mark.parametrize("name", SCHEDULERS)
def test_torch_schedulers_and_groups(name: str) -> None:
    model = small_model()
    optimizer = adamw(groups_of(model))
    expected = train(model, model, optimizer, SCHEDULERS[name](optimizer), zero=optimizer.zero_grad)
    offloaded = small_model()
    with make_engine(offloaded, HOST, optimizer=lambda _: adamw(groups_of(offloaded))) as engine:
        scheduler = SCHEDULERS[name](engine.optimizer)
        found = train(
            engine, offloaded, engine.optimizer, scheduler, zero=engine.optimizer.zero_grad
        )
        assert found == pytest.approx(expected, rel=TOLERANCE)
        rates = [group["lr"] for group in engine.optimizer.param_groups]
        assert rates == [group["lr"] for group in optimizer.param_groups]
        assert_same_weights(engine, model)


def test_a_plateau_scheduler() -> None:
    with make_engine(small_model(), HOST) as engine:
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(engine.optimizer, patience=0)
        for _ in range(3):
            small_loss(engine, 0).backward()
            engine.optimizer.step()
            engine.optimizer.zero_grad()
            plateau.step(1.0)
        assert engine.optimizer.param_groups[0]["lr"] == pytest.approx(ADAMW["lr"] * 1e-2)


def test_gradients_forgotten_by_the_model() -> None:
    """`model.zero_grad()` says what the optimizer's does, also to an accumulation that follows."""

    def run(zero_of: Callable[[Any, Any], Callable[[], object]]) -> tuple[list[float], Any]:
        model = small_model()
        with make_engine(model, HOST) as engine, warnings.catch_warnings():
            warnings.simplefilter("error")
            scheduler = SCHEDULERS["step"](engine.optimizer)
            zero = zero_of(engine, model)
            losses = train(engine, model, engine.optimizer, scheduler, zero=zero, micro_batches=3)
            return losses, engine.state_dict()

    losses, state = run(lambda engine, _: engine.optimizer.zero_grad)
    others, other_state = run(lambda _, model: model.zero_grad)
    assert losses == others
    assert all(torch.equal(tensor, other_state[name]) for name, tensor in state.items())


def test_the_scheduler_of_a_loop_goes_into_client_state(tmp_path: Path) -> None:
    def steps(engine: Any, scheduler: Any, start: int, stop: int) -> list[float]:
        losses = []
        for step in range(start, stop):
            loss = small_loss(engine, step)
            loss.backward()
            engine.optimizer.step()
            scheduler.step()
            engine.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    with make_engine(small_model(), HOST) as engine:
        scheduler = SCHEDULERS["one_cycle"](engine.optimizer)
        steps(engine, scheduler, 0, 3)
        engine.save_checkpoint(tmp_path, client_state={"scheduler": scheduler.state_dict()})
        expected = steps(engine, scheduler, 3, 6)
    with make_engine(small_model(), HOST) as engine:
        scheduler = SCHEDULERS["one_cycle"](engine.optimizer)
        scheduler.load_state_dict(engine.load_checkpoint(tmp_path)["scheduler"])
        assert steps(engine, scheduler, 3, 6) == expected


def test_state_of_a_torch_optimizer_is_not_lost_silently() -> None:
    model = small_model()
    optimizer = adamw(model.parameters())
    small_loss(model, 0).backward()
    optimizer.step()
    with make_engine(small_model(), HOST) as engine:
        with pytest.raises(offload.OffloadError, match="import_checkpoint"):
            engine.optimizer.load_state_dict(optimizer.state_dict())
        known = engine.optimizer.state_dict()
        known["param_groups"][0]["lr"] = 0.5
        engine.optimizer.load_state_dict(known)
        assert engine.optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("compute", ["fp32", "fp16"])
def test_backward_that_is_told_which_is_last(compute: str, by_itself: None) -> None:
    """A loop that counts gives the numbers of the engine's own counting, in fp16 too."""
    config = {**HOST, "precision": {"compute": compute}}
    counted = {**config, "training": {"gradient_accumulation_steps": 4}}
    runs = []
    with make_engine(small_model(), counted) as engine:
        norms = []
        for index in range(8):
            engine.backward(small_loss(engine, index))
            if engine.step():
                norms.append(engine.grad_norm)
        runs.append((norms, engine.state_dict()))
    told = {**config, "training": {"gradient_dtype": "fp32"}}
    with make_engine(small_model(), told) as engine:
        norms = []
        for index in range(8):
            is_last = index % 4 == 3
            engine.backward(small_loss(engine, index) * 0.25, is_last=is_last)
            if is_last:
                before = engine.accumulated_grad_norm()
                engine.optimizer.step()
                assert engine.grad_norm == before
                norms.append(before)
                engine.optimizer.zero_grad()
        runs.append((norms, engine.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(tensor, runs[1][1][name]) for name, tensor in runs[0][1].items())


def test_the_overlapped_step_goes_on_under_a_loop_that_counts(tmp_path: Path) -> None:
    """What the last backward of a step completes is updated before the step."""
    model = small_model()
    with make_engine(model, settings("nvme", tmp_path)) as engine:
        for step in range(3):
            for micro in range(2):
                engine.backward(small_loss(engine, 2 * step + micro), is_last=micro == 1)
            engine.accumulated_grad_norm()
            engine.optimizer.step()
            model.zero_grad()
        assert engine._parts.updates.committed > 0
        assert engine._parts.updates.dropped == 0


def test_the_norm_of_no_gradients_is_zero() -> None:
    with make_engine(small_model(), HOST) as engine:
        assert engine.accumulated_grad_norm() == 0.0
