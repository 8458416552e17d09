"""What `IoEngine` asks of a core; the C++ library and the Python fallback both provide it.

A core works on numbers only: descriptors, addresses, offsets. It raises `OSError` with an errno
where it refuses; the outcome of a request is data. `IoEngine` turns both into the project's errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

Operation = Literal["read", "write"]
CopyLane = Literal["h2d", "d2h"]
FILE_LANES = ("nvme_read", "nvme_write")
LANES = (*FILE_LANES, "h2d", "d2h")

# How urgent a request is: the lower, the sooner. The class stands in the upper 8 of 64 bits, the
# place in the class in the others; see OFFLOAD_URGENCY_BULK in native/include/offload_native.h.
URGENCY_CLASS_SHIFT = 56
BULK_URGENCY: int = 2 << URGENCY_CLASS_SHIFT


def urgency_class(urgency: int) -> int:
    """The class of an urgency; those from that of BULK_URGENCY on are bulk."""
    return urgency >> URGENCY_CLASS_SHIFT


@dataclass(frozen=True, slots=True)
class Request:
    """One read or write: `nbytes` at `offset` of a file from or to memory at `address`."""

    operation: Operation
    fd: int
    direct_fd: int  # -1: everything is buffered
    alignment: int
    memory_alignment: int
    offset: int
    address: int
    nbytes: int
    checksum_seed: int | None
    urgency: int


@dataclass(frozen=True, slots=True)
class CopyRequest:
    """One memory copy of `nbytes`, counted on `lane`."""

    lane: CopyLane
    dst_address: int
    src_address: int
    nbytes: int
    urgency: int


class Outcome(NamedTuple):
    """How a request ended: `errno` 0 = well; else `offset` is where the first failed block began.

    `short`: a read met the end of the file (errno EIO), or a write moved nothing.
    """

    errno: int
    offset: int
    checksum: int
    short: bool


@dataclass(frozen=True, slots=True)
class CoreSettings:
    """Validated settings of a core; see `IoEngine`."""

    backend: str
    queue_depth: int
    threads: int
    block_bytes: int
    copy_threads: int
    held_depth: int
    fault: str | None


class Core(Protocol):
    """See the module."""

    backend: str

    def start(self, request: Request) -> object:
        """Take the request; return its handle. Raises OSError."""

    def start_copy(self, request: CopyRequest) -> object:
        """Take the copy; return its handle. Raises OSError."""

    def expedite(self, handle: object, urgency: int) -> None:
        """Make the blocks that have not been taken at least so urgent; never raises."""

    def done(self, handle: object) -> bool:
        """Whether the request has ended; never blocks."""

    def wait(self, handle: object, timeout: float) -> Outcome | None:
        """Wait at most `timeout` seconds; None = still in flight."""

    def span(self, handle: object) -> tuple[float, float] | None:
        """When the first block was begun and the request ended, in seconds on CLOCK_MONOTONIC.

        None: it has not ended, or the core does not know.
        """

    def forget(self, handle: object) -> None:
        """Free a handle; only for ended requests, exactly once."""

    def register(self, address: int, nbytes: int) -> str:
        """Prepare a buffer for reuse, best effort; return "ok" or the reason why it is not."""

    def unregister(self, address: int) -> None:
        """Undo `register`; nothing if there is nothing to undo."""

    def fsync(self, fd: int) -> None:
        """Raises OSError."""

    def lanes(self) -> dict[str, tuple[int, float]]:
        """Bytes and busy seconds so far."""

    def close(self, timeout: float) -> bool:
        """End every thread; False = requests are still in flight and everything stays open."""
