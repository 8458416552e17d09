"""A parameter's value as compute weight and master half.

[Note: split master]

    value (fp32)  =  weight (bf16: the high half)  +  remainder (int16: the rest), as integers

    weight    = (bits(value) + 0x8000) >> 16        round half up on the bit pattern
    remainder = the low 16 bits of value, read as signed = bits(value) - (weight << 16)

Merging gives back all 2^32 patterns. Half to even would not do: a tie rounded down leaves +0x8000,
which no int16 holds. A finite value from 0x7f7f8000 (3.396e38) on has a weight of infinity, and
some NaNs one of zero, so the value is tested and not the weight: `split_master` tells whether every
weight is finite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from offload.optim import kernels
from offload.optim.compilation import compiled

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

Precision = Literal["fp32", "bf16", "fp16"]

FIRST_UNHOLDABLE: dict[Precision, int] = {
    "fp32": 0x7F80_0000,  # infinity
    "bf16": 0x7F7F_8000,  # rounds half up to infinity
    "fp16": 0x477F_F000,  # 65520: rounds half to even to infinity
}
"""Smallest magnitude, as fp32 bits, of which a weight of that precision is not finite."""


def split_master(
    values: NDArray[np.float32], weight: NDArray[np.uint16], remainder: NDArray[np.int16]
) -> bool:
    """Write fp32 `values` as bf16 `weight` bits and `remainder`; all 1-D of one length.

    Returns:
        Whether every weight is finite.
    """
    kernel = compiled(kernels.split, "float32", "uint16", "int16")
    return int(kernel(values, weight, remainder)) < FIRST_UNHOLDABLE["bf16"]


def merge_master(
    weight: NDArray[np.uint16], remainder: NDArray[np.int16], values: NDArray[np.float32]
) -> None:
    """Write the fp32 `values` of bf16 `weight` bits and `remainder`; all 1-D of one length."""
    compiled(kernels.merge, "uint16", "int16", "float32")(weight, remainder, values)


def split_tensor(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (bf16 weight, int16 remainder) of an fp32 tensor, on its device and in its shape."""
    import torch

    bits = values.contiguous().view(torch.int32)
    high = (bits.to(torch.int64) + 0x8000) >> 16  # in 64 bits: near the top the sum overflows 32
    return high.to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def merge_tensor(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """Return the fp32 tensor of a bf16 weight and its int16 remainder."""
    import torch

    high = weight.contiguous().view(torch.int16).to(torch.int32) << 16
    return (high + remainder).view(torch.float32)
