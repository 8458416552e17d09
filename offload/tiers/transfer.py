"""Transfers: started movements of bytes, each finished by a wait.

[Note: transfer]

A Transfer is in flight from the call that starts it until it settles. It settles once, as a success
or as an error, and only inside `wait()`: whatever a completion changes (an extent map, a budget)
changes there, in the caller's thread. Until then its buffers belong to it (P18), so it holds
references to them, and a lease must not be released while a transfer uses it. A deadline that
passes settles nothing: the bytes are still moving.

[Note: urgency]

Every lane is one queue, in the order of urgency. It is a number: the value of a class plus a place
in the class, the lower, the sooner; of equals the first.

    DEMAND    somebody waits: a fault, or a planned fetch that is waited for before it has come
    PLANNED   fetched ahead for a use whose place is known; + that place in the trace
    BULK      state that streams through: the optimizer step's chunks, gradients, write-back

A request moves block by block, so an urgent one passes a bulk one between two of its blocks. What
is not DEMAND is given to the disk only as far as keeps it busy (native/src/request_queue.hpp,
[Note: order]). A wait for a planned transfer makes it DEMAND. A wait for bulk puts it before other
bulk and no further: the optimizer step waits for each of its chunks. Who needs bulk as urgently as
a fault says so with `Transfer.expedite`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from enum import IntEnum
from typing import TYPE_CHECKING, Literal, Protocol

from offload.errors import DeadlineError, OffloadError, StorageError
from offload.native.core import BULK_URGENCY, URGENCY_CLASS_SHIFT
from offload.tiers.disks import disk_of
from offload.tiers.uninterrupted import UninterruptedLock
from offload.timeline import NEVER, Timeline

if TYPE_CHECKING:
    from offload.native.files import IoFile

DEFAULT_DEADLINE_SECONDS = 60.0
CopyLane = Literal["h2d", "d2h"]
LaneTotals = dict[str, tuple[int, float]]  # lane: (bytes, busy seconds), both since the start


class Urgency(IntEnum):
    """The classes of [Note: urgency]; a place in the class is added."""

    DEMAND = 0
    PLANNED = 1 << URGENCY_CLASS_SHIFT
    BULK = BULK_URGENCY + 1  # the place before it is for what is waited for

    @staticmethod
    def when_waited_for(urgency: int) -> int:
        """The urgency of a transfer of this urgency, once somebody waits for it."""
        return Urgency.DEMAND if urgency < BULK_URGENCY else min(urgency, BULK_URGENCY)


class Ticket(Protocol):
    """What an I/O engine returns for a started request."""

    def expedite(self, urgency: int) -> None:
        """Make what has not moved yet at least so urgent; never blocks or raises."""

    def done(self) -> bool:
        """Whether the request has ended; never blocks or raises."""

    def wait(self, timeout: float | None = None) -> int:
        """Block until the end; return the CRC32C of the bytes moved, 0 if none was asked for."""

    def span(self) -> tuple[float, float] | None:
        """When its lane has begun with it and ended, on time.perf_counter; None: nobody knows."""


class AsyncIo(Protocol):
    """The part of an I/O engine that tiers use.

    `offload.native.IoEngine` is the real one, `SimulatedIo` runs on a virtual clock.
    """

    def from_fd(self, fd: int, path: str) -> IoFile:
        """Take ownership of an open descriptor; `path` is its name in messages."""

    def start_read(
        self,
        file: IoFile,
        offset: int,
        address: int,
        nbytes: int,
        *,
        checksum_seed: int | None = None,
        urgency: int = Urgency.BULK,
    ) -> Ticket:
        """Start to read `nbytes` at `offset` of a file into memory at `address`."""

    def start_write(
        self,
        file: IoFile,
        offset: int,
        address: int,
        nbytes: int,
        *,
        checksum_seed: int | None = None,
        urgency: int = Urgency.BULK,
    ) -> Ticket:
        """Start to write `nbytes` from memory at `address` to `offset` of a file."""

    def start_copy(
        self,
        dst_address: int,
        src_address: int,
        nbytes: int,
        *,
        lane: CopyLane,
        urgency: int = Urgency.BULK,
    ) -> Ticket:
        """Start a memory copy that is counted on `lane`."""

    def register(self, address: int, nbytes: int) -> str:
        """Prepare memory that many requests will use; return "ok" or why it did not work."""

    def unregister(self, address: int) -> None:
        """Undo `register`; no request on that memory may be in flight."""

    def lanes(self) -> LaneTotals:
        """Bytes and busy seconds of each lane since the start."""


class Transfer(ABC):
    """One movement of bytes on one lane; see [Note: transfer]."""

    lane: str  # "h2d", "d2h", "nvme_read" or "nvme_write"
    nbytes: int

    @abstractmethod
    def done(self) -> bool:
        """Whether `wait()` would return or raise at once. Never blocks or raises."""

    def expedite(self, urgency: int) -> None:
        """Make it at least so urgent, see [Note: urgency]; never blocks or raises.

        Nothing changes where it has ended, or is in a stream whose order is fixed.
        """
        del urgency

    @abstractmethod
    def wait(self, timeout: float | None = None) -> None:
        """Settle the transfer; a second call returns, or raises the same error, again.

        Args:
            timeout: seconds; None = the deadline it was started with.

        Raises:
            DeadlineError: it is still in flight and still owns its buffers; wait again.
            StorageError: it failed; its buffers are free.
        """


class CompletedTransfer(Transfer):
    """A transfer that needed no movement."""

    def __init__(self, lane: str, nbytes: int = 0) -> None:
        self.lane = lane
        self.nbytes = nbytes

    def done(self) -> bool:
        return True

    def wait(self, timeout: float | None = None) -> None:
        del timeout


class TicketTransfer(Transfer):
    """A transfer that one request of an I/O engine carries out.

    Subclasses say in `_settled` what its end changes.
    """

    def __init__(
        self,
        ticket: Ticket,
        lane: str,
        nbytes: int,
        *,
        what: str,
        buffers: tuple[object, ...],
        deadline_seconds: float,
        urgency: int = Urgency.BULK,
        timeline: Timeline = NEVER,
    ) -> None:
        self.lane = lane
        self.nbytes = nbytes
        self._timeline = timeline
        self._started = time.perf_counter()
        self._what = what
        self._deadline_seconds = deadline_seconds
        self._urgency = urgency
        self._lock = UninterruptedLock()  # settling happens once; taken before any other lock
        self._ticket: Ticket | None = ticket  # None = settled
        self._buffers = buffers
        self._error: StorageError | None = None

    def done(self) -> bool:
        ticket = self._ticket
        return ticket is None or ticket.done()

    def expedite(self, urgency: int) -> None:
        ticket = self._ticket
        if urgency < self._urgency and ticket is not None:
            self._urgency = urgency
            ticket.expedite(urgency)

    def wait(self, timeout: float | None = None) -> None:
        ticket = self._ticket
        if ticket is not None:
            self.expedite(Urgency.when_waited_for(self._urgency))
            self._settle(ticket, self._deadline_seconds if timeout is None else timeout)
        if self._error is not None:
            raise self._error.with_traceback(None)  # else every raise would lengthen it

    def _settle(self, ticket: Ticket, timeout: float) -> None:
        checksum = 0
        failure: StorageError | None = None
        try:
            checksum = ticket.wait(timeout)
        except DeadlineError as error:
            raise self._late(error, timeout) from error
        except StorageError as error:
            failure = error
        with self._lock:
            if self._ticket is not None:
                self._error = self._settled(checksum, failure)
                if self._timeline.is_on:
                    self._note_span(ticket)
                self._ticket = None
                self._buffers = ()

    def _note_span(self, ticket: Ticket) -> None:
        began, ended = ticket.span() or (self._started, self._timeline.clock())
        self._timeline.span(
            self.lane, self._what, began, ended, nbytes=self.nbytes, queued=self._started
        )

    def _late(self, error: DeadlineError, timeout: float) -> DeadlineError:
        disk = disk_of(error.path) if self.lane.startswith("nvme") else None
        return DeadlineError(
            operation=self.lane,
            path=error.path,
            offset=error.offset,
            nbytes=self.nbytes,
            what=self._what,
            on=None if disk is None else str(disk),
            detail=f"not done after {timeout:g} s; it is still in flight and owns its buffer",
            remedy="wait again, or look whether the device hangs (dmesg, iostat)",
        )

    def _settled(self, checksum: int, failure: StorageError | None) -> StorageError | None:
        """Take over the outcome; called once, under this transfer's lock. Returns the error."""
        del checksum
        return failure


def wait_all(transfers: list[Transfer]) -> None:
    """Settle every transfer, then raise the first error there was.

    When one has run into its deadline, the others have been in flight as long and get no further
    time: on a disk that hangs this takes one deadline, not one for each.
    """
    first: OffloadError | None = None
    timeout: float | None = None
    for transfer in transfers:
        try:
            transfer.wait(timeout)
        except OffloadError as error:
            first = first or error
            if isinstance(error, DeadlineError):
                timeout = 0.0
    if first is not None:
        raise first
