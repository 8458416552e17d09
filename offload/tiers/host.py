"""The host tier: an arena of memory, leased in exact sizes.

[Note: host arena]

The arena is one anonymous mapping, so it can be page-locked for the accelerator once and
registered with the I/O engine once. Leases are first fit, rounded up to whole pages; the rounded
size counts.

An arena that has to `grow` gets one more mapping, a *segment*, prepared as the first one was. A
lease lies in one segment, because neither a copy nor a request may cross two registrations. The
newest segment with room is taken: what the arena has grown for finds its place there, whatever is
free elsewhere. What may have to make way one day is leased from a segment of its own, with which
the arena can `shrink`: its bytes can then be any other lease's, however long that is.

Under memory pressure the arena can `fit`: what nobody leases any more goes back to the system, also
from the middle of a segment. Such a range is *given up*, it is never leased again, and the parts
that are left of the segment are prepared anew, each by itself: a registered buffer holds on to its
pages.

[Note: visitors]

What runs beside training, a checkpoint that is copied, has no memory of its own: it *visits* what
staging leaves free, for a short time. Who finds no room while there are visitors waits for them to
leave (`wait_for_visitors`, `lease`), and nobody comes to visit while somebody waits.

[Note: page-locking]

CUDA copies asynchronously from and to page-locked memory only. Each segment is registered with it
as a whole, not in pieces: a copy that crosses two registrations is an error. Where CUDA refuses,
for want of lockable memory, the segment stays pageable, with a warning: all works, and copies hold
up whoever starts them.
"""

from __future__ import annotations

import mmap
import os
import warnings
from typing import TYPE_CHECKING, Any, Protocol

import torch

from offload.errors import BudgetError, format_bytes
from offload.tiers.extents import PAGE_BYTES, FreeRanges, round_up_to_page
from offload.tiers.memory import map_shared
from offload.tiers.owners import OwnerBytes
from offload.tiers.uninterrupted import UninterruptedLock

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

_VISIT_SECONDS = 60.0  # the deadline of a transfer, by default
_MADV_POPULATE_WRITE = 23  # linux/mman.h, Linux 5.14


class RegistersMemory(Protocol):
    """An I/O engine, seen as something to register a buffer with."""

    def register(self, address: int, nbytes: int) -> str:
        """Prepare memory that many requests will use; return "ok" or why it did not work."""

    def unregister(self, address: int) -> None:
        """Undo `register`; nothing if there is nothing to undo."""


class HostSegment:
    """One mapping of an arena, and what of it is free.

    `parts` are the ranges, (start, end), that have not been given up, ascending.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.free = FreeRanges(nbytes)
        self.parts = [(0, nbytes)]
        self.mapping = map_shared(nbytes)
        self.memory = torch.frombuffer(self.mapping, dtype=torch.uint8)  # (nbytes,)
        self.address = self.memory.data_ptr()
        self._page_locked: list[int] = []  # starts of parts

    def register_with(self, io: RegistersMemory) -> str:
        """Register every part; return "ok" or why one did not work."""
        results = [io.register(self.address + start, end - start) for start, end in self.parts]
        return next((result for result in results if result != "ok"), "ok")

    def unregister_from(self, io: RegistersMemory) -> None:
        """Undo `register_with`."""
        for start, _ in self.parts:
            io.unregister(self.address + start)

    def page_lock(self) -> None:
        """Page-lock every part, or warn that CUDA refuses."""
        assert not self._page_locked
        for start, end in self.parts:
            try:
                result: Any = torch.cuda.cudart().cudaHostRegister(
                    self.address + start, end - start, 0
                )
                refused = "" if int(result) == 0 else str(result)
            except RuntimeError as error:  # cudart() itself finds no usable device
                refused = str(error)
            if not refused:
                self._page_locked.append(start)
                continue
            warnings.warn(
                f"CUDA cannot page-lock {format_bytes(end - start)} of host memory ({refused}): "
                "copies from and to the device will not run beside the work that starts them; "
                "lower tiers.host.memory, or raise the limit of locked memory (ulimit -l)",
                stacklevel=2,
            )

    def page_unlock(self) -> None:
        """Undo `page_lock`."""
        while self._page_locked:
            torch.cuda.cudart().cudaHostUnregister(self.address + self._page_locked.pop())

    def take_free(self) -> list[tuple[int, int]]:
        """Take all that is free, as ranges (start, end), ascending."""
        taken = self.free.ranges()
        for start, end in taken:
            self.free.take(end - start)  # the first that there is
        return taken

    def give_up(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Give the memory of ranges that have been taken back to the system, for good.

        The segment is neither registered nor page-locked.
        """
        edges = [0, *(edge for each in ranges for edge in each), self.nbytes]
        between = zip(edges[::2], edges[1::2], strict=True)
        self.parts = [
            (max(start, low), min(end, high))
            for low, high in between
            for start, end in self.parts
            if max(start, low) < min(end, high)
        ]
        for start, end in ranges:
            self.mapping.madvise(mmap.MADV_REMOVE, start, end - start)

    def close(self) -> None:
        """Give the memory back; tensors that still exist stay readable, as zeros."""
        self.page_unlock()
        # Tensors of forgotten leases may keep the mapping; they do not keep its pages.
        self.mapping.madvise(mmap.MADV_REMOVE)
        self.memory = torch.empty(0, dtype=torch.uint8)


