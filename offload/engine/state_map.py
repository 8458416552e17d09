"""Builds the map of an engine's stored tensors; see [Note: State map] in partition.snapshot.

What has no bytes of its own in a block, or stands there in an order that says nothing elsewhere
(the codes of 8-bit moments of a parameter that is not row-major), is not mapped: it is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from offload.engine.state_access import StateAccess, class_of
from offload.partition.blocks import BlockStore
from offload.partition.layout import Field, segments
from offload.partition.parameters import ParameterState
from offload.partition.snapshot import BlockKey, MappedTensor, Piece
from offload.partition.tensor_layout import TensorLayout
from offload.schedule.plan import Plan


class StateMap:
    """Which bytes of which blocks the tensors of an engine are, while its plan is this one.

    Attributes:
        plan: of the engine.
        tensors: by parameter index and field, those that are bytes of blocks.
        converted: by parameter index, the fields that are not.
    """

    def __init__(
        self,
        plan: Plan,
        parameters: Sequence[ParameterState],
        store: BlockStore,
        access: StateAccess,
    ) -> None:
        self.plan = plan
        self._store = store
        self._access = access
        self.tensors: dict[int, dict[str, MappedTensor]] = {}
        self.converted: dict[int, list[str]] = {}
        for state in parameters:
            self.tensors[state.index] = {tensor.field: tensor for tensor in self._stored(state)}
            mapped = self.tensors[state.index]
            self.converted[state.index] = [f for f in access.fields(state) if f not in mapped]

    def _stored(self, state: ParameterState) -> Iterator[MappedTensor]:
        own = self._own_places(state)
        for name, (dtype, shape) in self._access.fields(state).items():
            if name in own:
                offset, nbytes = own[name]
                block = BlockKey(state.bucket, "optimizer", 0)
                pieces = (Piece(block, offset, nbytes),) if nbytes else ()
                yield MappedTensor("parameter", state.name, name, dtype, shape, None, pieces)
            elif not self._access.is_converted(state, name):
                yield self._mapped("parameter", state, name, dtype, shape)

    def gradient(self, state: ParameterState) -> MappedTensor:
        """The gradient of a parameter, in the dtype of its home."""
        dtype = self._access.gradient_dtype(state)
        shape = tuple(state.shape)
        if state.parameter.dtype.is_complex:
            shape = (*shape, 2)
        return self._mapped("gradient", state, "gradient", dtype, shape)

    def _mapped(
        self,
        kind: str,
        state: ParameterState,
        name: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
    ) -> MappedTensor:
        pieces = tuple(self._pieces(state, name))
        return MappedTensor(kind, state.name, name, dtype, shape, _stride(state, shape), pieces)

    def _pieces(self, state: ParameterState, name: str) -> Iterator[Piece]:
        bucket, state_class = self.plan.buckets[state.bucket], class_of(name)
        layout = self._store.block(state.bucket, state_class).layout
        for chunk in bucket.chunks:
            for segment in segments(bucket, chunk):
                if segment.param != state.index:
                    continue
                field = _field(layout.element_fields(chunk.index), name)
                values = field.values(segment.start_in_chunk, segment.numel)
                yield Piece(
                    BlockKey(state.bucket, state_class, chunk.index),
                    field.offset_bytes + values.start * field.itemsize,
                    (values.stop - values.start) * field.itemsize,
                )

    def _own_places(self, state: ParameterState) -> dict[str, tuple[int, int]]:
        """The tensors of an arbitrary optimizer, by name: offset in the block, and bytes."""
        if not state.trainable or "optimizer" not in self._store.classes(state.bucket):
            return {}
        layout = self._store.block(state.bucket, "optimizer").layout
        return layout.places(state.index) if isinstance(layout, TensorLayout) else {}


def _field(fields: Sequence[Field], name: str) -> Field:
    (field,) = (field for field in fields if field.name == name)
    return field


def _stride(state: ParameterState, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The memory order of a tensor that lies as its parameter does; None: row-major."""
    stride = tuple(state.stride)
    if len(shape) == len(stride) + 1:  # pairs of a complex parameter
        stride = (*(2 * step for step in stride), 1)
    if len(shape) != len(stride) or torch.empty(shape, device="meta").stride() == stride:
        return None
    return stride
