"""The gradient norm and the clip coefficient of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable

_TORCH_NORM_EPS = 1e-6  # of torch.nn.utils.clip_grad_norm_


def square_sum(block_sums: Iterable[float]) -> float:
    """Return a parameter's sum of squares from its block sums.

    The sum is the exact one, rounded once, so that the order of the blocks does not matter.
    """
    return math.fsum(block_sums)


def global_norm(square_sums: Iterable[float], *, loss_scale: float = 1.0) -> float:
    """Return the L2 norm of all gradients from the parameters' sums of squares.

    Infinite or NaN if and only if an element of a gradient is.

    Args:
        square_sums: `square_sum` of each parameter that has a gradient.
        loss_scale: What the gradients were multiplied by; the norm is that of the true ones.
    """
    return math.sqrt(math.fsum(square_sums)) / loss_scale


def clip_coefficient(norm: float, max_norm: float) -> float:
    """Return what the gradients are multiplied by so that their norm is at most `max_norm`.

    `max_norm` 0 means no clipping. Source: torch.nn.utils.clip_grad_norm_.
    """
    if max_norm == 0:
        return 1.0
    coefficient = max_norm / (norm + _TORCH_NORM_EPS)
    return 1.0 if coefficient > 1 else coefficient