class HostArena:
    """`budget_bytes` of host memory; see [Note: host arena]. Thread-safe.

    After `close()` no lease can be taken; tensors that still exist stay readable, as zeros.

    Raises:
        ValueError: the budget is below one page.
        BudgetError: the system refuses to map that much.
    """

    tier = "host"

    def __init__(self, budget_bytes: int, *, alignment: int = PAGE_BYTES) -> None:
        if alignment % PAGE_BYTES or alignment <= 0:
            raise ValueError(f"alignment {alignment} is not a multiple of {PAGE_BYTES}")
        if budget_bytes < alignment:
            raise ValueError(
                f"a host budget of {budget_bytes} bytes is below one lease's alignment"
            )
        self.budget_bytes = 0
        self.alignment = alignment
        self.used_bytes = 0
        self.peak_bytes = self.step_peak_bytes = 0
        self._pid = os.getpid()
        self._lock = UninterruptedLock()
        self._left = self._lock.condition()
        self._num_visitors = self._num_waiting = 0
        self._owners = OwnerBytes()
        self._io: RegistersMemory | None = None
        self._locks_pages = False
        self._closed = False
        self._segments: list[HostSegment] = []
        self.grow(budget_bytes // alignment * alignment)

    @property
    def address(self) -> int:
        """Where the first segment starts."""
        return self._segments[0].address

    def grow(self, nbytes: int) -> HostSegment:
        """Add `nbytes` (rounded up to the alignment) to the budget, prepared as the rest is.

        Leases of up to that size together find room in it at once. After an error the arena is as
        before.

        Raises:
            BudgetError: the system refuses to map that much.
        """
        assert not self._closed, "growth of a closed arena"
        segment = self._map(self._rounded(nbytes))
        self._prepare(segment)
        with self._lock:
            self._segments.append(segment)
            self.budget_bytes += segment.nbytes
        return segment

    def _prepare(self, segment: HostSegment) -> None:
        if self._locks_pages:
            segment.page_lock()
        if self._io is not None:
            segment.register_with(self._io)

    def shrink(self, segment: HostSegment) -> None:
        """Undo `grow`: give the memory back to the system; none of it may be leased."""
        with self._lock:
            assert segment.free.largest == segment.nbytes, "a segment that is leased from"
            self._segments.remove(segment)
            self.budget_bytes -= segment.nbytes
        if self._io is not None:
            segment.unregister_from(self._io)
        segment.close()

    def fit(self, leases: Sequence[HostLease], free_bytes: int) -> None:
        """Release these leases, and shrink to what is leased then and `free_bytes` in one piece.

        What is given up goes back to the system at once, and the budget shrinks by it. No transfer
        may be in flight anywhere in the arena.

        Raises:
            BudgetError: the system maps no segment of `free_bytes`; nothing has changed.
        """
        room = self._map(self._rounded(free_bytes)) if free_bytes else None
        for lease in leases:
            lease.release()
        with self._lock:
            given_up = [(segment, segment.take_free()) for segment in self._segments]
            self.budget_bytes -= sum(end - start for _, free in given_up for start, end in free)
        for segment, free in given_up:
            if not free:
                continue
            if self._io is not None:
                segment.unregister_from(self._io)
            segment.page_unlock()
            segment.give_up(free)
            self._prepare(segment)
        if room is not None:
            self._prepare(room)
        for segment in self._segments:
            if not segment.parts:
                segment.close()
        with self._lock:
            self._segments = [segment for segment in self._segments if segment.parts]
            if room is not None:
                self._segments.append(room)
                self.budget_bytes += room.nbytes

    def _map(self, nbytes: int) -> HostSegment:
        try:
            return HostSegment(nbytes)
        except (OSError, ValueError, OverflowError) as error:
            raise BudgetError(
                tier=self.tier,
                requested_bytes=nbytes,
                free_bytes=0,
                budget_bytes=self.budget_bytes + nbytes,
                owner="the arena",
                remedy=f"the system maps no more ({error}): lower tiers.host.memory",
            ) from error

    def lease(self, nbytes: int, owner: str) -> HostLease:
        """Lease `nbytes`, rounded up to pages; `owner` is who asks, for messages.

        Raises:
            BudgetError: no free range is that long; it says who holds what.
        """
        lease = self.try_lease(nbytes, owner)
        while lease is None and self.wait_for_visitors():
            lease = self.try_lease(nbytes, owner)
        if lease is None:
            with self._lock:
                raise self._exceeded(nbytes, owner)
        return lease

    def visit(self, nbytes: int, owner: str) -> HostLease | None:
        """`try_lease` for a short time; see [Note: visitors]."""
        with self._lock:
            if self._num_waiting:
                return None
        lease = self.try_lease(nbytes, owner)
        if lease is not None:
            with self._lock:
                lease.visits = True
                self._num_visitors += 1
        return lease

    def wait_for_visitors(self) -> bool:
        """Wait until a visitor leaves; False: there is none, or none leaves for long."""
        with self._lock:
            if not self._num_visitors:
                return False
            self._num_waiting += 1
            try:
                return self._left.wait(_VISIT_SECONDS)
            finally:
                self._num_waiting -= 1

    def try_lease(self, nbytes: int, owner: str) -> HostLease | None:
        """Lease `nbytes`, or return None where `lease` would raise."""
        size = self._rounded(nbytes)
        with self._lock:
            assert not self._closed, "lease from a closed arena"
            for segment in reversed(self._segments):
                start = segment.free.take(size)
                if start is not None:
                    break
            else:
                return None
            self.used_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
            self.step_peak_bytes = max(self.step_peak_bytes, self.used_bytes)
            self._owners.add(owner, size)
        return HostLease(self, segment, start, nbytes, owner)

    def pretouch(self) -> None:
        """Back the whole arena with physical pages now; call it before the first lease."""
        assert not self._closed
        for segment in self._segments:
            try:
                segment.mapping.madvise(_MADV_POPULATE_WRITE)
            except OSError:  # older kernel
                assert self.used_bytes == 0, "pretouch writes; it must come before the first lease"
                segment.memory[::PAGE_BYTES] = 0

    def register_with(self, io: RegistersMemory) -> str:
        """Register the whole arena with an I/O engine; return "ok" or why it did not work."""
        self._io = io
        results = [segment.register_with(io) for segment in self._segments]
        return next((result for result in results if result != "ok"), "ok")

    def page_lock(self) -> None:
        """Page-lock the arena, also where it grows later; see [Note: page-locking]."""
        assert not self._locks_pages
        self._locks_pages = True
        for segment in self._segments:
            segment.page_lock()

    def owners(self) -> str:
        """Who holds what, for messages."""
        with self._lock:
            return self._owners.table()

    def close(self) -> None:
        """Give the memory back. In a forked child, and the second time, this does nothing.

        No transfer may be in flight on a lease.
        """
        with self._lock:
            if self._closed or os.getpid() != self._pid:
                return
            self._closed = True
        for segment in self._segments:
            segment.close()

    def _rounded(self, nbytes: int) -> int:
        assert nbytes > 0, "a lease of nothing"
        return -(-nbytes // self.alignment) * self.alignment

    def _exceeded(self, nbytes: int, owner: str) -> BudgetError:
        free_bytes = self.budget_bytes - self.used_bytes
        largest = max((segment.free.largest for segment in self._segments), default=0)
        broken = (
            "" if largest == free_bytes else f" (the longest free range is {format_bytes(largest)})"
        )
        return BudgetError(
            tier=self.tier,
            requested_bytes=self._rounded(nbytes),
            free_bytes=free_bytes,
            budget_bytes=self.budget_bytes,
            owner=owner,
            remedy="raise tiers.host.memory, or place less state on the host"
            f"{broken}; held now: {self._owners.table()}",
        )

    def _take_back(self, lease: HostLease, segment: HostSegment, start: int) -> None:
        size = self._rounded(lease.nbytes)
        with self._lock:
            if lease.released:
                raise AssertionError(f"host lease of {lease.owner} released twice")
            lease.released = True
            if lease.visits:
                self._num_visitors -= 1
                self._left.notify_all()
            segment.free.put_back(start, size)
            self.used_bytes -= size
            self._owners.remove(lease.owner, size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class HostLease:
    """The right to use `nbytes` of the arena at `address`, until `release()`.

    `tensor` is uint8, 1-D, of exactly `nbytes`; its contents are undefined at first. The memory
    past it, up to the next page, is the lease's too: `padded` shows it.
    """

    __slots__ = (
        "_arena",
        "_segment",
        "_start",
        "address",
        "nbytes",
        "owner",
        "released",
        "tensor",
        "visits",
    )

    def __init__(
        self, arena: HostArena, segment: HostSegment, start: int, nbytes: int, owner: str
    ) -> None:
        self._arena = arena
        self._segment = segment
        self._start = start
        self.address = segment.address + start
        self.nbytes = nbytes
        self.owner = owner
        self.released = False
        self.visits = False
        self.tensor = segment.memory.narrow(0, start, nbytes)

    @property
    def padded(self) -> torch.Tensor:
        """The lease's memory up to the end of its last page; uint8, 1-D."""
        return self._segment.memory.narrow(0, self._start, round_up_to_page(self.nbytes))

    def view(self, dtype: torch.dtype, offset_bytes: int, numel: int) -> torch.Tensor:
        """Return a 1-D tensor of `numel` elements of `dtype` over the lease at `offset_bytes`."""
        assert not self.released
        end = offset_bytes + numel * dtype.itemsize
        assert 0 <= offset_bytes <= end <= self.nbytes, "view beyond the lease"
        return self.tensor[offset_bytes:end].view(dtype)

    def release(self) -> None:
        """Return the lease; exactly once, with no transfer in flight on it."""
        self._arena._take_back(self, self._segment, self._start)

    def __repr__(self) -> str:
        state = ", released" if self.released else ""
        return f"HostLease({self.owner!r}, {self.nbytes} bytes{state})"
