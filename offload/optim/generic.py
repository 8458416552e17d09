"""Any torch optimizer, applied to one bucket of parameters at a time.

[Note: generic path]

The optimizer that the user's factory made is a *prototype*: it owns the groups, and its state stays
empty. To step some parameters, a clone of it is given just these parameters, their groups' settings
and their state. That equals a step on the whole model for every optimizer that treats each
parameter by itself; one that keeps anything else (a counter on itself, a setting that it changes
during a step) is refused in the dry step that finds out the state's layout.

    state of a parameter  =  tensors (live in a tier, in the layout's order)  +  scalars (in memory)

0-dimensional tensors count as scalars: step counts, mostly.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from offload.errors import OffloadError

_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One tensor of a parameter's optimizer state."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StateLayout:
    """What an optimizer keeps for a parameter after its first step."""

    tensors: tuple[StateTensor, ...]
    scalars: tuple[str, ...]


@dataclass(slots=True)
class GenericUpdate:
    """One parameter's part in `GenericRule.step_bucket`.

    Attributes:
        parameter: fp32 values, in the parameter's shape; its `.grad` is the fp32 gradient or None.
        group: The settings of its group; ``params`` is ignored.
        tensors: Memory of the state by key, in the layout's shapes; its contents are used only if
            `started`.
        scalars: The state's other values by key.
        started: Whether the parameter has been stepped before.
    """

    parameter: torch.Tensor
    group: Mapping[str, Any]
    tensors: dict[str, torch.Tensor]
    scalars: dict[str, Any] = field(default_factory=dict)
    started: bool = False


class GenericRule:
    """Steps parameters with clones of a prototype; see [Note: generic path]."""

    def __init__(self, prototype: torch.optim.Optimizer) -> None:
        """Take the prototype; its parameters may be on the meta device.

        Raises:
            OffloadError: The optimizer's `step` needs a closure.
        """
        self.name = type(prototype).__name__
        self._prototype = prototype
        self._state_in_constructor = any(prototype.state.values())
        self._layouts: dict[tuple[tuple[int, ...], str], StateLayout] = {}
        parameters = list(inspect.signature(type(prototype).step).parameters.values())[1:]
        variadic = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
        required = [p for p in parameters if p.default is p.empty and p.kind not in variadic]
        if required or isinstance(prototype, torch.optim.LBFGS):
            raise OffloadError(
                f"{self.name} evaluates the loss several times a step",
                expected="an optimizer whose step() needs no closure",
                remedy="use another optimizer",
            )

    def state_layout(self, shape: Sequence[int], group: Mapping[str, Any]) -> StateLayout:
        """Return the state that a parameter of this shape has in this group.

        It is found by two dry steps with zero gradients, on the meta device if the optimizer runs
        there, else on tensors of the full shape; results are kept.

        Raises:
            OffloadError: The optimizer cannot step such a parameter, or not by itself.
        """
        key = (tuple(shape), repr(sorted(_settings(group).items())))
        if key not in self._layouts:
            try:
                self._layouts[key] = self._dry_layout(key[0], group, "meta")
            except OffloadError:
                self._layouts[key] = self._dry_layout(key[0], group, "cpu")
        return self._layouts[key]

    def step_bucket(self, updates: Sequence[GenericUpdate]) -> None:
        """Step the parameters that have a gradient; others and their state stay untouched.

        Parameters, `tensors`, `scalars` and `started` are changed in place.

        Raises:
            OffloadError: The optimizer failed, or its state is not what the dry step found. The
                parameters and state of this call must not be used.
        """
        due = [update for update in updates if update.parameter.grad is not None]
        if not due:
            return
        layouts = [self.state_layout(update.parameter.shape, update.group) for update in due]
        states = [
            {**update.tensors, **update.scalars}
            if update.started
            else self._initial_state(update.parameter, update.group)
            for update in due
        ]
        self._step([update.parameter for update in due], [u.group for u in due], states)
        for update, layout, state in zip(due, layouts, states, strict=True):
            if self._layout_of(state) != layout:
                raise OffloadError(
                    f"the state of {self.name} changed its layout",
                    expected=f"{layout} as in the first step, not {self._layout_of(state)}",
                    remedy="use an optimizer whose state keeps its tensors and shapes",
                )
            for tensor in layout.tensors:
                if state[tensor.key] is not update.tensors[tensor.key]:
                    update.tensors[tensor.key].copy_(state[tensor.key])
            update.scalars.clear()
            update.scalars.update({key: state[key] for key in layout.scalars})
            update.started = True

    def _dry_layout(
        self, shape: tuple[int, ...], group: Mapping[str, Any], device: str
    ) -> StateLayout:
        parameter = torch.nn.Parameter(torch.zeros(shape, device=device))
        parameter.grad = torch.zeros_like(parameter)
        state = self._initial_state(parameter, group)
        self._step([parameter], [group], [state])
        layout = self._layout_of(state)
        self._step([parameter], [group], [state])
        if self._layout_of(state) != layout:
            raise OffloadError(
                f"{self.name} adds to its state after the first step",
                expected="one layout from the first step on",
                remedy="use another optimizer",
            )
        return layout

    def _layout_of(self, state: Mapping[str, Any]) -> StateLayout:
        tensors = []
        scalars = []
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim > 0:
                tensors.append(StateTensor(key, value.dtype, tuple(value.shape)))
            elif isinstance(value, torch.Tensor | bool | int | float | str | None):
                scalars.append(key)
            else:
                raise OffloadError(
                    f"{self.name} keeps a {type(value).__name__} as {key!r} for a parameter",
                    expected="tensors and numbers",
                    remedy="use another optimizer",
                )
        tensors.sort(key=lambda tensor: tensor.key)
        return StateLayout(tuple(tensors), tuple(sorted(scalars)))

    def _initial_state(self, parameter: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state before the first step: empty, unless the constructor builds it."""
        if not self._state_in_constructor:
            return {}
        constructor: Any = type(self._prototype)
        accepted = inspect.signature(constructor).parameters
        settings = {key: value for key, value in _settings(group).items() if key in accepted}
        return dict(constructor([parameter], **settings).state[parameter])

    def _step(
        self,
        parameters: Sequence[torch.Tensor],
        groups: Sequence[Mapping[str, Any]],
        states: Sequence[dict[str, Any]],
    ) -> None:
        """Step a clone that has just these parameters; changes them and the states in place."""
        settings = [_settings(group) for group in groups]
        clone: Any = object.__new__(type(self._prototype))
        clone.__dict__.update(self._prototype.__dict__)
        clone.__dict__.update({name: OrderedDict() for name in _HOOKS})
        clone.__dict__.pop("step", None)  # a learning rate scheduler has wrapped the prototype's
        clone.param_groups = [
            {**own, "params": [parameter]}
            for own, parameter in zip(settings, parameters, strict=True)
        ]
        clone.state = defaultdict(dict, zip(parameters, states, strict=True))
        attributes = dict(clone.__dict__)
        try:
            with torch.no_grad():
                clone.step()
        except Exception as error:
            shapes = ", ".join(str(tuple(parameter.shape)) for parameter in parameters)
            raise OffloadError(
                f"{self.name} failed to step parameters of the shapes {shapes}: {error}",
                expected="an optimizer that steps dense fp32 parameters one by one",
                remedy="use another optimizer, or leave these parameters out of it",
            ) from error
        changed = _changed_keys(attributes, clone.__dict__)
        for own, group in zip(settings, clone.param_groups, strict=True):
            changed += _changed_keys(own, _settings(group))
        if changed:
            raise OffloadError(
                f"{self.name} changes its own {', '.join(sorted(set(changed)))} in a step",
                expected="an optimizer that treats each parameter by itself",
                remedy="use another optimizer",
            )
        for state, parameter in zip(states, parameters, strict=True):
            if clone.state[parameter] is not state:
                state.clear()
                state.update(clone.state[parameter])


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the keys that came, went, or whose value is another object of another value."""
    kept = before.keys() & after.keys()
    changed = [
        key for key in kept if after[key] is not before[key] and not _equal(after[key], before[key])
    ]
    return changed + list(before.keys() ^ after.keys())


def _equal(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)
