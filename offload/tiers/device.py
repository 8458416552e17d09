"""The device tier: a budget, leases of it, and copies between it and the host.

[Note: device budget]

    leased + held + free-listed <= budget, at every moment

leased       memory of outstanding leases; each lease is an allocation of its own, whole pages
held         bytes that someone else allocated and reported (gradients in flight)
free-listed  memory of returned leases, kept by exact size for the next lease; given back to the
             system as soon as a lease or a hold needs the room

So a lease fails only when leased + held would exceed the budget: never by fragmentation.
`used_bytes` and `peak_bytes` count leased + held.
"""

from __future__ import annotations

import contextlib
import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import cast

import torch

from offload.errors import BudgetError, EngineStateError, OffloadError, UnsupportedPlatformError
from offload.tiers.extents import round_up_to_page
from offload.tiers.memory import map_shared
from offload.tiers.owners import OwnerBytes
from offload.tiers.transfer import (
    DEFAULT_DEADLINE_SECONDS,
    AsyncIo,
    CompletedTransfer,
    CopyLane,
    LaneTotals,
    TicketTransfer,
    Transfer,
)
from offload.tiers.uninterrupted import UninterruptedLock
from offload.timeline import NEVER, Timeline

_construct_storage = cast(
    "Callable[[int, torch.device, int], torch.UntypedStorage] | None",
    getattr(torch._C, "_construct_storage_from_data_pointer", None),
)


