"""Gradient accumulation and the sums of squares of gradients.

[Note: block sums]

A sum of squares is taken in fp64 over fixed blocks of 65,536 elements, counted from the start of a
parameter, always in one order: so a parameter's blocks may be visited in any number of calls that
start at multiples of 65,536, and the bits of the norm do not change. A block's sum is not finite
if and only if an element is not (fp64 holds the sum of 65,536 squares of any fp32).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from offload.optim import kernels
from offload.optim.compilation import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from offload.optim.split import Precision

BLOCK_NUMEL = kernels.BLOCK_NUMEL

_KERNEL_DTYPES: dict[Precision, str] = {"fp32": "float32", "bf16": "uint16", "fp16": "int16"}


def num_blocks(numel: int) -> int:
    """Return the number of block sums of `numel` elements."""
    return -(-numel // BLOCK_NUMEL)


def kernel_view(array: NDArray[Any], dtype: Precision) -> NDArray[Any]:
    """Return the array as the kernels take it: fp16 bits (uint16) as int16, others unchanged."""
    expected = np.float32 if dtype == "fp32" else np.uint16
    assert array.dtype == expected, f"{dtype} is passed as {expected.__name__}, not {array.dtype}"
    return array.view(np.int16) if dtype == "fp16" else array


def accumulate_gradient(
    target: NDArray[Any],
    source: NDArray[Any],
    *,
    first: bool,
    target_dtype: Precision,
    source_dtype: Precision,
    block_sums: NDArray[np.float64],
) -> None:
    """Set target = source (`first`) or target + source, and the block sums of the new target.

    The sum is taken in fp32 and rounded to the target's format to nearest, ties to even, as torch
    does.

    Args:
        target: 1-D, float32 or the bits of a 16-bit format as uint16.
        source: 1-D, of the same length; the start of both is a multiple of 65,536 elements from
            the start of the parameter.
        first: Whether the target holds nothing yet.
        target_dtype: Number format of the target.
        source_dtype: Number format of the source.
        block_sums: Receives `num_blocks(len(target))` sums of squares.
    """
    assert len(target) == len(source)
    assert len(block_sums) == num_blocks(len(target))
    kernel = compiled(
        kernels.copy_gradient if first else kernels.add_gradient,
        _KERNEL_DTYPES[target_dtype],
        _KERNEL_DTYPES[source_dtype],
        "float64",
    )
    kernel(kernel_view(target, target_dtype), kernel_view(source, source_dtype), block_sums)
