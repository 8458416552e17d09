"""Requests that are made again when they fail for a reason that may pass.

[Note: Transient errors]
A cable, a path of a multipath device, a controller under pressure: an error may be gone a moment
later. A read changes nothing but its buffer, and a write goes to an extent that nobody reads before
it is committed, so either can be made again. It is, a bounded number of times, after pauses that
grow. Meanwhile the request is in flight as before: its buffers are its own, and whoever waits for
it waits longer, up to the deadline. Each error is counted; the last one is raised.

Not made again: what says that the data or the place is bad (a checksum, ENODATA, EILSEQ), what says
that there is no room or no right (ENOSPC, EROFS, EACCES), and fsync, ever: what it has failed to
write may be forgotten by then (P1). EINTR and EAGAIN of a system call are healed below, in native/.
"""

from __future__ import annotations

import errno as errno_codes
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from offload.errors import DeadlineError, OffloadError, StorageError
from offload.tiers.disks import disk_of
from offload.tiers.transfer import Urgency
from offload.tiers.uninterrupted import UninterruptedLock

if TYPE_CHECKING:
    from offload.native.core import CopyLane
    from offload.native.files import IoFile
    from offload.telemetry import RetryLog
    from offload.tiers.transfer import AsyncIo, LaneTotals, Ticket

# What the block layer says of a failed command, a lost link, a timeout, or a want of memory.
TRANSIENT = frozenset(
    {
        errno_codes.EIO,
        errno_codes.ETIMEDOUT,
        errno_codes.ENOLINK,
        errno_codes.EREMOTEIO,
        errno_codes.EAGAIN,
        errno_codes.EBUSY,
        errno_codes.ENOMEM,
    }
)
_FIRST_PAUSE_SECONDS = 0.02
_PAUSE_GROWTH = 5.0


class RetryingIo:
    """An I/O engine whose reads and writes are made again; see [Note: Transient errors].

    Args:
        io: carries the requests out.
        retries: how often a request is made again.
        log: is told of every error that is not raised.
    """

    def __init__(self, io: AsyncIo, *, retries: int, log: RetryLog) -> None:
        self._io = io
        self._retries = retries
        self._log = log

    def from_fd(self, fd: int, path: str) -> IoFile:
        """See `AsyncIo`."""
        disk_of(path)  # while it answers
        return self._io.from_fd(fd, path)

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
        """See `AsyncIo`."""
        start = partial(
            self._io.start_read, file, offset, address, nbytes, checksum_seed=checksum_seed
        )
        return RetryingTicket(start, urgency, retries=self._retries, log=self._log)

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
        """See `AsyncIo`."""
        start = partial(
            self._io.start_write, file, offset, address, nbytes, checksum_seed=checksum_seed
        )
        return RetryingTicket(start, urgency, retries=self._retries, log=self._log)

    def start_copy(
        self,
        dst_address: int,
        src_address: int,
        nbytes: int,
        *,
        lane: CopyLane,
        urgency: int = Urgency.BULK,
    ) -> Ticket:
        """See `AsyncIo`; a copy in memory is made once."""
        return self._io.start_copy(dst_address, src_address, nbytes, lane=lane, urgency=urgency)

    def register(self, address: int, nbytes: int) -> str:
        """See `AsyncIo`."""
        return self._io.register(address, nbytes)

    def unregister(self, address: int) -> None:
        """See `AsyncIo`."""
        self._io.unregister(address)

    def lanes(self) -> LaneTotals:
        """See `AsyncIo`."""
        return self._io.lanes()


class RetryingTicket:
    """One request, however often it is made. Thread-safe.

    `start` makes it, with the urgency given. Between two tries it is not done.
    """

    def __init__(
        self, start: Callable[..., Ticket], urgency: int, *, retries: int, log: RetryLog
    ) -> None:
        self._start = start
        self._urgency = urgency
        self._num_left = retries
        self._num_tries = 1
        self._log = log
        self._lock = UninterruptedLock()  # of what follows
        self._again_at: float | None = None  # the last try has failed; when the next one starts
        self._ticket = start(urgency=urgency)

    def expedite(self, urgency: int) -> None:
        """See `Ticket`."""
        with self._lock:
            self._urgency = min(self._urgency, urgency)
            ticket = self._ticket
        ticket.expedite(urgency)

    def done(self) -> bool:
        """See `Ticket`. Who asks starts the next try, too, when its pause is over."""
        try:
            ticket = self._current(waits=False)
        except OffloadError:
            return True  # it cannot be started again: `wait` raises that
        if ticket is None or not ticket.done():
            return False
        try:
            ticket.wait(0.0)
        except StorageError as error:
            return not self._is_made_again(ticket, error)
        except OffloadError:
            return True
        return True

    def wait(self, timeout: float | None = None) -> int:
        """See `Ticket`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            ticket = self._current(waits=True, deadline=deadline)
            assert ticket is not None, "the pause has been waited for"
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                return ticket.wait(left)
            except DeadlineError:
                raise
            except StorageError as error:
                if not self._is_made_again(ticket, error):
                    error.num_tries = self._num_tries
                    raise

    def span(self) -> tuple[float, float] | None:
        """See `Ticket`; that of the last try."""
        with self._lock:
            ticket = self._ticket
        return ticket.span()

    def _current(self, *, waits: bool, deadline: float | None = None) -> Ticket | None:
        """The try under way; None: it is in the pause before one, which is not to be waited for."""
        with self._lock:
            again_at = self._again_at
        if again_at is not None:
            pause_seconds = again_at - time.monotonic()
            if not waits and pause_seconds > 0:
                return None
            if deadline is not None:
                pause_seconds = min(pause_seconds, deadline - time.monotonic())
            if pause_seconds > 0:
                time.sleep(pause_seconds)
        with self._lock:
            if self._again_at is not None:
                self._ticket = self._start(urgency=self._urgency)
                self._again_at = None
                self._num_tries += 1
            return self._ticket

    def _is_made_again(self, ticket: Ticket, error: StorageError) -> bool:
        """Whether a failed try is followed by another."""
        with self._lock:
            if ticket is not self._ticket or self._again_at is not None:
                return True  # another thread has seen it
            if not self._num_left or error.errno not in TRANSIENT:
                return False
            self._num_left -= 1
            pause_seconds = _FIRST_PAUSE_SECONDS * _PAUSE_GROWTH ** (self._num_tries - 1)
            self._again_at = time.monotonic() + pause_seconds
        self._log.note(_on_disk(error))
        return True


def _on_disk(error: StorageError) -> StorageError:
    """The error with the disk that it comes from."""
    disk = disk_of(error.path)
    return StorageError(
        operation=error.operation,
        path=error.path,
        offset=error.offset,
        nbytes=error.nbytes,
        errno=error.errno,
        on=None if disk is None else str(disk),
    )
