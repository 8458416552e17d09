"""The update of one chunk whose state the CPU can reach: by a kernel, or by a torch optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from offload.optim.generic import GenericRule, GenericUpdate
from offload.optim.rules import Hyper, UpdateRule
from offload.optim.split import merge_tensor, split_tensor
from offload.partition.arrays import field_array, field_tensor, memory_order, module_order
from offload.partition.blocks import BlockStore
from offload.partition.layout import Bucket, Field, Segment
from offload.partition.parameters import ParameterState
from offload.partition.staging import Staged
from offload.partition.tensor_layout import TensorLayout
from offload.schedule.executor import ComputePool

if TYPE_CHECKING:
    from offload.optim.split import Precision

# Updates are cut into pieces of this many elements for the threads of the pool.
PIECE_NUMEL = 131_072


@dataclass(frozen=True, slots=True)
class StepSettings:
    """What one optimizer step applies, frozen when the step begins.

    Attributes:
        hyper: the group settings of each parameter that the step updates, by parameter index.
        gradient_scale: gradients are multiplied by this: clip coefficient over loss scale; in
            forward-only training the projected gradient, by which the noise is multiplied.
        step: the number of this step, for messages; counts from 1. The noise is drawn by it.
    """

    hyper: Mapping[int, Hyper]
    gradient_scale: float
    step: int


@dataclass(slots=True, eq=False)
class ChunkWork:
    """One chunk under way: the segments that have a gradient, and its staged state classes."""

    bucket: Bucket
    chunk: int
    segments: tuple[Segment, ...]
    staged: dict[str, Staged]

    def release(self) -> None:
        """Give all staging back."""
        for staged in self.staged.values():
            staged.release()


class ChunkUpdate(ABC):
    """Updates the staged state of one chunk in place."""

    def __init__(self, parameters: Sequence[ParameterState], store: BlockStore) -> None:
        self._parameters = parameters
        self._store = store

    def staged_classes(self, bucket: Bucket) -> Sequence[str]:
        """The state classes of a bucket that `update` wants staged."""
        return self._store.classes(bucket.index)

    def runs_on_device(self, bucket: Bucket) -> bool:  # noqa: ARG002
        """Whether the update of a bucket goes on beside the CPU, between `start` and `finish`."""
        return False

    def start(self, work: ChunkWork, settings: StepSettings) -> None:
        """Start the update of staged work of a bucket that `runs_on_device`.

        Until it is `finish`ed, in the same order, its staging is in use: waiting for its
        `Staged.transfer`s makes it free, also without `finish`. What an error has left unfinished
        is kept, and starting it again, with staging that may be new, completes it.
        """
        raise NotImplementedError

    def finish(self, work: ChunkWork) -> ParameterState | None:
        """Wait for the end of what was started; result and errors as of `update`."""
        raise NotImplementedError

    def abandon(self) -> None:  # noqa: B027
        """Forget what an error has left unfinished: the state is about to be replaced."""

    @abstractmethod
    def update(self, work: ChunkWork, settings: StepSettings) -> ParameterState | None:
        """Apply the update; returns a parameter that is not finite afterwards, if there is one.

        Raises:
            OffloadError: the optimizer failed; the staged state must not be stored.
        """

    def _fields(self, work: ChunkWork) -> Iterator[tuple[str, tuple[torch.Tensor, Field]]]:
        """Every field that has values for the elements of the chunk."""
        for state_class, staged in work.staged.items():
            layout = self._store.block(work.bucket.index, state_class).layout
            for field in layout.element_fields(work.chunk):
                yield field.name, (staged.tensor, field)


class KernelUpdate(ChunkUpdate):
    """Runs an `UpdateRule` over the segments, cut into pieces for the pool's threads."""

    def __init__(
        self,
        parameters: Sequence[ParameterState],
        store: BlockStore,
        rule: UpdateRule,
        pool: ComputePool,
    ) -> None:
        super().__init__(parameters, store)
        self._rule = rule
        self._pool = pool

    def update(self, work: ChunkWork, settings: StepSettings) -> ParameterState | None:
        """See `ChunkUpdate.update`."""
        calls, owners = [], []
        for segment in work.segments:
            for call in self._calls(work, segment, settings):
                calls.append(call)
                owners.append(segment.param)
        finite = self._pool.run(calls)
        return None if all(finite) else self._parameters[owners[finite.index(False)]]

    def _calls(
        self, work: ChunkWork, segment: Segment, settings: StepSettings
    ) -> Iterator[partial[bool]]:
        state = self._parameters[segment.param]
        precision = cast("Precision", work.bucket.dtype)
        places = dict(self._fields(work))
        arrays: dict[str, Any] = {
            name: field_array(*place, segment.start_in_chunk, segment.numel)
            for name, place in places.items()
        }
        fields = {name: field for name, (_, field) in places.items()}
        master = arrays.get("remainder", arrays.get("master"))
        if state.edited and master is not None:
            _follow_edit(arrays["weight"], master)
        for start in range(0, segment.numel, PIECE_NUMEL):
            numel = min(PIECE_NUMEL, segment.numel - start)
            piece = slice(start, start + numel)
            yield partial(
                self._rule.update,
                precision=precision,
                weight=arrays["weight"][piece],
                master=None if master is None else master[piece],
                gradient=arrays["gradient"][piece],
                state={
                    name: arrays[name][fields[name].values(start, numel)]
                    for name in self._rule.state_fields
                },
                hyper=settings.hyper[segment.param],
                step=state.steps + 1,
                gradient_scale=settings.gradient_scale,
            )


