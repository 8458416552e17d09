"""Update rules that run in one pass over gradient, weight, master and moments.

[Note: update rule]

A rule's arithmetic is that of the `torch.optim` class of the same name with ``foreach=False,
fused=False`` on fp32 masters: the same operations in the same order. State starts as zeros.
A rule holds no state: it is told the parameter's step count and group, so that it may be called on
any part of a parameter, in any order and from several threads. A rule with 8-bit moments
(`eight_bit_rule`) does the same between decoding and encoding them; its parts begin with a block.

Anything else than these rules goes the way of `generic`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from offload.errors import ConfigError
from offload.optim import kernels
from offload.optim.compilation import Kernel, compiled
from offload.optim.gradients import kernel_view
from offload.optim.split import FIRST_UNHOLDABLE
from offload.partition.layout import FieldSpec

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from offload.optim.split import Precision

Hyper = Mapping[str, Any]
"""A parameter group's settings: floats, tuples of floats and bools, under torch's names."""

_MASTER_DTYPES: dict[Precision, str | None] = {"fp32": None, "bf16": "int16", "fp16": "float32"}
_WEIGHT_DTYPES: dict[Precision, str] = {"fp32": "float32", "bf16": "uint16", "fp16": "int16"}


_STATE_DTYPES = {"fp32": "float32", "int8": "int8", "uint8": "uint8"}


def _fp32(*names: str) -> tuple[FieldSpec, ...]:
    return tuple(FieldSpec(name, "fp32", 4) for name in names)


def _signed(name: str) -> tuple[FieldSpec, ...]:
    return FieldSpec(name, "int8", 1), _scale(name)


def _unsigned(name: str) -> tuple[FieldSpec, ...]:
    return FieldSpec(name, "uint8", 1), _scale(name)


def _scale(name: str) -> FieldSpec:
    return FieldSpec(scale_field(name), "fp32", 4, kernels.MOMENT_BLOCK)


def scale_field(name: str) -> str:
    """The field that holds the scales of an 8-bit moment."""
    return f"{name}_scale"


class UpdateRule(ABC):
    """One update rule; `state_specs` are its state arrays, under torch's names."""

    name: ClassVar[str]
    hyper_defaults: ClassVar[dict[str, Any]]
    num_scalars: ClassVar[int]
    state_specs: ClassVar[tuple[FieldSpec, ...]]
    _loop: Kernel

    @property
    def state_fields(self) -> tuple[str, ...]:
        """Names of the state arrays."""
        return tuple(spec.name for spec in self.state_specs)

    @abstractmethod
    def scalars(self, hyper: Hyper, step: int) -> tuple[float, ...]:
        """Return the kernel's scalars after the gradient scale, from a full group and step."""

    def compile(self, precision: Precision, *, gradient_fp32: bool) -> Kernel:
        """Compile this rule's kernel, or load it from the disk cache; later calls return at once.

        Args:
            precision: Format of the weights; see [Note: number formats] in `kernels`.
            gradient_fp32: Whether gradients are fp32, and not in the weights' format.
        """
        weight = _WEIGHT_DTYPES[precision]
        return compiled(
            self._loop,
            weight,
            _MASTER_DTYPES[precision],
            "float32" if gradient_fp32 else weight,
            *(_STATE_DTYPES[spec.dtype] for spec in self.state_specs),
            self.num_scalars,
        )

    def update(
        self,
        *,
        precision: Precision,
        weight: NDArray[Any],
        master: NDArray[Any] | None,
        gradient: NDArray[Any],
        state: Mapping[str, NDArray[Any]],
        hyper: Hyper,
        step: int,
        gradient_scale: float = 1.0,
    ) -> bool:
        """Apply one update in place; all arrays are 1-D, contiguous and of the same elements.

        The bits written for an element do not depend on where the arrays begin or end; where a
        state array has values for several elements, arrays begin with such a value, and end with
        one or where the parameter does.

        Args:
            precision: Format of the weight.
            weight: float32, or uint16 bits of bf16 or fp16.
            master: None (fp32), int16 remainder (bf16) or float32 values (fp16).
            gradient: float32, or uint16 bits in the weight's format.
            state: An array for each of `state_specs`.
            hyper: The parameter's group; what is absent is as in `hyper_defaults`.
            step: How many updates the parameter has had, with this one.
            gradient_scale: The gradient is multiplied by this first.

        Returns:
            Whether all updated weights are finite. If not, the arrays have been written.
        """
        kernel = self.compile(precision, gradient_fp32=gradient.dtype == np.float32)
        scalars = (gradient_scale, *self.scalars({**self.hyper_defaults, **hyper}, step))
        assert len(scalars) == self.num_scalars
        largest = kernel(
            kernel_view(weight, precision),
            master,
            gradient if gradient.dtype == np.float32 else kernel_view(gradient, precision),
            *(state[field] for field in self.state_fields),
            tuple(np.float32(scalar) for scalar in scalars),
        )
        return int(largest) < FIRST_UNHOLDABLE[precision]


