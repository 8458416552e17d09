"""Gradients on their way home: each leaves the device as soon as backward has finished it.

[Note: Gradient chunks]
A gradient arrives once for each backward that reaches its parameter: whole, or that of a tiled
parameter range by range. It is added into its home chunk in fp32 (the first one of a step replaces
what was there) and `param.grad` is dropped. The sums of squares of the result, which norm and
finite check need, come out of the same pass; where a range ends inside a block of 65,536 elements,
the sums of its parts are added up.

From an accelerator a gradient goes through host memory, by copies that run while backward goes on:
see landing.py. It counts from its arrival; it is added to its home when its copy has landed, at a
later arrival or at the latest by `flush`. What fails then loses it (`lost`).

A home that the CPU reaches is added to in place. Otherwise the chunk is *open* in host staging
until all its parameters have arrived, each as often as `num_arrivals` says, or its staging is
wanted; then it is written home. It is read again if more arrives later in the step.
"""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import torch

from offload.engine.landing import LandingRing
from offload.errors import BudgetError
from offload.optim.gradients import BLOCK_NUMEL, accumulate_gradient, num_blocks
from offload.partition.arrays import field_array, memory_order, tensor_bits
from offload.partition.blocks import Block, BlockStore
from offload.partition.layout import Bucket, ClassLayout, Segment, segments
from offload.partition.parameters import ParameterState
from offload.partition.staging import Staged
from offload.schedule.executor import ComputePool
from offload.tiers.uninterrupted import UninterruptedLock