def _follow_edit(weight: Any, master: Any) -> None:
    """Make what completes an edited weight say exactly what the weight says."""
    if master.dtype == np.int16:
        master[:] = 0
    else:
        master[:] = weight.view(np.float16)


class OptimizerUpdate(ChunkUpdate):
    """Runs a torch optimizer on whole parameters in fp32, one by one; a chunk is a whole bucket.

    A complex parameter is stepped as the pairs of its parts, as torch's own optimizers do inside.
    """

    def __init__(
        self, parameters: Sequence[ParameterState], store: BlockStore, rule: GenericRule
    ) -> None:
        super().__init__(parameters, store)
        self._rule = rule
        self._scalars: dict[int, dict[str, Any]] = {}

    @staticmethod
    def scratch_bytes(bucket: Bucket) -> int:
        """Bytes beside the staged state: copies and temporaries in fp32 of the largest parameter.

        Parameter, gradient, and two more for the arithmetic of conversions and of the optimizer.
        """
        return 4 * max(slot.numel for slot in bucket.slots) * torch.float32.itemsize

    @property
    def scalars(self) -> dict[int, dict[str, Any]]:
        """The optimizer's values that are no tensors, by parameter index."""
        return self._scalars

    def update(self, work: ChunkWork, settings: StepSettings) -> ParameterState | None:
        """See `ChunkUpdate.update`."""
        not_finite = None
        for segment in work.segments:
            state = self._parameters[segment.param]
            update = self._gathered(work, segment, settings)
            self._rule.step_bucket([update])
            self._scalars[segment.param] = update.scalars
            values = update.parameter.detach()
            if state.parameter.dtype.is_complex:
                values = torch.view_as_complex(values)
            if not self._scattered(work, segment, memory_order(values, state)):
                not_finite = not_finite or state
        return not_finite

    def _gathered(self, work: ChunkWork, segment: Segment, settings: StepSettings) -> GenericUpdate:
        state = self._parameters[segment.param]
        tensors = {
            name: field_tensor(*place, segment.start_in_chunk, segment.numel)
            for name, place in self._fields(work)
        }
        values = master_values(tensors, edited=state.edited)
        parameter = real_parts(module_order(values, state)).requires_grad_()
        gradient = tensors["gradient"].float() * settings.gradient_scale
        parameter.grad = real_parts(module_order(gradient, state))
        layout = self._store.block(work.bucket.index, "optimizer").layout
        assert isinstance(layout, TensorLayout)
        return GenericUpdate(
            parameter=parameter,
            group=settings.hyper[segment.param],
            tensors=layout.tensors(segment.param, work.staged["optimizer"].tensor),
            scalars=dict(self._scalars.get(segment.param, {})),
            started=state.steps > 0,
        )

    def _scattered(self, work: ChunkWork, segment: Segment, values: torch.Tensor) -> bool:
        tensors = {
            name: field_tensor(*place, segment.start_in_chunk, segment.numel)
            for name, place in self._fields(work)
        }
        return set_master_values(tensors, values.detach())


def real_parts(values: torch.Tensor) -> torch.Tensor:
    """A complex tensor as pairs of real numbers, with one dimension more; others as they are."""
    return torch.view_as_real(values) if values.is_complex() else values


def master_values(tensors: Mapping[str, torch.Tensor], *, edited: bool) -> torch.Tensor:
    """The fp32 values that a weight and what completes it stand for; a new 1-D tensor."""
    weight = tensors["weight"]
    if "remainder" in tensors and not edited:
        return merge_tensor(weight, tensors["remainder"])
    if "master" in tensors and not edited:
        return tensors["master"].clone()
    return weight.float() if weight.dtype != torch.float32 else weight.clone()


def set_master_values(tensors: Mapping[str, torch.Tensor], values: torch.Tensor) -> bool:
    """Set weight and what completes it from fp32 values; whether the new weights are finite."""
    weight = tensors["weight"]
    if "remainder" in tensors:
        high, low = split_tensor(values)
        weight.copy_(high)
        tensors["remainder"].copy_(low)
    else:
        weight.copy_(values)
        if "master" in tensors:
            tensors["master"].copy_(values)
    return bool(torch.isfinite(weight).all())
