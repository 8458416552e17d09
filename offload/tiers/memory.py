"""Anonymous host memory of tiers."""

from __future__ import annotations

import mmap

_MAP_NORESERVE = 0x4000  # linux/mman.h; pages are counted when touched, not when mapped


def map_shared(nbytes: int) -> mmap.mmap:
    """Map `nbytes` of zeros that a fork shares and does not copy on write (P19).

    A direct read in flight during a fork would otherwise land in the page that the child kept.

    Raises:
        OSError, ValueError or OverflowError: the system maps no more.
    """
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_SHARED | _MAP_NORESERVE)