class AdamRule(UpdateRule):
    """`torch.optim.Adam`: weight decay is added to the gradient, unless the group decouples it."""

    name = "adam"
    hyper_defaults: ClassVar[dict[str, Any]] = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "decoupled_weight_decay": False,
    }
    num_scalars = 9
    state_specs: ClassVar[tuple[FieldSpec, ...]] = _fp32("exp_avg", "exp_avg_sq")
    _loop: Kernel = staticmethod(kernels.adam)

    def scalars(self, hyper: Hyper, step: int) -> tuple[float, ...]:
        lr, eps, weight_decay = (float(hyper[key]) for key in ("lr", "eps", "weight_decay"))
        beta1, beta2 = (float(beta) for beta in hyper["betas"])
        decoupled = hyper["decoupled_weight_decay"]
        return (
            1 - lr * weight_decay if decoupled else 1.0,
            0.0 if decoupled else weight_decay,
            1 - beta1,
            beta2,
            1 - beta2,
            lr / (1 - beta1**step),
            math.sqrt(1 - beta2**step),
            eps,
        )


class AdamWRule(AdamRule):
    """`torch.optim.AdamW`: weight decay shrinks the weight itself."""

    name = "adamw"
    hyper_defaults: ClassVar[dict[str, Any]] = {
        **AdamRule.hyper_defaults,
        "weight_decay": 1e-2,
        "decoupled_weight_decay": True,
    }


class SGDRule(UpdateRule):
    """`torch.optim.SGD`; there is a momentum buffer if any group has momentum."""

    name = "sgd"
    hyper_defaults: ClassVar[dict[str, Any]] = {
        "lr": 1e-3,
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": False,
    }
    num_scalars = 3
    state_specs: ClassVar[tuple[FieldSpec, ...]] = ()
    _loop: Kernel = staticmethod(kernels.sgd)

    def scalars(self, hyper: Hyper, step: int) -> tuple[float, ...]:
        del step
        return float(hyper["weight_decay"]), float(hyper["lr"])


class MomentumSGDRule(SGDRule):
    """`torch.optim.SGD` with a momentum buffer; a parameter's first step copies the gradient."""

    num_scalars = 7
    state_specs: ClassVar[tuple[FieldSpec, ...]] = _fp32("momentum_buffer")
    _loop: Kernel = staticmethod(kernels.sgd_momentum)

    def scalars(self, hyper: Hyper, step: int) -> tuple[float, ...]:
        momentum = float(hyper["momentum"])
        shared = super().scalars(hyper, step)
        if momentum == 0:  # this group has none: its buffers stay zero
            return *shared, 0.0, 0.0, 1.0, 0.0
        direction = (1.0, momentum) if hyper["nesterov"] else (0.0, 1.0)
        rate = 1.0 if step == 1 else 1 - float(hyper["dampening"])
        return *shared, momentum, rate, *direction


class AdagradRule(UpdateRule):
    """`torch.optim.Adagrad`; the initial accumulator value is added at a parameter's first step."""

    name = "adagrad"
    hyper_defaults: ClassVar[dict[str, Any]] = {
        "lr": 1e-2,
        "lr_decay": 0.0,
        "weight_decay": 0.0,
        "initial_accumulator_value": 0.0,
        "eps": 1e-10,
    }
    num_scalars = 5
    state_specs: ClassVar[tuple[FieldSpec, ...]] = _fp32("sum")
    _loop: Kernel = staticmethod(kernels.adagrad)

    def scalars(self, hyper: Hyper, step: int) -> tuple[float, ...]:
        lr = float(hyper["lr"]) / (1 + (step - 1) * float(hyper["lr_decay"]))
        start = float(hyper["initial_accumulator_value"]) if step == 1 else 0.0
        return float(hyper["weight_decay"]), lr, float(hyper["eps"]), start


