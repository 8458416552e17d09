"""The device tier of an accelerator: streams with their arrows, and memory that is set aside once.

[Note: streams]

compute  the stream that a thread queues its work on; forward, backward and update kernels
h2d      fetches; a stream of its own, so that weights arrive while kernels run
d2h      departing gradients and state; not the h2d stream, because the two directions have copy
         engines of their own, and a departing gradient would hold up the next weight

An arrow orders what is queued later on its second stream after what is queued now on its first:

    A1  compute --at start-----> copy     what was queued on the buffers before the copy
    A2  copy ----end-----------> compute  `make_current_wait`: who has fetched a page
    A3  h2d ----on first use---> compute  `enter`: who uses a page that another stream has fetched
    A4  compute --at release---> h2d      `renew`: every stream that has used what is copied over
    A5  compute --at a mark----> beside   `mark`, `after`: copies that another thread starts

With one compute stream A1 and A2 are enough: whatever is leased again was used on the stream that
starts the copy. A3 and A4 are for a user who runs the model on several, and for backward, whose
nodes run on the streams of their forward.

A5 stands for A1 where the copy is started by a thread that has no stream of its users, or long
after them: beside the computation. `mark` is called by the thread that has queued the last work
which uses the memory, and `after` makes the copy wait for that, and for nothing that is queued
meanwhile. What it copies must not be used from the mark to the end of the copy.

[Note: slab]

The working set is one allocation, the *slab*: leases of pages are cut from it by the shortest range
that fits, so that the device's own allocator is not asked in a step, and what a page leaves behind
fits the next of its size. A lease that must be, finds no range and nobody can make room for it,
lies beside the slab.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from offload.tiers.device import DeviceLease, DeviceTier
from offload.tiers.extents import FreeRanges, round_up_to_page
from offload.tiers.transfer import CopyLane, Transfer

Stream = object  # what `_current` returns: equal for one stream
Event = object  # what `_record` returns


class AcceleratorTier(DeviceTier):
    """A device that host code cannot address; see [Note: streams] and [Note: slab]."""

    def __init__(self, device: torch.device, budget_bytes: int) -> None:
        super().__init__(device, budget_bytes, host_addressable=False)
        self._slab: torch.Tensor | None = None
        self._ranges = FreeRanges(0)

    # -- streams ---------------------------------------------------------------------------------

    @abstractmethod
    def _current(self) -> Stream:
        """The stream that this thread queues device work on."""

    @abstractmethod
    def _lane_stream(self, lane: CopyLane) -> Stream:
        """The stream of the copies of one direction."""

    @abstractmethod
    def _record(self, stream: Stream) -> Event:
        """An event after all that is queued on the stream."""

    @abstractmethod
    def _wait(self, stream: Stream, event: Event) -> None:
        """Let what is queued on the stream from now on wait for the event."""

    @abstractmethod
    def _beside(self) -> AbstractContextManager[object]:
        """A block in which this thread queues its work on a stream that nobody computes on."""

    @abstractmethod
    def _copy(self, dst: torch.Tensor, src: torch.Tensor, lane: CopyLane, what: str) -> Transfer:
        """Queue a copy on the stream of its lane."""

    def start_copy_in(self, dst: torch.Tensor, src: torch.Tensor, what: str = "") -> Transfer:
        return self._start_copy(dst, src, "h2d", what)

    def start_copy_out(self, dst: torch.Tensor, src: torch.Tensor, what: str = "") -> Transfer:
        return self._start_copy(dst, src, "d2h", what)

    def enter(self, lease: DeviceLease) -> None:
        current = self._current()
        if current in lease.streams:
            return
        if lease.streams:  # A3; the first one has waited for its own fetch
            self._wait(current, self._record(self._lane_stream("h2d")))
        lease.streams.add(current)

    def renew(self, lease: DeviceLease) -> None:
        for stream in lease.streams:
            self._wait(self._lane_stream("h2d"), self._record(stream))  # A4
        lease.streams.clear()

    def mark(self) -> Event:
        return self._record(self._current())

    @contextmanager
    def after(self, mark: object) -> Iterator[None]:
        with self._beside():
            self._wait(self._current(), mark)  # A5
            yield

    def _start_copy(
        self, dst: torch.Tensor, src: torch.Tensor, lane: CopyLane, what: str
    ) -> Transfer:
        assert dst.dtype == src.dtype == torch.uint8
        assert dst.numel() == src.numel(), "copy between different sizes"
        self._wait(self._lane_stream(lane), self._record(self._current()))  # A1
        return self._copy(dst, src, lane, what or f"copy {lane}")

    # -- memory ----------------------------------------------------------------------------------

    def reserve(self, nbytes: int) -> None:
        with self._lock:
            if self._ranges.largest != self._ranges.size:
                return  # somebody uses the slab: it stays as it is
            self._slab, self._ranges = None, FreeRanges(0)
        if not nbytes:
            return
        try:
            slab = self._allocate(nbytes)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._exceeded(nbytes, "weights that come and go", refused=str(error)) from error
        with self._lock:
            self._slab, self._ranges = slab, FreeRanges(nbytes)

    def has_room(self, nbytes: int) -> bool:
        size = round_up_to_page(nbytes)
        with self._lock:
            return self._admits(size) and (self._slab is None or self._ranges.largest >= size)

    def try_lease(self, nbytes: int, owner: str, *, beside: bool = False) -> DeviceLease | None:
        if beside or self._slab is None:
            return super().try_lease(nbytes, owner, beside=beside)
        size = round_up_to_page(nbytes)
        with self._lock:
            start = self._ranges.take_best(size) if self._admits(size) else None
            if start is None:
                return None
            self._count(size)
            self._owners.add(owner, size)
            return DeviceLease(self, self._slab.narrow(0, start, size), nbytes, owner)

    def close(self) -> None:
        super().close()
        with self._lock:
            self._slab = None

    def _take_back(self, lease: DeviceLease, memory: torch.Tensor) -> None:
        self.renew(lease)
        with self._lock:
            in_slab = self._slab is not None and _is_part(memory, self._slab)
            if in_slab and not lease.released:
                lease.released = True
                self.used_bytes -= memory.numel()
                self._owners.remove(lease.owner, memory.numel())
                self._ranges.put_back(int(memory.storage_offset()), memory.numel())
                return
        super()._take_back(lease, memory)


def _is_part(memory: torch.Tensor, slab: torch.Tensor) -> bool:
    return memory.untyped_storage().data_ptr() == slab.untyped_storage().data_ptr()
