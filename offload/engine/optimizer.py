"""The engine's optimizer as PyTorch knows one: groups, schedulers, the plain idiom."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from offload.errors import EngineStateError, OffloadError
from offload.optim.rules import RULES
from offload.optim.zeroth_order import ZerothOrderRule
from offload.tiers.uninterrupted import uninterrupted

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
        defaults: Mapping[str, Any],
        *,
        take_step: Callable[[], bool],
        forget_gradients: Callable[[], None],
        admit_group: Callable[[dict[str, Any]], None],
        take_closure: TakeClosure | None = None,
    ) -> None:
        self._take_step = take_step
        self._take_closure = take_closure
        self._forget_gradients = forget_gradients
        self._admit_group = admit_group
        self._complete = False
        self.step_was_skipped = False
        with _NO_GUARD():
            super().__init__([dict(group) for group in groups], dict(defaults))
        self._complete = True

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
            EngineStateError: forward-only training without a closure, or `reduce` without it.
        """
        if self._take_closure is not None:
            taken, mean_loss = self._take_closure(closure, reduce)
            self.step_was_skipped = not taken
            return mean_loss
        if reduce is not None:
            raise EngineStateError(
                "step(reduce=...) with an optimizer that uses gradients",
                remedy="reduce gradients, or set optimizer.name = 'mezo'",
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with uninterrupted():
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
        with uninterrupted():
            self._forget_gradients()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the groups' settings from a state dict of this class, as torch does.

        Raises:
            OffloadError: it has state beside the groups, from an optimizer of torch.
        """
        if state_dict.get("state"):
            raise OffloadError(
                "load_state_dict with the state of another optimizer",
                expected="settings of groups: the state is on the engine's tiers",
                remedy="load it with engine.load_checkpoint, engine.import_checkpoint or "
                "engine.set_state",
            )
        with _NO_GUARD():
            super().load_state_dict(dict(state_dict))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters that no group has yet; what it leaves open is as in the others.

        The parameters were frozen when the engine was made, or left out by its optimizer. They get
        a place for their gradients and optimizer state, at once if they require gradients, else
        when they do.

        Raises:
            OffloadError: a parameter is not the engine's, or the optimizer cannot do what the group
                asks for; the group is not added.
            DoesNotFitError: the budgets have no room; the group is not added.
            ValueError, TypeError: as torch raises.
        """
        with _NO_GUARD():
            super().add_param_group(param_group)
        if self._complete:
            try:
                self._admit_group(self.param_groups[-1])
            except BaseException:
                self.param_groups.pop()
                raise


def configured_settings(section: OptimizerSection) -> dict[str, Any]:
    """What `[optimizer]` says of every hyperparameter of its rule."""
    rule = ZerothOrderRule if section.name == ZerothOrderRule.name else RULES[section.name]
    keys = rule.hyper_defaults
    return {key: getattr(section, key, default) for key, default in keys.items()}


def configured_group(section: OptimizerSection, names: Sequence[str]) -> int:
    """Which group takes a parameter of these names: 0 is the default, 1 the first of `groups`.

    It is the first one of which a pattern matches any name.
    """
    for number, asked in enumerate(section.groups, start=1):
        if any(fnmatchcase(name, pattern) for name in names for pattern in asked.match):
            return number
    return 0


def configured_groups(
    section: OptimizerSection, parameters: Sequence[tuple[Sequence[str], nn.Parameter | None]]
) -> list[dict[str, Any]]:
    """The parameter groups that `[optimizer]` and its groups describe, with all their settings.

    In the order of `configured_group`. A group for which there are frozen parameters only is empty,
    so that groups are the same whatever is frozen. One that matches nothing is left out with a
    warning: it may be misspelt.

    Args:
        section: `[optimizer]`.
        parameters: the names of each parameter, and the parameter; None if it is frozen.
    """
    members: dict[int, list[nn.Parameter]] = {}
    for names, parameter in parameters:
        group = members.setdefault(configured_group(section, names), [])
        if parameter is not None:
            group.append(parameter)
    settings = configured_settings(section)
    groups: list[dict[str, Any]] = [{**settings, "params": members[0]}] if 0 in members else []
    for number, asked in enumerate(section.groups, start=1):
        if number not in members:
            warnings.warn(
                f"optimizer.groups: no parameter matches {', '.join(asked.match)}", stacklevel=2
            )
            continue
        given = asked.model_dump(exclude_none=True, exclude={"match"})
        groups.append({**settings, **given, "params": members[number]})
    return groups
