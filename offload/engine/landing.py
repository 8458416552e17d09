"""Gradients between an accelerator and the host: copies in flight, in the order of their arrival.

[Note: Landing]

    gradient on the device --d2h--> its range of the ring --accumulate--> home chunk
                                    (while backward goes on)              (gradients.py)

The *ring* is one host lease, taken with the first copy and given back with the last, so that many
small ranges do not break up the staging of others. Copies land oldest first: what arrives twice for
one parameter is added in the order of its arrival, and sums do not depend on how long copies take.

A gradient's device memory is its copies' until the last of them has landed. It counts from its
start: at most `device_bytes` of gradients are on their way while the next one is produced.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from offload.errors import OffloadError
from offload.partition.arrays import tensor_bits
from offload.tiers.extents import FreeRanges

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from offload.partition.blocks import BlockStore
    from offload.tiers.host import HostLease
    from offload.tiers.transfer import Transfer

_ALIGNMENT_BYTES = 256  # of ranges of the ring: what copy engines like

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Copy(Generic[T]):
    """One copy in flight, in `memory`: the ring from `start` on, or a `lease` of its own."""

    what: T
    transfer: Transfer
    memory: torch.Tensor
    dtype: torch.dtype
    start: int | None
    lease: HostLease | None
    gives_back: int


class LandingRing(Generic[T]):
    """The copies of gradients that are on their way; see [Note: Landing].

    Not thread-safe: the gradients' home calls it under its lock. `T` is what the caller wants to
    know again when a copy has landed.

    Attributes:
        device_bytes: the most bytes of gradients that may be on their way.
        leaving_bytes: those that are.
    """

    def __init__(self, store: BlockStore, *, depth: int, device_bytes: int) -> None:
        self.device_bytes = device_bytes
        self.leaving_bytes = 0
        self._store = store
        self._depth = depth
        self._ring_bytes = 0
        self._ring: HostLease | None = None
        self._free = FreeRanges(0)
        self._in_flight: deque[_Copy[T]] = deque()

    def __len__(self) -> int:
        """Copies that nobody has taken yet."""
        return len(self._in_flight)

    def admit(self, chunk_bytes: int) -> None:
        """Chunks of `chunk_bytes` will land: the next ring has room for `depth` of them."""
        self._ring_bytes = max(self._ring_bytes, self._depth * chunk_bytes)

    def has_room_for(self, gradient_bytes: int) -> bool:
        """Whether a gradient of so many device bytes may set out beside those on their way."""
        return not self._in_flight or self.leaving_bytes + gradient_bytes <= self.device_bytes

    def start(self, values: torch.Tensor, what: T, *, gives_back: int, owner: str) -> bool:
        """Start the copy of device values, 1-D; False, and nothing started: the host has no room.

        Args:
            values: nobody may write them until the copy has ended.
            what: `oldest` when it is this copy's turn.
            gives_back: bytes of the gradient that the device is free of when this copy, its last,
                has been taken; 0 for its others.
            owner: who asks, for messages.
        """
        nbytes = values.numel() * values.dtype.itemsize
        place = self._place(nbytes, owner)
        if place is None:
            return False
        memory, start, lease = place
        try:
            source = values.view(torch.uint8)
            transfer = self._store.device.start_copy_out(memory, source, owner)
        except BaseException:
            self._give_back(start, nbytes, lease)
            raise
        self.leaving_bytes += gives_back
        self._in_flight.append(
            _Copy(what, transfer, memory, values.dtype, start, lease, gives_back)
        )
        return True

    @property
    def oldest(self) -> T:
        """What was said of the copy that was started first."""
        return self._in_flight[0].what

    @property
    def has_landed(self) -> bool:
        """Whether the oldest copy can be taken without waiting."""
        return bool(self._in_flight) and self._in_flight[0].transfer.done()

    @contextlib.contextmanager
    def taken(self) -> Iterator[npt.NDArray[np.generic]]:
        """The bits of the oldest copy, once it has ended; its memory is given back after the block.

        Raises:
            DeadlineError: it is still in flight, and still the oldest.
            StorageError: it has failed.
        """
        copy = self._in_flight[0]
        try:
            copy.transfer.wait(self._store.deadline_seconds)
            yield tensor_bits(copy.memory.view(copy.dtype))
        finally:
            if copy.transfer.done():
                self._in_flight.popleft()
                self.leaving_bytes -= copy.gives_back
                self._give_back(copy.start, copy.memory.numel(), copy.lease)

    def clear(self) -> None:
        """Wait for what is in flight and forget it; what is late keeps its memory till it ends."""
        late: list[Transfer] = []  # that have parts of the ring
        ring = self._ring
        deadline = time.monotonic() + self._store.deadline_seconds
        while self._in_flight:
            copy = self._in_flight.popleft()
            self.leaving_bytes -= copy.gives_back
            with contextlib.suppress(OffloadError):
                copy.transfer.wait(max(0.0, deadline - time.monotonic()))
            if copy.transfer.done():
                self._give_back(copy.start, copy.memory.numel(), copy.lease)
            elif copy.lease is not None:
                self._store.late.keep([copy.transfer], copy.lease.release)
            else:
                late.append(copy.transfer)
                self._ring = None  # the next copy has one of its own
        if late and ring is not None:
            self._store.late.keep(late, ring.release)

    def _place(
        self, nbytes: int, owner: str
    ) -> tuple[torch.Tensor, int | None, HostLease | None] | None:
        if self._ring is None and not self._in_flight and nbytes <= self._ring_bytes:
            self._ring = self._store.host.try_lease(self._ring_bytes, "landing gradients")
            self._free = FreeRanges(self._ring_bytes)
        if self._ring is not None:
            start = self._free.take(_rounded(nbytes))
            if start is not None:
                return self._ring.tensor[start : start + nbytes], start, None
        if self._in_flight:
            return None  # the ring is full
        lease = self._store.host.try_lease(nbytes, owner)
        return None if lease is None else (lease.tensor, None, lease)

    def _give_back(self, start: int | None, nbytes: int, lease: HostLease | None) -> None:
        if lease is not None:
            lease.release()
        elif start is not None and self._ring is not None:
            self._free.put_back(start, _rounded(nbytes))
        if self._ring is not None and not self._in_flight:
            self._ring.release()
            self._ring = None


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
