"""What autocast does to the arguments of an op that stands in for torch's own."""

from __future__ import annotations

import torch


def autocast_dtype(given: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast computes in where `given` is; None: it is off."""
    kind = given.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def autocast_to(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What autocast makes of an argument; fp64 and integers stay."""
    is_eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if is_eligible else tensor
