"""The engine's optimizer as PyTorch knows one: groups, schedulers, the plain idiom."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from offload.errors import EngineStateError
from offload.optim.rules import RULES
from offload.optim.zeroth_order import ZerothOrderRule

if TYPE_CHECKING:
    from offload.config import OptimizerSection

_NO_GUARD = torch._C.DisableTorchFunctionSubclass
Closure = Callable[[], Any]
# Whether a step was taken, and the loss.
TakeClosure = Callable[[Closure | None, Callable[[float], float] | None], tuple[bool, float]]


class OffloadOptimizer(torch.optim.Optimizer):
    """Parameter groups and `step()` of an engine; the state itself lives on its tiers.

    `loss.backward(); engine.optimizer.step(); engine.optimizer.zero_grad()` works as with any torch
    optimizer. `state` is empty: see `OffloadEngine.named_state`.

    Attributes:
        step_was_skipped: the last step changed nothing, because a gradient was not finite.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        *,
        take_step: Callable[[], bool],
        forget_gradients: Callable[[], None],
        take_closure: TakeClosure | None = None,
    ) -> None:
        self._take_step = take_step
        self._take_closure = take_closure
        self._forget_gradients = forget_gradients
        self.step_was_skipped = False
        with _NO_GUARD():
            super().__init__([dict(group) for group in groups], {})

    def step(
        self, closure: Closure | None = None, *, reduce: Callable[[float], float] | None = None
    ) -> Any:
        """Take a step with the gradients that have arrived; they stay until `zero_grad`.

        Args:
            closure: evaluated first, with gradients enabled; its result is returned. In
                forward-only training it is needed, evaluated twice without gradients, and the
                mean of the two losses is returned.
            reduce: see `Engine.step`; forward-only training only.

        Raises:
            StorageError: state could not be read or written; call again to complete the step.
            EngineStateError: forward-only training without a closure.
        """
        if self._take_closure is not None:
            taken, mean_loss = self._take_closure(closure, reduce)
            self.step_was_skipped = not taken
            return mean_loss
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.step_was_skipped = not self._take_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients. They have no tensors to keep, so `set_to_none` must be True.

        Raises:
            EngineStateError: `set_to_none` is False.
        """
        if not set_to_none:
            raise EngineStateError(
                "zero_grad(set_to_none=False): offloaded gradients are not kept as zeros",
                remedy="call zero_grad()",
            )
        self._forget_gradients()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group while the optimizer is being made; afterwards this is an error.

        Raises:
            EngineStateError: the state of the new parameters has no place in the plan.
        """
        if getattr(self, "_complete", False):
            raise EngineStateError(
                "add_param_group: the plan has no place for the state of new parameters",
                remedy="make a new engine, or use [[optimizer.groups]]",
            )
        super().add_param_group(param_group)

    def seal(self) -> None:
        """From here on the groups keep their parameters."""
        self._complete = True


def configured_groups(
    section: OptimizerSection, parameters: Sequence[tuple[Sequence[str], nn.Parameter]]
) -> list[dict[str, Any]]:
    """The parameter groups that `[optimizer]` and its groups describe, with all their settings.

    The first group whose pattern matches any name of a parameter takes it; the rest form the
    default group. A group that matches nothing is left out with a warning: it may be misspelt.

    Args:
        section: `[optimizer]`.
        parameters: the names of each trainable parameter, and the parameter.
    """
    rule = ZerothOrderRule if section.name == ZerothOrderRule.name else RULES[section.name]
    keys = rule.hyper_defaults
    settings = {key: getattr(section, key, default) for key, default in keys.items()}
    rest: list[nn.Parameter] = []
    matched: list[list[nn.Parameter]] = [[] for _ in section.groups]
    for names, parameter in parameters:
        group = next(
            (
                members
                for members, asked in zip(matched, section.groups, strict=True)
                if any(fnmatchcase(name, pattern) for name in names for pattern in asked.match)
            ),
            rest,
        )
        group.append(parameter)
    groups: list[dict[str, Any]] = [{**settings, "params": rest}] if rest else []
    for members, asked in zip(matched, section.groups, strict=True):
        if not members:
            warnings.warn(
                f"optimizer.groups: no trainable parameter matches {', '.join(asked.match)}",
                stacklevel=2,
            )
            continue
        given = asked.model_dump(exclude_none=True, exclude={"match"})
        groups.append({**settings, **given, "params": members})
    return groups
