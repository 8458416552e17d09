"""What saving and loading need of an engine.

[Note: state] A parameter's training state is a set of full tensors, each addressed by (canonical
parameter name, field): "weight" in the compute dtype, "master" (fp32) or "remainder" (int16, the
low half of the bf16 split), and the optimizer's fields. Where a tensor lives is the engine's
affair: nothing in this layer depends on placement, buckets or budgets, so what was saved under one
placement loads under any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from offload.config import OffloadConfig
from offload.errors import OffloadError
from offload.partition.snapshot import BlockKey, MappedTensor, Version
from offload.partition.staging import StagingLease
from offload.tiers.pins import Pin
from offload.tiers.transfer import Transfer


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

    def write_gradient(self, name: str, tensor: torch.Tensor, sums: torch.Tensor) -> None:
        """Put back a gradient that no step has used."""

    def snapshot(self) -> SnapshotSource:
        """The training state as it is now, while training goes on."""

    def stored_tensors(self) -> Sequence[MappedTensor]:
        """Which bytes of which blocks the stored tensors are; what is not in blocks is left out."""

    def block_nbytes(self, key: BlockKey) -> int:
        """Bytes of a block."""

    def start_replacing(self, key: BlockKey, *, wait: bool) -> Replacement | None:
        """Memory for a block that is replaced as a whole; None: there is none without waiting."""

    def end_replacing(self) -> None:
        """Every block has been replaced."""

    def replacing_state(self) -> AbstractContextManager[None]:
        """For a block that writes every field: the old state is void, and so is a pending step."""

    def set_parameter_steps(self, steps: list[int]) -> None:
        """How many updates each parameter has had, in the order of `parameter_names`."""

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


class Replacement(Protocol):
    """Memory for what a block will say; to be filled, and then committed or cancelled."""

    @property
    def tensor(self) -> torch.Tensor:
        """uint8, 1-D."""

    def commit(self) -> None:
        """The block says this from here on."""

    def cancel(self) -> None:
        """Nothing counts."""


class SnapshotSource(Protocol):
    """Training state at one moment; see [Note: Snapshot]. `exposed` is captured first."""

    @property
    def tensors(self) -> Sequence[MappedTensor]: ...

    @property
    def copies(self) -> Mapping[tuple[str, str, str], torch.Tensor]: ...

    @property
    def exposed(self) -> Sequence[BlockKey]: ...

    @property
    def blocks(self) -> Sequence[BlockKey]: ...

    @property
    def has_checksums(self) -> bool:
        """Whether pinned versions have them."""

    def nbytes(self, key: BlockKey) -> int:
        """Bytes of a block."""

    def device_of(self, key: BlockKey) -> int | None:
        """The number of the disk with a file that has the block, and can be linked."""

    def reserve_beside_pins(self, device: int, num_versions: int) -> None:
        """Allocate what is written while so many versions on that disk are pinned."""

    def unpinning(self) -> AbstractContextManager[None]:
        """For a block that ends soon and lets go of versions."""

    def capture(self, key: BlockKey) -> Version | None:
        """What a block says; memory of a home is good until `end_capture`. None: ask again."""

    def late_values(self) -> Mapping[str, object]:
        """Plain values that are known when every block has been captured."""

    def check_unedited(self) -> None:
        """Raise CheckpointError if somebody has changed what was to be captured."""

    def end_capture(self) -> None:
        """Memory of homes is not needed any more."""

    def start_read(self, pin: Pin, tensor: torch.Tensor) -> Transfer:
        """Read a pinned version into host memory: uint8, 1-D."""

    def try_lease(self, nbytes: int) -> StagingLease | None:
        """Host memory that is within the budget; None: there is none at present."""

    def no_lease(self, nbytes: int) -> OffloadError:
        """The error that says so."""


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
