"""The update rules as torch ops, for state that is on a device which the CPU does not reach.

[Note: one rounding an op]
Each function does what the loop of the same name in `kernels` does: the same IEEE operations on
fp32, in the same order, one op for each rounding. So the bits are those of the kernel:

- no `addcmul`, `addcdiv`, `lerp` and no `alpha`: they may fuse a product with a sum;
- scalars are rounded to fp32 on the host, as for the kernel;
- a divisor that is a scalar is a tensor on the device: CUDA multiplies by the reciprocal of a
  scalar that comes from the host.

What a NaN carries beside being one is not part of that: devices differ in it. An update that makes
a weight NaN is an error in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from offload.optim.rules import (
    AdagradRule,
    AdamRule,
    AdamWRule,
    Hyper,
    LionRule,
    MomentumSGDRule,
    SGDRule,
    UpdateRule,
)

if TYPE_CHECKING:
    from offload.optim.split import Precision

NUM_ROWS = 4
_MAGNITUDE = 0x7FFF_FFFF

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Rows:
    """Where a piece is computed: fp32, 1-D, on the device, all of one length.

    `value` holds what a bf16 weight and its remainder stand for, `gradient` the gradient, `spare`
    and `other` whatever is between two operations. `divisor` is one fp32 element.
    """

    value: torch.Tensor
    gradient: torch.Tensor
    spare: torch.Tensor
    other: torch.Tensor
    divisor: torch.Tensor

    @staticmethod
    def over(memory: torch.Tensor, numel: int) -> Rows:
        """Rows of `numel` elements over uint8 memory of at least `rows_bytes(numel)`."""
        floats = memory[: rows_bytes(numel)].view(torch.float32)
        value, gradient, spare, other = floats[: NUM_ROWS * numel].view(NUM_ROWS, numel)
        return Rows(value, gradient, spare, other, floats[-1:])

    def first(self, numel: int) -> Rows:
        """The first `numel` elements of each row."""
        value, gradient = self.value[:numel], self.gradient[:numel]
        return Rows(value, gradient, self.spare[:numel], self.other[:numel], self.divisor)


def rows_bytes(numel: int) -> int:
    """Bytes of `Rows` for pieces of `numel` elements."""
    return (NUM_ROWS * numel + 1) * torch.float32.itemsize


class DeviceRule:
    """An `UpdateRule` as torch ops; see [Note: one rounding an op]."""

    def __init__(self, rule: UpdateRule) -> None:
        self._rule = rule
        self._steps = _STEPS[type(rule)]
        self.state_fields = rule.state_fields

    def scalars(self, hyper: Hyper, step: int, gradient_scale: float) -> tuple[float, ...]:
        """The scalars of `update`, each a value of fp32; arguments as of `UpdateRule.update`."""
        rule = self._rule
        scalars = (gradient_scale, *rule.scalars({**rule.hyper_defaults, **hyper}, step))
        return tuple(float(np.float32(scalar)) for scalar in scalars)

    def update(
        self,
        precision: Precision,
        tensors: Tensors,
        scalars: Sequence[float],
        rows: Rows,
        largest: torch.Tensor,
    ) -> None:
        """Apply one update in place to a piece; all tensors are on one device.

        Args:
            precision: format of the weights.
            tensors: 1-D, of one length: `weight`, `gradient` (fp32 or the weight's dtype), what
                completes the weight (`remainder`, int16, or `master`, fp32) and the rule's state.
            scalars: of `scalars`.
            rows: of that length.
            largest: int32, 0-dim; becomes the largest pattern written, see
                [Note: largest pattern] in `kernels`.
        """
        weight = tensors["weight"]
        rows.gradient.copy_(tensors["gradient"])
        if precision == "fp32":
            value = weight
        elif precision == "fp16":
            value = tensors["master"]
        else:
            value = rows.value
            merge(weight, tensors["remainder"], value)
        self._steps(value, [tensors[name] for name in self.state_fields], scalars, rows)
        if precision == "fp16":
            weight.copy_(value)
        elif precision == "bf16":
            split(value, weight, tensors["remainder"], rows)
        magnitudes = rows.spare.view(torch.int32)
        torch.bitwise_and(value.view(torch.int32), _MAGNITUDE, out=magnitudes)
        torch.amax(magnitudes, dim=0, out=largest)


def device_rule(rule: object) -> DeviceRule | None:
    """The rule as torch ops, or None where only the CPU has it."""
    if isinstance(rule, UpdateRule) and type(rule) in _STEPS:
        return DeviceRule(rule)
    return None


def merge(weight: torch.Tensor, remainder: torch.Tensor, value: torch.Tensor) -> None:
    """Set `value` (fp32) from a bf16 weight and its int16 remainder; see [Note: split master]."""
    bits = value.view(torch.int32)
    bits.copy_(weight.view(torch.int16))
    bits.bitwise_left_shift_(16)
    bits.add_(remainder)


def split(value: torch.Tensor, weight: torch.Tensor, remainder: torch.Tensor, rows: Rows) -> None:
    """Set a bf16 weight and its int16 remainder from `value`; spends the rest of `rows`.

    (bits + 0x8000) >> 16 without the sum, which 32 bits do not hold near the top.
    """
    bits = value.view(torch.int32)
    high, carry = rows.other.view(torch.int32), rows.spare.view(torch.int32)
    remainder.copy_(bits)
    torch.bitwise_right_shift(bits, 16, out=high)
    torch.bitwise_right_shift(bits, 15, out=carry)
    carry.bitwise_and_(1)
    high.add_(carry)
    weight.view(torch.int16).copy_(high)


# --- the rules: `value` and `state` are updated in place, rows.gradient holds the gradient --------


def _scaled_gradient(value: torch.Tensor, scale: float, l2: float, rows: Rows) -> torch.Tensor:
    """The gradient times `scale`, plus `l2` * value."""
    torch.mul(value, l2, out=rows.spare)
    return rows.gradient.mul_(scale).add_(rows.spare)


def _root(values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The square root, to nearest.

    CUDA's is (torch is built without fast math). On the CPU, where a simulated device computes,
    torch's may be that of MKL, which is not; NumPy's is.
    """
    if values.device.type == "cpu":
        with np.errstate(invalid="ignore"):  # a NaN is found where the weight is
            np.sqrt(values.numpy(), out=out.numpy())
        return out
    return torch.sqrt(values, out=out)


def _adam(
    value: torch.Tensor, state: Sequence[torch.Tensor], scalars: Sequence[float], rows: Rows
) -> None:
    scale, decay, l2, rate1, beta2, rate2, step_size, correction2_sqrt, eps = scalars
    exp_avg, exp_avg_sq = state
    g, spare = _scaled_gradient(value, scale, l2, rows), rows.spare
    value.mul_(decay)
    exp_avg.add_(torch.sub(g, exp_avg, out=spare).mul_(rate1))
    exp_avg_sq.mul_(beta2).add_(torch.mul(g, rate2, out=spare).mul_(g))
    rows.divisor.fill_(correction2_sqrt)
    _root(exp_avg_sq, spare).div_(rows.divisor).add_(eps)
    value.sub_(torch.mul(exp_avg, step_size, out=g).div_(spare))


def _sgd(
    value: torch.Tensor, state: Sequence[torch.Tensor], scalars: Sequence[float], rows: Rows
) -> None:
    del state
    scale, l2, lr = scalars
    value.sub_(_scaled_gradient(value, scale, l2, rows).mul_(lr))


def _sgd_momentum(
    value: torch.Tensor, state: Sequence[torch.Tensor], scalars: Sequence[float], rows: Rows
) -> None:
    scale, l2, lr, momentum, rate, gradient_share, buffer_share = scalars
    (buffer,) = state
    g, spare = _scaled_gradient(value, scale, l2, rows), rows.spare
    buffer.mul_(momentum).add_(torch.mul(g, rate, out=spare))
    g.mul_(gradient_share).add_(torch.mul(buffer, buffer_share, out=spare))
    value.sub_(g.mul_(lr))


def _adagrad(
    value: torch.Tensor, state: Sequence[torch.Tensor], scalars: Sequence[float], rows: Rows
) -> None:
    scale, l2, lr, eps, start = scalars
    (squares,) = state
    g, spare = _scaled_gradient(value, scale, l2, rows), rows.spare
    squares.add_(start).add_(torch.mul(g, g, out=spare))
    _root(squares, spare).add_(eps)
    value.sub_(g.mul_(lr).div_(spare))


def _lion(
    value: torch.Tensor, state: Sequence[torch.Tensor], scalars: Sequence[float], rows: Rows
) -> None:
    scale, decay, beta1, rate1, beta2, rate2, lr = scalars
    (exp_avg,) = state
    g, direction, other = rows.gradient.mul_(scale), rows.spare, rows.other
    value.mul_(decay)
    torch.mul(exp_avg, beta1, out=direction).add_(torch.mul(g, rate1, out=other))
    exp_avg.mul_(beta2).add_(g.mul_(rate2))
    # The sign, and 0 of a NaN.
    sign = torch.gt(direction, 0, out=other).sub_(torch.lt(direction, 0, out=g))
    value.sub_(sign.mul_(lr))


_Step = Callable[[torch.Tensor, Sequence[torch.Tensor], Sequence[float], Rows], None]
_STEPS: dict[type[UpdateRule], _Step] = {
    AdamRule: _adam,
    AdamWRule: _adam,
    SGDRule: _sgd,
    MomentumSGDRule: _sgd_momentum,
    AdagradRule: _adagrad,
    LionRule: _lion,
}
