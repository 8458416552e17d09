"""Damage to bytes: what disks, cables and memory do to them behind everybody's back."""

from __future__ import annotations

import random

PAGE_BYTES = 4096
_SMALL_PAGE_BYTES = 64  # of files that are no longer than a few pages
KINDS = ("flipped bit", "cut off", "zeroed page", "swapped pages")


def damaged(kind: str, data: bytes, draw: random.Random) -> tuple[bytes, int]:
    """A damaged copy of `data`, which has at least two bytes, and where the damage begins.

    The copy always differs; where a file is zero all over, a zeroed page becomes a flipped bit.
    """
    for _ in range(16):
        copy, place = _once(kind, data, draw)
        if copy != data:
            return copy, place
    return _once("flipped bit", data, draw)


def _once(kind: str, data: bytes, draw: random.Random) -> tuple[bytes, int]:
    copy = bytearray(data)
    page = PAGE_BYTES if len(data) >= 4 * PAGE_BYTES else min(_SMALL_PAGE_BYTES, len(data) // 2)
    first, second = (draw.randrange(len(data) // page) * page for _ in range(2))
    if kind == "flipped bit":
        first = draw.randrange(len(data))
        copy[first] ^= 1 << draw.randrange(8)
    elif kind == "cut off":
        first = draw.randrange(len(data))
        del copy[first:]
    elif kind == "zeroed page":
        copy[first : first + page] = bytes(page)
    else:
        copy[first : first + page] = data[second : second + page]
        copy[second : second + page] = data[first : first + page]
        first = min(first, second)
    return bytes(copy), first
