"""A simulated accelerator in the place of an engine's device tier, and a small training on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import offload
from offload.engine import build, planning
from offload.engine.departed import DepartedGradient
from offload.tiers.host import HostArena
from offload.tiers.simulated import LaneModel, SimulatedIo, VirtualClock
from offload.tiers.simulated_streams import SimulatedAccelerator

STEPS = 4
ON_DEVICE = {"weights": "device", "gradients": "device", "optimizer": "device"}
PLACEMENTS = {
    "device": ON_DEVICE,
    "host": {"weights": "host", "gradients": "host", "optimizer": "host"},
    "nvme": {"weights": "nvme", "gradients": "nvme", "optimizer": "nvme"},
    "mixed": {"weights": "host", "gradients": "device", "optimizer": "nvme"},
}


def use_accelerator(
    monkeypatch: pytest.MonkeyPatch, *, seed: int = 3, fault: str | None = None
) -> list[SimulatedAccelerator]:
    """Let engines have a simulated accelerator; the list gets the tier of each."""
    opened: list[SimulatedAccelerator] = []

    def open_device_tier(
        kind: str, budget_bytes: int, io: object, *, deadline_seconds: float
    ) -> SimulatedAccelerator:
        del kind, io, deadline_seconds
        slow = LaneModel(bytes_per_second=1e9, latency_seconds=1e-4, jitter_seconds=1e-3)
        lanes = {"h2d": slow, "d2h": slow}
        simulated = SimulatedIo(VirtualClock(), lanes=lanes, seed=seed, fault=fault)
        opened.append(SimulatedAccelerator(budget_bytes, simulated, seed=seed))
        return opened[-1]

    monkeypatch.setattr(planning, "device_is_host_memory", lambda config: False)
    monkeypatch.setattr(build, "open_device_tier", open_device_tier)
    monkeypatch.setattr(HostArena, "page_lock", lambda arena: None)
    return opened


class WatchedOps(TorchDispatchMode):
    """Tells an accelerator of every op: what it uses, and what it makes."""

    def __init__(self, tier: SimulatedAccelerator) -> None:
        super().__init__()
        self.num_ops = 0
        self._tier = tier

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aliases = [argument.alias_info for argument in func._schema.arguments]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return func(*args, **kwargs)  # a view: nothing runs on a device
        self.num_ops += 1
        with torch._C.DisableTorchFunctionSubclass():
            for tensor in _plain_tensors((args, kwargs)):
                self._tier.use(tensor)
            made = func(*args, **kwargs)
            for tensor in _plain_tensors(made):
                self._tier.make(tensor)
            return made


def _plain_tensors(tree: Any) -> list[torch.Tensor]:
    leaves = [each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)]
    return [each for each in leaves if not isinstance(each, DepartedGradient)]


def make_model() -> nn.Module:
    """A seeded stack with an embedding; every layer has the same shapes."""
    torch.manual_seed(0)
    blocks = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU())]
    return nn.Sequential(nn.Embedding(64, 64), *blocks, nn.Linear(64, 64))


def make_config(
    path: Path, placement: dict[str, str], compute: str, accumulation: int, **sections: Any
) -> dict[str, Any]:
    """Budgets that hold `make_model` on the device only if something is placed there."""
    return {
        "tiers": {
            "device": {
                "kind": "cpu",
                "memory": "1MiB" if "device" in placement.values() else "200KiB",
            },
            "host": {"memory": "8MiB"},
            "nvme": {"paths": [str(path)]},
        },
        "placement": placement,
        "precision": {"compute": compute},
        "partition": {"bucket_elements": 8192},
        "training": {"gradient_accumulation_steps": accumulation, "max_grad_norm": 1.0},
        "optimizer": {"lr": 1e-2},
        **sections,
    }


def make_ids() -> torch.Tensor:
    """Token numbers, (4, 16)."""
    return torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1))


def loss_of(engine: Any, ids: torch.Tensor) -> torch.Tensor:
    """The cross entropy of predicting the ids themselves."""
    logits = engine(ids).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


def train(
    path: Path,
    placement: dict[str, str],
    compute: str,
    accumulation: int,
    *,
    thaw: bool = False,
    model: nn.Module | None = None,
    **sections: Any,
) -> Any:
    """Losses, full state and report after `STEPS` steps; `thaw` unfreezes it layer by layer."""
    config = make_config(path, placement, compute, accumulation, **sections)
    ids = make_ids()
    losses = []
    model = make_model() if model is None else model
    if thaw:
        model[:-1].requires_grad_(False)  # type: ignore[index]
    with offload.initialize(model, config) as engine:
        for micro_step in range(STEPS * accumulation):
            if thaw and micro_step % accumulation == 0:
                unfrozen = model[-1 - 4 * (micro_step // accumulation) :]  # type: ignore[index]
                unfrozen.requires_grad_(True)
            loss = loss_of(engine, ids[micro_step % 4 :])
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses, dict(engine.named_state()), engine.report()


def assert_same(found: Any, expected: Any) -> None:
    """Losses and every tensor of two trainings are the same bits."""
    assert found[0] == expected[0]
    for name, tensors in expected[1].items():
        for field, tensor in tensors.items():
            assert torch.equal(found[1][name][field], tensor), (name, field)
