"""Arrays as the kernels take them."""

from __future__ import annotations

import numpy as np
import torch


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """A 1-D array that shares the tensor's memory; 16-bit floats as uint16."""
    flat = tensor.detach().reshape(-1)
    if flat.dtype in {torch.bfloat16, torch.float16}:
        return flat.view(torch.int16).numpy().view(np.uint16)
    return flat.numpy()


def bits_of(array: np.ndarray) -> np.ndarray:
    return array.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[array.itemsize])


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and bool(np.array_equal(bits_of(one), bits_of(other)))
