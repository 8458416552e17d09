"""What saving and loading need of an engine.

[Note: state] A parameter's training state is a set of full tensors, each addressed by (canonical
parameter name, field): "weight" in the compute dtype, "master" (fp32) or "remainder" (int16, the
low half of the bf16 split), and the optimizer's fields. Where a tensor lives is the engine's
affair: nothing in this layer depends on placement, buckets or budgets, so what was saved under one
placement loads under any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from offload.config import OffloadConfig


class LossScaleState(Protocol):
    """The fp16 loss scale as plain values."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class StateSource(Protocol):
    """The part of the engine that this layer uses; tensors are full, on the CPU, one at a time."""

    global_steps: int
    skipped_steps: int
    micro_steps: int
    lr_scheduler: LRScheduler | None

    @property
    def module(self) -> nn.Module: ...

    @property
    def config(self) -> OffloadConfig: ...

    @property
    def loss_scale(self) -> LossScaleState | None: ...

    def parameter_names(self) -> list[str]:
        """Canonical names in registration order, ties once."""

    def aliases(self) -> dict[str, str]:
        """Tied name -> canonical name."""

    def composite_names(self) -> list[str]:
        """Parameters of the module that are several of `parameter_names`: quantized weights."""

    def state_fields(self, name: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every field of one parameter."""

    def read_state(self, name: str, field: str) -> torch.Tensor:
        """A copy of one field."""

    def write_state(self, name: str, field: str, tensor: torch.Tensor) -> None:
        """Replace one field."""

    def replacing_state(self) -> AbstractContextManager[None]:
        """For a block that writes every field: the old state is void, and so is a pending step."""

    def parameter_steps(self) -> list[int]:
        """Updates that each parameter has had, in the order of `parameter_names`."""

    def set_parameter_steps(self, steps: list[int]) -> None: ...

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups without parameters: plain values."""

    def optimizer_members(self) -> list[list[str]]:
        """The canonical names of each group's parameters."""

    def load_optimizer_groups(self, groups: list[dict[str, Any]]) -> None: ...

    def scalar_state(self) -> dict[str, Any]:
        """What else the optimizer keeps that is no tensor: plain values."""

    def load_scalar_state(self, state: dict[str, Any]) -> None: ...

    def update_choice(self) -> dict[str, Any]:
        """Where the optimizer updates: plain values."""

    def keep_update_choice(self, saved: dict[str, Any] | None) -> None: ...


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every buffer that a state dict would hold, once, by qualified name."""
    seen: set[int] = set()
    for prefix, owner in module.named_modules():
        transient = owner._non_persistent_buffers_set
        for name, buffer in owner._buffers.items():
            if buffer is None or name in transient or id(buffer) in seen:
                continue
            seen.add(id(buffer))
            yield (f"{prefix}.{name}" if prefix else name), buffer