class DeviceTier(ABC):
    """Memory of one device under a budget; see [Note: device budget]. Thread-safe.

    `host_addressable`: whether host code may read and write leases directly.
    `timeline` is told of copies that have ended, `step_peak_bytes` the peak since it was last set.
    After `close()` no lease or hold can be taken.
    """

    tier = "device"

    def __init__(self, device: torch.device, budget_bytes: int, *, host_addressable: bool) -> None:
        self.device = device
        self.budget_bytes = budget_bytes
        self.host_addressable = host_addressable
        self.used_bytes = 0
        self.peak_bytes = self.step_peak_bytes = 0
        self.timeline: Timeline = NEVER
        self._lock = UninterruptedLock()
        self._owners = OwnerBytes()
        self._held_bytes = 0
        self._free: dict[int, list[torch.Tensor]] = {}  # by size, oldest first
        self._free_bytes = 0
        self._closed = False

    def lease(self, nbytes: int, owner: str) -> DeviceLease:
        """Lease `nbytes`, counted in whole pages; `owner` is who asks, for messages.

        Raises:
            BudgetError: leased + held bytes would exceed the budget, or the device itself has no
                more memory; it says who holds what.
        """
        lease = self.try_lease(nbytes, owner, beside=True)
        if lease is None:
            raise self._exceeded(round_up_to_page(nbytes), owner)
        return lease

    def reserve(self, nbytes: int) -> None:
        """Set memory aside for the leases of `try_lease`, in place of what was set aside before.

        Tiers whose allocator does not break memory up set nothing aside.

        Raises:
            BudgetError: the device itself has no more memory.
        """
        del nbytes

    def has_room(self, nbytes: int) -> bool:
        """Whether `try_lease` would return a lease now."""
        with self._lock:
            return self._admits(round_up_to_page(nbytes))

    def enter(self, lease: DeviceLease) -> None:
        """This thread is about to queue device work that uses `lease`, which has been copied to.

        Until the lease is renewed or released, all that it queues on its stream may use it.
        """
        del lease

    def renew(self, lease: DeviceLease) -> None:
        """Order copies into `lease` after every use of it so far; `enter` it again after them."""
        del lease

    def mark(self) -> object:
        """All device work that this thread has queued so far, for `after`."""
        return None

    @contextlib.contextmanager
    def after(self, mark: object) -> Iterator[None]:
        """A block in which copies that this thread starts wait for a mark, and for no later work.

        Whoever starts one knows that nothing later uses its memory before it has ended.
        """
        del mark  # nothing is queued here
        yield

    def try_lease(self, nbytes: int, owner: str, *, beside: bool = False) -> DeviceLease | None:
        """Lease `nbytes`, or return None where the budget, or what was reserved, has no room.

        `beside`: not of what was reserved.

        Raises:
            BudgetError: the budget has room but the device itself has no more memory.
        """
        del beside  # nothing is reserved here
        assert nbytes > 0, "a lease of nothing"
        size = round_up_to_page(nbytes)
        with self._lock:
            if not self._admits(size):
                return None
            kept = self._free.get(size)
            memory = kept.pop() if kept else None
            if memory is not None:
                self._free_bytes -= size
            surplus = self._shed(size)
            self._count(size)
            self._owners.add(owner, size)
        self._give_back(surplus)  # before new memory is asked for
        try:
            if memory is None:
                memory = self._allocate(size)
            else:
                self._prepare(memory)
        except (OSError, ValueError, RuntimeError) as error:
            with self._lock:
                self.used_bytes -= size
                self._owners.remove(owner, size)
            raise self._exceeded(size, owner, refused=str(error)) from error
        return DeviceLease(self, memory, nbytes, owner)

    def hold(self, nbytes: int, owner: str) -> None:
        """Count `nbytes` that `owner` allocated itself.

        Raises:
            BudgetError: leased + held bytes would exceed the budget.
        """
        if not self.try_hold(nbytes, owner):
            raise self._exceeded(nbytes, owner)

    def try_hold(self, nbytes: int, owner: str) -> bool:
        """Count `nbytes` that `owner` is about to allocate itself; False = no room, not counted."""
        del owner  # holds are unheld by amount alone; they stand in one row of the table
        with self._lock:
            if not self._admits(nbytes):
                return False
            surplus = self._shed(nbytes)
            self._count(nbytes)
            self._held_bytes += nbytes
        self._give_back(surplus)
        return True

    def unhold(self, nbytes: int) -> None:
        """Uncount bytes of earlier holds."""
        with self._lock:
            assert 0 <= nbytes <= self._held_bytes, "unhold of more than is held"
            self._held_bytes -= nbytes
            self.used_bytes -= nbytes

    def owners(self) -> str:
        """Who holds what, for messages."""
        with self._lock:
            held = f"; held by others: {self._held_bytes} bytes" if self._held_bytes else ""
            return self._owners.table() + held

    def close(self) -> None:
        """Give free-listed memory back; outstanding leases keep theirs until their release."""
        with self._lock:
            self._closed = True
            surplus = self._shed(self.budget_bytes)
        self._give_back(surplus)

    @abstractmethod
    def start_copy_in(self, dst: torch.Tensor, src: torch.Tensor, what: str = "") -> Transfer:
        """Start to copy host bytes into device memory, on lane h2d.

        `dst` (device) and `src` (host) are uint8, 1-D, of one size. The copy starts after the work
        that was queued on `dst` before this call; later work needs `make_current_wait`. `what` is
        copied, for messages and the timeline.
        """

    @abstractmethod
    def start_copy_out(self, dst: torch.Tensor, src: torch.Tensor, what: str = "") -> Transfer:
        """Start to copy device bytes to the host, on lane d2h; `dst` is host, `src` device.

        Both are uint8, 1-D, of one size. The copy starts after the work that was queued on `src`
        before this call.
        """

    @abstractmethod
    def make_current_wait(self, transfer: Transfer) -> None:
        """Order the device work that this thread queues next after `transfer`, on its stream.

        Without an asynchronous device this settles it, and raises what `transfer.wait()` raises.
        """

    @abstractmethod
    def lanes(self) -> LaneTotals:
        """Bytes and busy seconds of the lanes h2d and d2h since the start."""

    @abstractmethod
    def _allocate(self, nbytes: int) -> torch.Tensor:
        """Return new memory, uint8, 1-D. Raises OSError, ValueError or RuntimeError."""

    def _prepare(self, memory: torch.Tensor) -> None:
        """Memory is leased again, so it is worth being prepared for transfers. May be repeated."""
        del memory

    def _give_back(self, surplus: list[torch.Tensor]) -> None:
        """Let memory that nobody has leased go back to the system."""
        surplus.clear()

    def _admits(self, nbytes: int) -> bool:
        if self._closed:
            raise EngineStateError("the device tier is closed")
        return self.used_bytes + nbytes <= self.budget_bytes

    def _count(self, nbytes: int) -> None:
        self.used_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        self.step_peak_bytes = max(self.step_peak_bytes, self.used_bytes)

    def _shed(self, nbytes: int) -> list[torch.Tensor]:
        """Take from the free list what must go so that `nbytes` more fit; the caller drops it."""
        surplus: list[torch.Tensor] = []
        for size in sorted(self._free, reverse=True):
            kept = self._free[size]
            while kept and self.used_bytes + self._free_bytes + nbytes > self.budget_bytes:
                surplus.append(kept.pop(0))
                self._free_bytes -= size
            if not kept:
                del self._free[size]
        return surplus

    def _exceeded(self, nbytes: int, owner: str, *, refused: str = "") -> BudgetError:
        cause = f"the device itself refuses ({refused}): lower" if refused else "raise"
        return BudgetError(
            tier=self.tier,
            requested_bytes=nbytes,
            free_bytes=self.budget_bytes - self.used_bytes,
            budget_bytes=self.budget_bytes,
            owner=owner,
            remedy=f"{cause} tiers.device.memory, or place less state on the device; "
            f"held now: {self.owners()}",
        )

    def _take_back(self, lease: DeviceLease, memory: torch.Tensor) -> None:
        size = memory.numel()
        with self._lock:
            if lease.released:
                raise AssertionError(f"device lease of {lease.owner} released twice")
            lease.released = True
            self.used_bytes -= size
            self._owners.remove(lease.owner, size)
            if not self._closed:
                self._free.setdefault(size, []).append(memory)
                self._free_bytes += size
                return
        self._give_back([memory])


