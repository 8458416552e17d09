"""An all-in-memory stand-in for the engine: the part of it that saving and loading use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from offload.config import load_config
from offload.partition.snapshot import BlockKey, MappedTensor, Piece, Version


class InMemoryEngine:
    """`StateSource` over a module in memory: fp32 masters, AdamW-like moments, a real scheduler."""

    def __init__(
        self, module: nn.Module, *, scheduled: bool = False, config: dict[str, Any] | None = None
    ) -> None:
        self.module = module
        self.config = load_config({"precision": {"compute": "fp32"}} | (config or {}))
        self.global_steps = self.skipped_steps = self.micro_steps = 0
        self.loss_scale = None
        parameters = dict(module.named_parameters())
        self._parameters = parameters
        self._aliases = {
            name: next(n for n, p in parameters.items() if p is tied)
            for name, tied in module.named_parameters(remove_duplicate=False)
            if name not in parameters
        }
        trainable = [p for p in parameters.values() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trainable, lr=1e-2, foreach=False)
        self.lr_scheduler = (
            torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: 1 / (1 + step))
            if scheduled
            else None
        )
        for parameter in trainable:
            self._optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def train(self, loss_of: Callable[[nn.Module], torch.Tensor]) -> float:
        loss = loss_of(self.module)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.global_steps += 1
        self.micro_steps += 1
        return loss.item()

    def parameter_names(self) -> list[str]:
        return list(self._parameters)

    def composite_names(self) -> list[str]:
        return []

    def aliases(self) -> dict[str, str]:
        return dict(self._aliases)

    def state_fields(self, name: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        parameter = self._parameters[name]
        fields = {"weight": (parameter.dtype, tuple(parameter.shape))}
        for field in ("exp_avg", "exp_avg_sq") if parameter.requires_grad else ():
            fields[field] = (parameter.dtype, tuple(parameter.shape))
        return fields

    def _tensor(self, name: str, field: str) -> torch.Tensor:
        parameter = self._parameters[name]
        return parameter.detach() if field == "weight" else self._optimizer.state[parameter][field]

    def read_state(self, name: str, field: str) -> torch.Tensor:
        return self._tensor(name, field).clone()

    def write_state(self, name: str, field: str, tensor: torch.Tensor) -> None:
        self._tensor(name, field).copy_(tensor)

    def replacing_state(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def parameter_steps(self) -> list[int]:
        state = self._optimizer.state
        return [int(state[p]["step"]) if p in state else 0 for p in self._parameters.values()]

    def snapshot(self) -> InMemorySnapshot:
        return InMemorySnapshot(self)

    def stored_tensors(self) -> list[MappedTensor]:
        return []  # every tensor goes by itself

    def block_nbytes(self, key: BlockKey) -> int:
        raise AssertionError("it has none")

    def end_replacing(self) -> None:
        pass

    def write_gradient(self, name: str, tensor: torch.Tensor, sums: torch.Tensor) -> None:
        raise AssertionError("it saves none")

    def set_parameter_steps(self, steps: list[int]) -> None:
        for parameter, step in zip(self._parameters.values(), steps, strict=True):
            if parameter.requires_grad:
                self._optimizer.state[parameter]["step"].fill_(step)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in group.items() if k != "params"}
            for group in self._optimizer.param_groups
        ]

    def optimizer_members(self) -> list[list[str]]:
        names = {id(p): name for name, p in self._parameters.items()}
        groups = self._optimizer.param_groups
        return [[names[id(p)] for p in group["params"]] for group in groups]

    def load_optimizer_groups(self, groups: list[dict[str, Any]]) -> None:
        for group, loaded in zip(self._optimizer.param_groups, groups, strict=True):
            group.update(loaded)

    def scalar_state(self) -> dict[str, Any]:
        return {}

    def load_scalar_state(self, state: dict[str, Any]) -> None:
        assert state == {}

    def update_choice(self) -> dict[str, Any]:
        return {"share": 0.0, "on_device": []}

    def keep_update_choice(self, saved: dict[str, Any] | None) -> None:
        assert saved in (None, {"share": 0.0, "on_device": []})


class InMemorySnapshot:
    """A copy of everything: one block a tensor."""

    has_checksums = True
    exposed: tuple[BlockKey, ...] = ()

    def __init__(self, engine: InMemoryEngine) -> None:
        self.copies: dict[tuple[str, str, str], torch.Tensor] = {}
        self.tensors: list[MappedTensor] = []
        self._blocks: dict[BlockKey, torch.Tensor] = {}
        self._late = {"parameter_steps": engine.parameter_steps(), "optimizer_scalars": {}}
        for index, name in enumerate(engine.parameter_names()):
            for field, (dtype, shape) in engine.state_fields(name).items():
                key = BlockKey(index, field, 0)
                data = engine.read_state(name, field).contiguous().reshape(-1).view(torch.uint8)
                self._blocks[key] = torch.zeros(-(-data.numel() // 4096) * 4096, dtype=torch.uint8)
                self._blocks[key][: data.numel()] = data
                pieces = (Piece(key, 0, data.numel()),)
                self.tensors.append(
                    MappedTensor("parameter", name, field, dtype, shape, None, pieces)
                )

    @property
    def blocks(self) -> list[BlockKey]:
        return list(self._blocks)

    def nbytes(self, key: BlockKey) -> int:
        return self._blocks[key].numel()

    def device_of(self, key: BlockKey) -> None:
        return None

    def reserve_beside_pins(self, device: int, num_versions: int) -> None:
        pass

    def unpinning(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def capture(self, key: BlockKey) -> Version:
        return Version(self.nbytes(key), None, self._blocks[key], lambda: None)

    def late_values(self) -> dict[str, Any]:
        return self._late

    def check_unedited(self) -> None:
        pass

    def end_capture(self) -> None:
        pass


class SmallNet(nn.Module):
    """Ties, a frozen weight, buffers of both kinds, dropout, odd sizes and a scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.norm = nn.BatchNorm1d(7)
        self.drop = nn.Dropout(0.3)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("offsets", torch.arange(5), persistent=True)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(self.frozen(self.norm(self.embed(tokens))))
        return self.head(hidden) * self.scale


def small_net_loss(module: nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, 13, (11,))
    return nn.functional.cross_entropy(module(tokens), tokens.roll(1))


@pytest.fixture
def in_memory_engine() -> type[InMemoryEngine]:
    return InMemoryEngine


@pytest.fixture
def small_engine() -> Callable[..., InMemoryEngine]:
    def build(seed: int = 0, **options: Any) -> InMemoryEngine:
        torch.manual_seed(seed)
        return InMemoryEngine(SmallNet(), **options)

    return build


@pytest.fixture
def small_loss() -> Callable[[nn.Module], torch.Tensor]:
    return small_net_loss
