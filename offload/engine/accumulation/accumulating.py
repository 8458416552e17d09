"""The part of the engine that runs all micro-batches of a step in one call.

[Note: Accumulation]
`accumulate` runs the forwards and backwards of a step's micro-batches in the order that
`training.accumulation` names. Losses, gradients and weights are the same to the bit in both: each
micro-batch has its own random numbers (streams.py), every parameter gets its gradients in the order
of the micro-batches, and autograd adds up the same summands in the same order.

Layer-major order is for modules with narrow cuts (cuts.py, graph.py), which the first step finds
out (survey.py). Where there is none, one warning tells, and the usual order stays. A step in
layer-major order that turns out to be wide nevertheless runs again in the usual order, before any
gradient has moved, with the buffers and the random numbers as they were.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from offload.config import OffloadConfig
from offload.engine.accumulation.buffers import Buffers, changed
from offload.engine.accumulation.cuts import find_places
from offload.engine.accumulation.graph import Crossed
from offload.engine.accumulation.layer_major import LayerMajorStep, Losses, Surroundings
from offload.engine.accumulation.ledger import Ledger
from offload.engine.accumulation.streams import Stream, draw_seeds
from offload.engine.accumulation.survey import Knowledge, Survey
from offload.engine.departed import GradientSlots
from offload.engine.forward_only import ForwardOnlyEngine
from offload.engine.guards.whole_modules import gathered_modules
from offload.engine.guards.windows import RootWindow
from offload.errors import EngineStateError, OffloadError

MicroBatch = Any
LossOf = Callable[[MicroBatch], torch.Tensor]


class AccumulatingEngine(ForwardOnlyEngine):
    """An engine that takes all micro-batches of a step at once; see [Note: Accumulation]."""

    config: OffloadConfig
    _knowledge: Knowledge | None = None
    _root: RootWindow
    _slots: GradientSlots

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward."""

    @abstractmethod
    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Run the backward of a loss."""

    @abstractmethod
    def _running_backward(self) -> AbstractContextManager[None]:
        """Around backward passes: count, bring gradients home, forget them if one fails."""

    @abstractmethod
    def _expect_step(self, arrivals: int = 1) -> None:
        """The last backward before a step begins; every gradient will arrive so often."""

    @abstractmethod
    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """What backward starts from."""

    @abstractmethod
    def _end_interrupted(self) -> None:
        """What a forward has left open is void."""

    @abstractmethod
    def _after_piece(self) -> None:
        """A part of a backward is over."""

    @abstractmethod
    def _unwind(self) -> None:
        """Close what this thread has open."""

    @abstractmethod
    def _forget_gradients(self) -> None:
        """The accumulation under way starts again."""

    def accumulate(
        self, micro_batches: Sequence[MicroBatch], loss: LossOf | None = None
    ) -> list[torch.Tensor]:
        """Run forward and backward of all micro-batches of a step; `step` takes the step then.

        Args:
            micro_batches: as many as `training.gradient_accumulation_steps`.
            loss: computes the scalar loss of one of them, by calling the engine. Default: the
                engine called with the mapping's entries, and the `loss` of what it returns. In
                layer-major order it may be called once more for the same micro-batch.

        Returns:
            The loss of each micro-batch, not scaled, without a graph.

        An error leaves no gradients: call `accumulate` again.

        Raises:
            EngineStateError: the engine is closed or a step is pending; or, in layer-major order,
                a backward has changed a buffer or brought gradients that no graph has shown, in a
                step that is not like those before.
            OffloadError: there are more or fewer micro-batches, or the step has begun already.
            BudgetError, StorageError: weights could not be brought in, or gradients not home.
        """
        self._check_ready("accumulate")
        self._check_has_gradients("accumulate")
        self._end_interrupted()
        training = self.config.training
        count = training.gradient_accumulation_steps
        begun = self.micro_steps % count
        if len(micro_batches) != count or begun:
            raise OffloadError(
                f"accumulate with {len(micro_batches)} micro-batches"
                + (f" after {begun} backward passes of the same step" if begun else ""),
                expected=f"all {count} (training.gradient_accumulation_steps) of a step",
            )
        loss_of = self._loss_of_mapping if loss is None else loss
        calls = [functools.partial(loss_of, micro_batch) for micro_batch in micro_batches]
        seeds = draw_seeds(count)
        try:
            if training.accumulation == "layer_major" and count > 1:
                return self._in_layer_major_order(calls, seeds)
            return self._in_usual_order(calls, seeds)
        except BaseException:
            self._forget_gradients()
            raise

    def _loss_of_mapping(self, micro_batch: Mapping[str, Any]) -> torch.Tensor:
        loss: torch.Tensor = self(**micro_batch).loss
        return loss

    def _streams(self, seeds: Sequence[int]) -> list[Stream]:
        return [Stream(seed, self._parts.device.device) for seed in seeds]

    # -- the usual order ---------------------------------------------------------------------------

    def _in_usual_order(
        self,
        calls: Sequence[Callable[[], torch.Tensor]],
        seeds: Sequence[int],
        knowledge: Knowledge | None = None,
    ) -> list[torch.Tensor]:
        """One micro-batch after the other; those of a step to watch add to `knowledge`."""
        losses: list[torch.Tensor] = []
        for call, stream in zip(calls, self._streams(seeds), strict=True):
            self.micro_steps += bool(losses)
            with stream.entered():
                if knowledge is None:
                    loss = call()
                    self.backward(loss)
                else:
                    survey = Survey(self.module, knowledge, self._can_hold)
                    loss = survey.forward(call)
                    with survey.backward(), self._slots.ordered_by(survey):
                        self.backward(loss)
            losses.append(loss.detach())
            del loss
        return losses

    # -- layer-major order -------------------------------------------------------------------------

    def _in_layer_major_order(
        self, calls: Sequence[Callable[[], torch.Tensor]], seeds: Sequence[int]
    ) -> list[torch.Tensor]:
        knowledge = self._knowledge
        if knowledge is None:
            compiled = tuple(gathered_modules(self.module, ()).values())
            knowledge = self._knowledge = Knowledge(find_places(self.module, compiled))
        if knowledge.refusal is None and not knowledge.is_due:
            buffers = Buffers(self.module, knowledge.edited)
            try:
                return self._run_layer_major(calls, seeds, knowledge, buffers)
            except Crossed as crossed:
                knowledge.add(set(), crossed.reasons)
            buffers.restore()
            knowledge.is_due = True
        is_watched = knowledge.refusal is None
        losses = self._in_usual_order(calls, seeds, knowledge if is_watched else None)
        if is_watched:
            knowledge.conclude()
        if knowledge.refusal is not None and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"accumulation stays in the usual order: {knowledge.refusal}",
                RuntimeWarning,
                stacklevel=3,
            )
        return losses

    _has_warned = False

    def _run_layer_major(
        self,
        calls: Sequence[Callable[[], torch.Tensor]],
        seeds: Sequence[int],
        knowledge: Knowledge,
        buffers: Buffers,
    ) -> list[torch.Tensor]:
        def both(call: Callable[[], torch.Tensor]) -> Losses:
            loss = call()
            return Losses(loss, self._scaled(loss))

        step = LayerMajorStep(
            [functools.partial(both, call) for call in calls],
            self._streams(seeds),
            knowledge.places,
            knowledge.narrow,
            Surroundings(
                device=self._parts.device.device,
                unwind=self._unwind,
                in_one_run=lambda: self._root.one_run("layer_major", len(calls)),
                in_backward=self._backward_in_pieces,
                after_piece=self._after_piece,
                can_hold=self._can_hold,
                stamps=buffers.stamps,
            ),
        )
        with self._meter.computing("forward"):
            step.forward()
        before = buffers.stamps()
        losses = step.backward()
        edited = changed(before, buffers.stamps())
        if edited:
            raise EngineStateError(
                f"buffer {min(edited)} changes in backward, where it did not before",
                remedy='set training.accumulation = "micro_batch_major"',
            )
        knowledge.is_due = not step.seen <= knowledge.narrow | knowledge.wide.keys()
        self.micro_steps += len(calls) - 1
        return losses

    @contextlib.contextmanager
    def _backward_in_pieces(self, ledger: Ledger) -> Iterator[None]:
        gradients = self._parts.gradients
        gradients.num_arrivals = self.config.training.gradient_accumulation_steps
        self._expect_step(arrivals=gradients.num_arrivals)
        try:
            with self._running_backward(), self._slots.ordered_by(ledger):
                yield
        finally:
            gradients.num_arrivals = 1

    def _can_hold(self, leaf: torch.Tensor) -> bool:
        """Whether parts of a leaf's gradient can be held back: see [Note: Held gradients]."""
        if leaf._backward_hooks or leaf._post_accumulate_grad_hooks:
            return False  # they are to see the sum, once
        paged = next((paged for paged in self._parts.paged if paged.owner is leaf), None)
        return paged is not None and paged.tiles is None