class LionRule(UpdateRule):
    """Lion (Chen et al. 2302.06675); it has no class in torch."""

    name = "lion"
    hyper_defaults: ClassVar[dict[str, Any]] = {
        "lr": 1e-4,
        "betas": (0.9, 0.99),
        "weight_decay": 0.0,
    }
    num_scalars = 7
    state_specs: ClassVar[tuple[FieldSpec, ...]] = _fp32("exp_avg")
    _loop: Kernel = staticmethod(kernels.lion)

    def scalars(self, hyper: Hyper, step: int) -> tuple[float, ...]:
        del step
        lr = float(hyper["lr"])
        beta1, beta2 = (float(beta) for beta in hyper["betas"])
        return 1 - lr * float(hyper["weight_decay"]), beta1, 1 - beta1, beta2, 1 - beta2, lr


class EightBitAdamRule(AdamRule):
    """`AdamRule` with 8-bit moments."""

    state_specs = (*_signed("exp_avg"), *_unsigned("exp_avg_sq"))
    _loop: Kernel = staticmethod(kernels.adam_8bit)


class EightBitAdamWRule(AdamWRule):
    """`AdamWRule` with 8-bit moments."""

    state_specs = EightBitAdamRule.state_specs
    _loop: Kernel = staticmethod(kernels.adam_8bit)


class EightBitMomentumSGDRule(MomentumSGDRule):
    """`MomentumSGDRule` with an 8-bit momentum buffer."""

    state_specs = _signed("momentum_buffer")
    _loop: Kernel = staticmethod(kernels.sgd_momentum_8bit)


class EightBitLionRule(LionRule):
    """`LionRule` with an 8-bit average."""

    state_specs = _signed("exp_avg")
    _loop: Kernel = staticmethod(kernels.lion_8bit)


_EIGHT_BIT: dict[type[UpdateRule], type[UpdateRule]] = {
    AdamRule: EightBitAdamRule,
    AdamWRule: EightBitAdamWRule,
    MomentumSGDRule: EightBitMomentumSGDRule,
    LionRule: EightBitLionRule,
}

RULES: dict[str, type[UpdateRule]] = {
    rule.name: rule for rule in (AdamWRule, AdamRule, SGDRule, AdagradRule, LionRule)
}
"""Rule classes by the name in `[optimizer] name`."""


# What torch's optimizers can do and no rule does.
_FLAGS = ("amsgrad", "maximize", "differentiable", "capturable")


def make_rule(name: str, groups: Sequence[Hyper] = ()) -> UpdateRule:
    """Return the rule of that name.

    Args:
        name: A key of `RULES`.
        groups: The parameter groups; SGD looks whether any has momentum.

    Raises:
        ConfigError: There is no such rule.
    """
    if name not in RULES:
        problem = f"optimizer.name = {name!r}: expected one of {', '.join(sorted(RULES))}"
        raise ConfigError(problems=[problem])
    if name == "sgd" and any(float(group.get("momentum", 0.0)) != 0 for group in groups):
        return MomentumSGDRule()
    return RULES[name]()


def eight_bit_rule(rule: object) -> UpdateRule:
    """The rule that does the same with 8-bit moments.

    Adagrad has none: its sum only grows, and stands still once what is added is less than half a
    step of its code.

    Raises:
        ConfigError: This rule has none, or keeps no moments.
    """
    for plain, eight_bit in _EIGHT_BIT.items():
        if type(rule) is plain:
            return eight_bit()
    problem = (
        "optimizer.moments = '8bit' needs adamw, adam, lion, or sgd with momentum, and the "
        f"optimizer is {getattr(rule, 'name', rule)}: choose one of them, or moments = 'fp32'"
    )
    raise ConfigError(problems=[problem])


def from_torch(optimizer: torch.optim.Optimizer) -> UpdateRule | None:
    """Return the rule that equals this optimizer, or None: then it takes the generic path.

    Exactly the classes AdamW, Adam, SGD and Adagrad of torch.optim have one, without amsgrad,
    maximize, differentiable and capturable; foreach and fused make no difference.
    """
    import torch

    names = {
        torch.optim.AdamW: "adamw",
        torch.optim.Adam: "adam",
        torch.optim.SGD: "sgd",
        torch.optim.Adagrad: "adagrad",
    }
    name = names.get(type(optimizer))
    if name is None or any(group.get(f) for group in optimizer.param_groups for f in _FLAGS):
        return None
    return make_rule(name, optimizer.param_groups)


def refused_setting(rule: object, group: Hyper) -> str | None:
    """Name a setting of a group that this rule does not have, or return None.

    Anything that is no `UpdateRule` decides for itself.
    """
    if not isinstance(rule, UpdateRule):
        return None
    if isinstance(rule, SGDRule) and not rule.state_fields and group.get("momentum"):
        return f"momentum = {group['momentum']}"
    return next((f"{flag} = {group[flag]}" for flag in _FLAGS if group.get(flag)), None)