if TYPE_CHECKING:
    from offload.optim.overlapped import OverlappedStep
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
    missing: Counter[int]  # arrivals, by parameter


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The elements of one arrival that belong to one chunk.

    `completes`: the parameter has no more of them in this chunk.
    """

    key: Key
    state: ParameterState
    segment: Segment
    sums: npt.NDArray[np.float64]
    first: bool
    completes: bool


class GradientHome:
    """The gradients of one engine. Thread-safe: backward may run in several threads.

    Attributes:
        lost: the parameter whose gradient failed on its way home; those of the accumulation are
            incomplete until `clear`.
        num_arrivals: how often a gradient arrives shortly after another; its chunk is kept open.
    """

    def __init__(
        self,
        parameters: Sequence[ParameterState],
        buckets: Sequence[Bucket],
        store: BlockStore,
        pool: ComputePool,
        *,
        max_open_chunks: int,
        landing: LandingRing[Part] | None = None,
    ) -> None:
        self.lost: str | None = None
        self.num_arrivals = 1
        self._landing = landing
        self._parameters = parameters
        self._buckets = buckets
        self._store = store
        self._pool = pool
        self._max_open_chunks = max_open_chunks
        self._open: OrderedDict[Key, _OpenChunk] = OrderedDict()
        self._written: set[Key] = set()
        self._lock = UninterruptedLock()
        self._segments: dict[Key, tuple[Segment, ...]] = {}
        self.updates: OverlappedStep | None = None  # is told of every gradient
        self._arrived: deque[ParameterState] = deque()  # of whom it has to be told
        for bucket in buckets:
            if bucket.trainable:
                self.admit(bucket)

    def admit(self, bucket: Bucket) -> None:
        """Gradients of a bucket will arrive, whose block the store has."""
        for chunk in bucket.chunks:
            self._segments[bucket.index, chunk.index] = segments(bucket, chunk)
        if self._landing is not None:
            self._landing.admit(max(self._store.block(bucket.index, "weights").layout.chunk_nbytes))

    def resize(self, landing_bytes: int) -> None:
        """So many device bytes of gradients may be on their way from now on.

        Raises:
            StorageError: a gradient that was on its way is lost.
        """
        with self._lock:
            self._land()
            if self._landing is not None:
                self._landing.device_bytes = landing_bytes

    def arrive(self, state: ParameterState, gradient: torch.Tensor) -> None:
        """Take a gradient of the parameter's shape; nobody may write it before `land`.

        It is in fp32 or in the dtype that the parameter computes in; another one is converted.

        Raises:
            BudgetError: the host has no staging for its chunk.
            StorageError: reading or writing a chunk failed: this gradient is not counted, or one
                that arrived before it is lost.
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
        fp32 or the parameter's dtype; nobody may write them before `land`. Together the ranges have
        to cover the parameter. The gradient counts when the block ends; no other arrives meanwhile.

        Raises:
            BudgetError, StorageError: as `arrive`, by `take`.
        """
        if self.updates is not None:
            self.updates.apply(state.bucket)  # with the gradient that is there
        with self._lock:
            first = state.gradient_sums is None
            sums = np.zeros(num_blocks(state.numel), np.float64)
            yield partial(self._take_range, state, sums, first)
            state.gradient_sums = sums  # complete when the last copy of it has landed
        self._tell_of_arrivals()

    def restore(self, state: ParameterState, sums: npt.NDArray[np.float64]) -> None:
        """A gradient that has been written home counts as arrived; `sums` as it had then."""
        with self._lock:
            self._written.update(
                key
                for key, parts in self._segments.items()
                if any(segment.param == state.index for segment in parts)
            )
            state.gradient_sums = sums

    def land(self) -> None:
        """Wait until what has arrived is in its home chunk, and nobody reads device memory.

        Raises:
            StorageError: a gradient is lost.
        """
        with self._lock:
            self._land()
        self._tell_of_arrivals()

    def collect(self) -> None:
        """A backward has ended: add what has landed, without waiting for copies.

        Raises:
            StorageError: a gradient is lost.
        """
        with self._lock:
            self._collect()
            if not self._landing:
                self._close_all()
        self._tell_of_arrivals()

    def _tell_of_arrivals(self) -> None:
        """Tell of what is home: nothing of a chunk that is open, because the home is read."""
        if self.updates is None:
            return
        with self._lock:
            open_params = {s.param for key in self._open for s in self._segments[key]}
            told = [state for state in self._arrived if state.index not in open_params]
            self._arrived = deque(s for s in self._arrived if s.index in open_params)
        for state in told:
            self.updates.arrived(state)

    def flush(self) -> None:
        """Gradients are about to be read: `land`, and start to write home what is still open.

        Raises:
            StorageError: a gradient is lost, or a write could not be started.
        """
        with self._lock:
            self._land()
            self._close_all()
        self._tell_of_arrivals()

    def clear(self) -> None:
        """Forget every gradient: the next to arrive of each parameter is its first."""
        with self._lock:
            if self._landing is not None:
                self._landing.clear()
            self.lost = None
            for opened in self._open.values():
                opened.staged.release()
            self._open.clear()
            self._written.clear()
            self._arrived.clear()
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
        parts = []
        for chunk in chunks[first_chunk:end_chunk]:
            key = (state.bucket, chunk.index)
            for segment in self._segments[key]:
                begin = max(segment.start_in_param, start)
                end = min(segment.start_in_param + segment.numel, stop)
                if segment.param == state.index and begin < end:
                    shift = begin - segment.start_in_param
                    part = Segment(state.index, begin, segment.start_in_chunk + shift, end - begin)
                    completes = shift + part.numel == segment.numel
                    parts.append(Part(key, state, part, sums, first, completes))
        if self._landing is None:
            for each in parts:
                self._add(each, tensor_bits(self._values_of(each, start, values)))
        else:
            self._send(self._landing, parts, start, values)

    @staticmethod
    def _values_of(part: Part, start: int, values: torch.Tensor) -> torch.Tensor:
        begin = part.segment.start_in_param - start
        return values[begin : begin + part.segment.numel]

    def _send(
        self,
        landing: LandingRing[Part],
        parts: Sequence[Part],
        start: int,
        values: torch.Tensor,
    ) -> None:
        """Start the copies of the parts, after whatever has to land before."""
        self._collect()
        nbytes = values.numel() * values.dtype.itemsize
        while not landing.has_room_for(nbytes):
            self._land_oldest(landing)
        for part in parts:
            own = self._values_of(part, start, values)
            owner = f"landing of {self.block(part.key[0]).name}"
            gives_back = nbytes if part is parts[-1] else 0
            while not landing.start(own, part, gives_back=gives_back, owner=owner):
                self._make_room(landing, own, owner)
        while landing.leaving_bytes > landing.device_bytes:
            self._land_oldest(landing)

    def _make_room(self, landing: LandingRing[Part], values: torch.Tensor, owner: str) -> None:
        """Free some of the host memory that gradients hold.

        Raises:
            BudgetError: they hold none.
        """
        if landing:
            self._land_oldest(landing)
        elif self._open:
            self._close_oldest()
        elif not self._store.settle_one():
            nbytes = values.numel() * values.dtype.itemsize
            self._store.host.lease(nbytes, owner).release()  # says who holds the rest

    def _collect(self) -> None:
        while self._landing is not None and self._landing.has_landed:
            self._land_oldest(self._landing)

    def _land(self) -> None:
        while self._landing:
            self._land_oldest(self._landing)

    def _land_oldest(self, landing: LandingRing[Part]) -> None:
        part = landing.oldest
        try:
            with landing.taken() as source:
                self._add(part, source)
        except BaseException:
            self.lost = part.state.name
            raise

    def _add(self, part: Part, source: npt.NDArray[np.generic]) -> None:
        block = self.block(part.key[0])
        opened = self._reach(block, part.key)
        target = self.array(part.state, part.segment, part.key[1], opened.staged.tensor)
        self._accumulate(part, (target, source))
        if part.segment.start_in_param + part.segment.numel == part.state.numel:
            self._arrived.append(part.state)
        if part.completes:
            self._has_arrived(part.key, part.state)

    def _has_arrived(self, key: Key, state: ParameterState) -> None:
        opened = self._open.get(key)
        if opened is not None:
            opened.missing -= Counter((state.index,))
            if not opened.missing:
                self._close(key)

    def _accumulate(
        self, part: Part, arrays: tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]
    ) -> None:
        target, source = arrays
        segment = part.segment
        precision = cast("Precision", self._buckets[part.key[0]].dtype)
        calls = []
        of_pieces = []
        for start, stop in _pieces(segment):
            of_pieces.append(np.empty(num_blocks(stop - start), np.float64))
            calls.append(
                partial(
                    accumulate_gradient,
                    target[start:stop],
                    source[start:stop],
                    first=part.first,
                    target_dtype="fp32" if target.dtype == np.float32 else precision,
                    source_dtype="fp32" if source.dtype == np.float32 else precision,
                    block_sums=of_pieces[-1],
                )
            )
        self._pool.run(calls)
        for (start, _), piece_sums in zip(_pieces(segment), of_pieces, strict=True):
            block = (segment.start_in_param + start) // BLOCK_NUMEL
            part.sums[block : block + len(piece_sums)] += piece_sums

    def _reach(self, block: Block, key: Key) -> _OpenChunk:
        if self._store.in_place(block):
            return _OpenChunk(self._store.stage_or_raise(block, key[1]), Counter())
        opened = self._open.get(key)
        if opened is None:
            while len(self._open) >= self._max_open_chunks:
                self._close_oldest()
            staged = self._stage(block, key)
            expected = {segment.param for segment in self._segments[key]}
            missing = {p: self.num_arrivals for p in expected if self._parameters[p].trainable}
            opened = self._open[key] = _OpenChunk(staged, Counter(missing))
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

    def _close_all(self) -> None:
        while self._open:
            self._close_oldest()

    def _close_oldest(self) -> None:
        self._close(next(iter(self._open)))

    def _close(self, key: Key) -> None:
        opened = self._open.pop(key)
        self._written.add(key)
        self._store.start_store(self.block(key[0]), key[1], opened.staged)
