"""A part of the host arena that is leased once and then divided in pieces that come and go.

What comes and goes in sizes that nobody knows beforehand would break the free memory of the arena
into pieces, and a staging buffer that was planned might then find none of its length. Inside a
share only the share breaks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload.errors import OffloadError
from offload.tiers.extents import PAGE_BYTES, FreeRanges, round_up_to_page
from offload.tiers.uninterrupted import UninterruptedLock

if TYPE_CHECKING:
    import torch

    from offload.tiers.host import HostArena


class HostShare:
    """`nbytes` of the arena, in pieces. Thread-safe.

    `apart`: the arena grows by the share, and shrinks by it when it is closed.

    Attributes:
        nbytes: bytes of the share, whole pages.
        used_bytes: bytes of the pieces that are out.
        peak_bytes: the most that was out at any time.

    Raises:
        BudgetError: the arena has no room for the share, or cannot grow by it.
    """

    def __init__(self, arena: HostArena, nbytes: int, owner: str, *, apart: bool = False) -> None:
        assert nbytes >= PAGE_BYTES
        self.nbytes = nbytes // PAGE_BYTES * PAGE_BYTES
        self.used_bytes = 0
        self.peak_bytes = 0
        self._arena = arena
        self._segment = arena.grow(self.nbytes) if apart else None
        self._lease = arena.lease(self.nbytes, owner)
        self._free = FreeRanges(self.nbytes)
        self._lock = UninterruptedLock()

    def take(self, nbytes: int) -> HostPiece | None:
        """A piece of `nbytes`, rounded up to pages; None: no free range is that long."""
        size = round_up_to_page(nbytes)
        with self._lock:
            start = self._free.take(size)
            if start is None:
                return None
            self.used_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return HostPiece(self, start, self._lease.tensor.narrow(0, start, size))

    def close(self) -> None:
        """Give the share back to the arena.

        Raises:
            OffloadError: a piece is still out, which only a transfer that hangs keeps.
        """
        if self.used_bytes:
            raise OffloadError(
                f"{self.used_bytes} bytes of {self._lease.owner} cannot be given back: a transfer "
                "that hangs has them",
                remedy="look whether the disk hangs",
            )
        self._lease.release()
        if self._segment is not None:
            self._arena.shrink(self._segment)

    def _take_back(self, start: int, nbytes: int) -> None:
        with self._lock:
            self._free.put_back(start, nbytes)
            self.used_bytes -= nbytes


class HostPiece:
    """The right to use one piece of a share, until `release()`.

    `tensor` is uint8, 1-D, of whole pages; undefined at first.
    """

    __slots__ = ("_share", "_start", "tensor")

    def __init__(self, share: HostShare, start: int, tensor: torch.Tensor) -> None:
        self._share = share
        self._start = start
        self.tensor = tensor

    def release(self) -> None:
        """Return the piece; exactly once, with no transfer in flight on it."""
        self._share._take_back(self._start, self.tensor.numel())
