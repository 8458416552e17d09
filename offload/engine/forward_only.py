"""The part of the engine that trains with forward passes only; see [Note: Forward-only step]."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

from offload.engine.guards.places import Places
from offload.engine.optimizer import Closure
from offload.engine.report import StepMeter
from offload.engine.stateful import StatefulEngine
from offload.engine.zeroth_order import Reduce, ZerothOrder
from offload.errors import EngineStateError
from offload.optim.chunk_update import StepSettings
from offload.optim.zeroth_order import ZerothOrderUpdate

_NO_GUARD = torch._C.DisableTorchFunctionSubclass
_REMEDY = "call engine.step(closure) with a closure that returns the loss"


class ForwardOnlyEngine(StatefulEngine):
    """An engine whose `step` may take a closure instead of gradients.

    Attributes:
        projected_gradient: of the last forward-only step, after `reduce`; None before it.
        step_loss: the mean of that step's two losses; None before it.
    """

    global_steps: int
    skipped_steps: int
    micro_steps: int
    projected_gradient: float | None = None
    step_loss: float | None = None
    _meter: StepMeter
    _places: Places
    _zeroth: ZerothOrder | None = None

    @abstractmethod
    def _check_may_step(self) -> None:
        """Raise EngineStateError where no step may be taken."""

    @abstractmethod
    def _admit_unfrozen(self) -> None:
        """Give what was unfrozen its place, or raise OffloadError."""

    @abstractmethod
    def _end_pass(self) -> None:
        """Let go of what a forward has left in use."""

    @abstractmethod
    def _hyper(self) -> dict[int, dict[str, Any]]:
        """The group settings of each trainable parameter, by its index."""

    @abstractmethod
    def _bump_versions(self) -> None:
        """Graphs of the weights as they were are void."""

    def _open_zeroth_order(self) -> None:
        if isinstance(self._parts.updater, ZerothOrderUpdate):
            self._zeroth = ZerothOrder(self._parts, self._parts.updater, self._end_pass)

    def _check_has_gradients(self, what: str) -> None:
        if self._zeroth is not None:
            raise EngineStateError(
                f"{what} in forward-only training, which has no gradients", remedy=_REMEDY
            )

    def _take_closure(self, closure: Closure | None, reduce: Reduce | None) -> tuple[bool, float]:
        """Run a step; whether it was taken, and its loss. Its update is pending then."""
        self._check_may_step()
        assert self._zeroth is not None
        if closure is None:
            raise EngineStateError(
                "step() without a closure in forward-only training", remedy=_REMEDY
            )
        self._places.check()
        self._admit_unfrozen()
        self._end_pass()
        number = self.global_steps + self.skipped_steps + 1
        with _NO_GUARD():
            frozen = {s.index for s in self._trainable if not s.parameter.requires_grad}
        hyper = {index: group for index, group in self._hyper().items() if index not in frozen}
        projected, loss = self._zeroth.project(closure, number, reduce, tuple(hyper))
        self.projected_gradient, self.step_loss = projected, loss
        taken = abs(projected) <= torch.finfo(torch.float32).max  # False for NaN
        if taken:
            self._zeroth.defer(StepSettings(hyper, projected, number))
            self._bump_versions()
            self.global_steps += 1
        else:
            self.skipped_steps += 1
        self.micro_steps += 1
        self._meter.end_step()
        return taken, loss
