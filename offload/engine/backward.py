"""The part of the engine that runs backward passes, and knows their gradients' norm.

[Note: Last backward]
The optimizer step may begin while gradients still arrive (see docs/overlapped-step.md), so a
backward has to know whether it is the last one of its step. `engine.step` counts to
`gradient_accumulation_steps`. Loops that count by themselves, as trainers of other libraries do,
say `is_last`; they scale their losses by themselves, too, and call `engine.optimizer.step`.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from offload.engine.accumulation.accumulating import AccumulatingEngine
from offload.engine.pressure import HostPressure
from offload.optim.chunk_update import StepSettings
from offload.optim.clipping import global_norm, square_sum
from offload.optim.loss_scale import LossScale
from offload.partition.parameters import ParameterState
from offload.tiers.uninterrupted import uninterrupted


class BackwardEngine(AccumulatingEngine):
    """An engine that runs backward passes; see [Note: Last backward]."""

    loss_scale: LossScale | None
    _gradients_are_spent: bool
    _in_backward: bool
    _pressure: HostPressure
    _trainable: list[ParameterState]

    @abstractmethod
    def is_accumulation_boundary(self) -> bool:
        """Whether the next `step` takes an optimizer step."""

    @abstractmethod
    def _release_gathered(self) -> None:
        """Let go of the modules that are gathered as a whole."""

    @abstractmethod
    def _step_settings(self, hyper: dict[int, dict[str, Any]], coefficient: float) -> StepSettings:
        """What a step applies."""

    def backward(self, loss: torch.Tensor, *, is_last: bool | None = None, **kwargs: Any) -> None:
        """Run the backward of `loss`, a scalar, scaled by 1 / gradient_accumulation_steps.

        When it returns gradients are at their homes, or on their way from an accelerator: what
        uses them waits for them.

        An error leaves no gradients: run all backward passes of the accumulation again.

        Args:
            loss: what to differentiate.
            is_last: for loops that count backward passes by themselves: whether this is the last
                one before `engine.optimizer.step()`. The loss is then taken as it is, and is not
                scaled but for fp16. None: as `engine.step` counts.
            **kwargs: go to `torch.autograd.backward`.

        Raises:
            EngineStateError: the engine is closed, or a step is pending.
            BudgetError, StorageError: weights could not be brought in, or gradients not home.
        """
        self._check_ready("backward")
        self._check_has_gradients("backward")
        self._end_interrupted()
        self._notice_zeroed()
        with self._running_backward():
            if self.is_accumulation_boundary() if is_last is None else is_last:
                self._parts.gradients.land()  # what comes from here on is the last of the step
                self._expect_step()
            scaled = self._scaled(loss) if is_last is None else self._with_loss_scale(loss)
            scaled.backward(**kwargs)

    def accumulated_grad_norm(self) -> float:
        """The L2 norm of the gradients that have arrived, over all parameters; before clipping.

        What `grad_norm` will be after the step, unless more gradients arrive. Infinite or NaN if
        one of them is: that step will be skipped. Without the loss scale of fp16.

        Raises:
            EngineStateError: the engine is closed, a step is pending, or a gradient was lost.
            StorageError: gradients could not be brought home.
        """
        self._check_ready("accumulated_grad_norm")
        self._check_has_gradients("accumulated_grad_norm")
        with uninterrupted():
            self._parts.pager.release_nodes()
            self._slots.adopt_all()
            self._parts.gradients.flush()
        return self._norm_of_gradients()

    def _notice_zeroed(self) -> None:
        """What a step has used may have been forgotten one by one, as by `model.zero_grad()`."""
        self._gradients_are_spent = self._gradients_are_spent and self._slots.is_any_shown()

    def _norm_of_gradients(self) -> float:
        scale = 1.0 if self.loss_scale is None else self.loss_scale.scale
        sums = [s.gradient_sums for s in self._trainable if s.gradient_sums is not None]
        return global_norm(
            (square_sum(block_sums.tolist()) for block_sums in sums), loss_scale=scale
        )

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        return self._with_loss_scale(loss, 1.0 / self.config.training.gradient_accumulation_steps)

    def _with_loss_scale(self, loss: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        if self.loss_scale is not None:
            loss = loss.float()
            scale *= self.loss_scale.scale
        return loss if scale == 1.0 else loss * scale

    @contextlib.contextmanager
    def _running_backward(self) -> Iterator[None]:
        self._in_backward = True
        self._pressure.note_peak(self.global_steps)
        with self._meter.computing("backward"):
            try:
                yield
                self._after_backward()
                self._parts.gradients.collect()
            except BaseException:
                with uninterrupted():
                    self._unwind()
                    self._after_backward()
                    self._forget_gradients()
                raise
            finally:
                self._in_backward = False

    def _after_backward(self) -> None:
        self._release_gathered()
        self._after_piece()

    def _after_piece(self) -> None:
        self._parts.pager.release_nodes()
        if self._parts.activations is not None:
            self._parts.activations.collect()

    def _expect_step(self, arrivals: int = 1) -> None:
        """The last backward before a step begins: say what that will apply if all goes well."""
        expected = self._step_settings(self._hyper(), 1.0)
        self._parts.updates.expect(
            None if self._gradients_are_spent else expected, arrivals=arrivals
        )