class DeviceLease:
    """The right to use `nbytes` of device memory, until `release()`.

    `tensor` is uint8, 1-D, on the device, of exactly `nbytes`; undefined at first.
    `streams` are those that `DeviceTier.enter` has seen.
    """

    __slots__ = ("_memory", "_tier", "nbytes", "owner", "released", "streams", "tensor")

    def __init__(self, tier: DeviceTier, memory: torch.Tensor, nbytes: int, owner: str) -> None:
        self._tier = tier
        self._memory = memory
        self.nbytes = nbytes
        self.owner = owner
        self.released = False
        self.streams: set[object] = set()
        self.tensor = memory.narrow(0, 0, nbytes)

    def storage_at(self, offset_bytes: int, nbytes: int) -> torch.UntypedStorage:
        """Return a storage that aliases `nbytes` of the lease; it must not be used after release.

        Raises:
            UnsupportedPlatformError: this torch cannot alias device memory.
        """
        assert not self.released
        assert 0 <= offset_bytes <= offset_bytes + nbytes <= self.nbytes, "storage beyond the lease"
        return _alias(self._memory.data_ptr() + offset_bytes, nbytes, self._tier.device)

    def release(self) -> None:
        """Return the lease; exactly once, with no transfer in flight on it."""
        self._tier._take_back(self, self._memory)

    def __repr__(self) -> str:
        state = ", released" if self.released else ""
        return f"DeviceLease({self.owner!r}, {self.nbytes} bytes{state})"


def _alias(address: int, nbytes: int, device: torch.device) -> torch.UntypedStorage:
    if _construct_storage is not None:
        return _construct_storage(address, device, nbytes)
    if device.type != "cpu":
        raise UnsupportedPlatformError(
            f"torch {torch.__version__} cannot make a storage over {device} memory",
            remedy="use torch 2.11 to 2.13",
        )
    memory = (ctypes.c_uint8 * nbytes).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()


class CpuDeviceTier(DeviceTier):
    """A budgeted part of host memory in the place of an accelerator's.

    Copies run on the copy threads of `io_engine`, which is the caller's and is closed after. It
    also reads from disks into leases: what is leased more than once is registered with it.
    """

    def __init__(
        self,
        budget_bytes: int,
        io_engine: AsyncIo,
        *,
        deadline_seconds: float = DEFAULT_DEADLINE_SECONDS,
    ) -> None:
        super().__init__(torch.device("cpu"), budget_bytes, host_addressable=True)
        self._io = io_engine
        self._deadline_seconds = deadline_seconds
        # A transfer that its starter dropped still owns its buffers (P18).
        self._in_flight: list[Transfer] = []
        self._registered: set[int] = set()  # addresses, or refused for good

    def start_copy_in(self, dst: torch.Tensor, src: torch.Tensor, what: str = "") -> Transfer:
        return self._start_copy(dst, src, "h2d", what)

    def start_copy_out(self, dst: torch.Tensor, src: torch.Tensor, what: str = "") -> Transfer:
        return self._start_copy(dst, src, "d2h", what)

    def make_current_wait(self, transfer: Transfer) -> None:
        transfer.wait()

    def lanes(self) -> LaneTotals:
        totals = self._io.lanes()
        return {lane: totals[lane] for lane in ("h2d", "d2h")}

    def _allocate(self, nbytes: int) -> torch.Tensor:
        return torch.frombuffer(map_shared(nbytes), dtype=torch.uint8)

    def _prepare(self, memory: torch.Tensor) -> None:
        address = memory.data_ptr()
        with self._lock:
            is_new = address not in self._registered
            self._registered.add(address)
        if is_new:
            with contextlib.suppress(OffloadError):  # it is closed, or the parent's
                self._io.register(address, memory.numel())

    def _give_back(self, surplus: list[torch.Tensor]) -> None:
        for memory in surplus:
            address = memory.data_ptr()
            if address in self._registered:
                self._io.unregister(address)
                self._registered.discard(address)
        surplus.clear()

    def _start_copy(
        self, dst: torch.Tensor, src: torch.Tensor, lane: CopyLane, what: str
    ) -> Transfer:
        assert dst.dtype == src.dtype == torch.uint8
        assert dst.numel() == src.numel(), "copy between different sizes"
        assert dst.is_contiguous()
        assert src.is_contiguous()
        nbytes = dst.numel()
        if nbytes == 0:
            return CompletedTransfer(lane)
        ticket = self._io.start_copy(dst.data_ptr(), src.data_ptr(), nbytes, lane=lane)
        transfer = TicketTransfer(
            ticket,
            lane,
            nbytes,
            what=what or f"copy {lane}",
            buffers=(dst, src),
            deadline_seconds=self._deadline_seconds,
            timeline=self.timeline,
        )
        with self._lock:
            self._in_flight = [each for each in self._in_flight if not each.done()]
            self._in_flight.append(transfer)
        return transfer
