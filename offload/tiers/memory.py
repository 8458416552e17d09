"""Anonymous host memory of tiers, and the C library's heap."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

_MAP_NORESERVE = 0x4000  # linux/mman.h; pages are counted when touched, not when mapped


def map_shared(nbytes: int) -> mmap.mmap:
    """Map `nbytes` of zeros that a fork shares and does not copy on write (P19).

    A direct read in flight during a fork would otherwise land in the page that the child kept.

    Raises:
        OSError, ValueError or OverflowError: the system maps no more.
    """
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_SHARED | _MAP_NORESERVE)


def trim_heap() -> None:
    """Let the C library return freed memory to the system, which it would keep."""
    with contextlib.suppress(AttributeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)


class HeapTrimmer:
    """Trims the heap each time that a given number of bytes has passed through it.

    Large blocks that come and go between small ones that stay leave holes, in which the next large
    block has no room: the heap grows with what has passed, not with what is in use.
    """

    def __init__(self, every_bytes: int) -> None:
        self._every_bytes = every_bytes
        self._passed_bytes = 0

    def count(self, nbytes: int) -> None:
        """Count bytes that have been allocated and are freed, or soon will be."""
        self._passed_bytes += nbytes
        if self._passed_bytes >= self._every_bytes:
            self._passed_bytes = 0
            trim_heap()
