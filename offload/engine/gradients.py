"""Gradients on their way home: each leaves the device as soon as backward has finished it.

[Note: Gradient chunks]
A gradient arrives once for each backward that reaches its parameter: whole, or that of a tiled
parameter range by range. It is added into its home chunk in fp32 (the first one of a step replaces
what was there) and `param.grad` is dropped. The sums of squares of the result, which norm and
finite check need, come out of the same pass; where a range ends inside a block of 65,536 elements,
the sums of its parts are added up.

A home that the CPU reaches is added to in place. Otherwise the chunk is *open* in host staging
until all its parameters have arrived or its staging is wanted; then it is written home. It is read
again if more arrives later in the step.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import torch

from offload.errors import BudgetError
from offload.optim.gradients import BLOCK_NUMEL, accumulate_gradient, num_blocks
from offload.partition.arrays import field_array, memory_order, tensor_bits
from offload.partition.blocks import Block, BlockStore, Staged, release_all
from offload.partition.layout import Bucket, ClassLayout, Segment, segments
from offload.partition.parameters import ParameterState
from offload.schedule.executor import ComputePool
from offload.tiers.transfer import CompletedTransfer

if TYPE_CHECKING:
    from offload.optim.split import Precision

PIECE_NUMEL = 16 * BLOCK_NUMEL

Key = tuple[int, int]


def _pieces(segment: Segment) -> Iterator[tuple[int, int]]:
    """The segment in pieces for the pool; only the first may start inside a block."""
    start = 0
    while start < segment.numel:
        into_block = (segment.start_in_param + start) % BLOCK_NUMEL
        length = BLOCK_NUMEL - into_block if into_block else PIECE_NUMEL
        stop = min(start + length, segment.numel)
        yield start, stop
        start = stop


@dataclass(slots=True, eq=False)
class _OpenChunk:
    staged: Staged
    missing: set[int]


class GradientHome:
    """The gradients of one engine. Thread-safe: backward may run in several threads."""

    def __init__(
        self,
        parameters: Sequence[ParameterState],
        buckets: Sequence[Bucket],
        store: BlockStore,
        pool: ComputePool,
        *,
        max_open_chunks: int,
    ) -> None:
        self._parameters = parameters
        self._buckets = buckets
        self._store = store
        self._pool = pool
        self._max_open_chunks = max_open_chunks
        self._open: OrderedDict[Key, _OpenChunk] = OrderedDict()
        self._written: set[Key] = set()
        self._lock = threading.Lock()
        self._segments: dict[Key, tuple[Segment, ...]] = {}
        for bucket in buckets:
            if bucket.trainable:
                self.admit(bucket)

    def admit(self, bucket: Bucket) -> None:
        """Gradients of a bucket will arrive, whose block the store has."""
        for chunk in bucket.chunks:
            self._segments[bucket.index, chunk.index] = segments(bucket, chunk)

    def arrive(self, state: ParameterState, gradient: torch.Tensor) -> None:
        """Take a gradient of the parameter's shape; it is free for reuse on return.

        It is in fp32 or in the dtype that the parameter computes in; another one is converted.

        Raises:
            BudgetError: the host has no staging for its chunk.
            StorageError: reading or writing the chunk failed; the gradient is not counted.
        """
        computed = state.parameter.dtype
        if gradient.dtype not in (torch.float32, computed):
            gradient = gradient.to(computed)
        with self.arriving(state) as take:
            take(0, memory_order(gradient, state))

    @contextlib.contextmanager
    def arriving(self, state: ParameterState) -> Iterator[Callable[[int, torch.Tensor], None]]:
        """A gradient that arrives range by range: `take(start, values)`, in ascending order.

        `values` are the elements from `start` on, in the order of the parameter's memory: 1-D, in
        fp32 or the parameter's dtype, free for reuse on return. Together the ranges have to cover
        the parameter. The gradient counts when the block ends; no other arrives meanwhile.

        Raises:
            BudgetError, StorageError: as `arrive`, by `take`.
        """
        with self._lock:
            first = state.gradient_sums is None
            sums = np.zeros(num_blocks(state.numel), np.float64)
            yield partial(self._take_range, state, sums, first)
            state.gradient_sums = sums

    def flush(self) -> None:
        """A backward has ended: start to write home what is still open."""
        with self._lock:
            while self._open:
                self._close_oldest()

    def clear(self) -> None:
        """Forget every gradient: the next to arrive of each parameter is its first."""
        with self._lock:
            for opened in self._open.values():
                opened.staged.release()
            self._open.clear()
            self._written.clear()
            for state in self._parameters:
                state.gradient_sums = None

    def block(self, bucket: int) -> Block:
        """The gradient block of a trainable bucket."""
        return self._store.block(bucket, "gradients")

    def array(
        self, state: ParameterState, segment: Segment, chunk: int, tensor: torch.Tensor
    ) -> npt.NDArray[np.generic]:
        """The segment's gradient in a loaded chunk: float32, or the bits of the compute dtype."""
        layout = self.block(state.bucket).layout
        assert isinstance(layout, ClassLayout)
        field = layout.field(chunk, "gradient")
        return field_array(tensor, field, segment.start_in_chunk, segment.numel)

    def _take_range(
        self,
        state: ParameterState,
        sums: npt.NDArray[np.float64],
        first: bool,
        start: int,
        values: torch.Tensor,
    ) -> None:
        stop = start + values.numel()
        chunks = self._buckets[state.bucket].chunks
        step = chunks[0].numel  # of every chunk but the last
        first_chunk, end_chunk = (state.offset + start) // step, -(-(state.offset + stop) // step)
        for chunk in chunks[first_chunk:end_chunk]:
            key = (state.bucket, chunk.index)
            for segment in self._segments[key]:
                begin = max(segment.start_in_param, start)
                end = min(segment.start_in_param + segment.numel, stop)
                if segment.param == state.index and begin < end:
                    shift = begin - segment.start_in_param
                    part = Segment(state.index, begin, segment.start_in_chunk + shift, end - begin)
                    self._take(key, part, values[begin - start : end - start], sums, first=first)
                    if shift + part.numel == segment.numel:
                        self._has_arrived(key, state)

    def _take(
        self,
        key: Key,
        segment: Segment,
        values: torch.Tensor,
        sums: npt.NDArray[np.float64],
        *,
        first: bool,
    ) -> None:
        block = self.block(key[0])
        opened = self._reach(block, key)
        state = self._parameters[segment.param]
        target = self.array(state, segment, key[1], opened.staged.tensor)
        with self._on_host(values, block) as source:
            self._accumulate(key, segment, (target, source), sums, first=first)

    def _has_arrived(self, key: Key, state: ParameterState) -> None:
        opened = self._open.get(key)
        if opened is not None:
            opened.missing.discard(state.index)
            if not opened.missing:
                self._close(key)

    def _accumulate(
        self,
        key: Key,
        segment: Segment,
        arrays: tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]],
        sums: npt.NDArray[np.float64],
        *,
        first: bool,
    ) -> None:
        target, source = arrays
        precision = cast("Precision", self._buckets[key[0]].dtype)
        calls = []
        of_pieces = []
        for start, stop in _pieces(segment):
            of_pieces.append(np.empty(num_blocks(stop - start), np.float64))
            calls.append(
                partial(
                    accumulate_gradient,
                    target[start:stop],
                    source[start:stop],
                    first=first,
                    target_dtype="fp32" if target.dtype == np.float32 else precision,
                    source_dtype="fp32" if source.dtype == np.float32 else precision,
                    block_sums=of_pieces[-1],
                )
            )
        self._pool.run(calls)
        for (start, _), piece_sums in zip(_pieces(segment), of_pieces, strict=True):
            block = (segment.start_in_param + start) // BLOCK_NUMEL
            sums[block : block + len(piece_sums)] += piece_sums

    @contextlib.contextmanager
    def _on_host(self, part: torch.Tensor, block: Block) -> Iterator[npt.NDArray[np.generic]]:
        """The gradient's bits, through a landing lease if the device is not addressable."""
        if self._store.device.host_addressable:
            yield tensor_bits(part)
            return
        raw = part.view(torch.uint8)
        lease = self._store.host.lease(raw.numel(), f"landing of {block.name}")
        landed = Staged(lease.tensor, CompletedTransfer("d2h"), lease)
        try:
            landed.transfer = self._store.device.start_copy_out(lease.tensor, raw)
            landed.transfer.wait(self._store.deadline_seconds)
            yield tensor_bits(lease.tensor.view(part.dtype))
        finally:
            release_all([landed])

    def _reach(self, block: Block, key: Key) -> _OpenChunk:
        if self._store.in_place(block):
            return _OpenChunk(self._store.stage_or_raise(block, key[1]), set())
        opened = self._open.get(key)
        if opened is None:
            while len(self._open) >= self._max_open_chunks:
                self._close_oldest()
            staged = self._stage(block, key)
            expected = (segment.param for segment in self._segments[key])
            missing = {param for param in expected if self._parameters[param].trainable}
            opened = self._open[key] = _OpenChunk(staged, missing)
        return opened

    def _stage(self, block: Block, key: Key) -> Staged:
        while True:
            try:
                if key in self._written:
                    return self._store.load(block, key[1])
                return self._store.stage_or_raise(block, key[1])
            except BudgetError:
                if not self._open:
                    raise
                self._close_oldest()

    def _close_oldest(self) -> None:
        self._close(next(iter(self._open)))

    def _close(self, key: Key) -> None:
        opened = self._open.pop(key)
        self._written.add(key)
        self._store.start_store(self.block(key[0]), key[1], opened.staged)
