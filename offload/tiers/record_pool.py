"""NVMe records for what comes and goes in sizes that nobody knows beforehand.

[Note: size classes]
Extents are allocated when they are first wanted and then reused, by size class: eight classes for
each power of two, so that at most one eighth of an extent lies idle. What is transferred is the
exact size, up to pages. Where the disk takes no more, an extent of up to twice the size serves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload.errors import BudgetError, StorageError
from offload.tiers.extents import PAGE_BYTES, round_up_to_page

if TYPE_CHECKING:
    from offload.tiers.nvme import NvmeStore, Record

_CLASSES_PER_OCTAVE_BITS = 3
_LARGEST_RATIO = 2


def class_bytes(nbytes: int) -> int:
    """The size class of `nbytes`: the least extent that is made for it."""
    pages = -(-nbytes // PAGE_BYTES)
    shift = max(pages.bit_length() - 1 - _CLASSES_PER_OCTAVE_BITS, 0)
    return -(-pages // (1 << shift)) * (1 << shift) * PAGE_BYTES


class RecordPool:
    """Records of one kind of state, reused by size. Not thread-safe: its user has a lock.

    Attributes:
        used_bytes: extent bytes of the records that are out.
        peak_bytes: the most that was out at any time.
        refusal: why the disks have taken no more, the last time, in words: the exception would keep
            the frames of whoever asked alive, and all that these hold. None while they do.
    """

    def __init__(self, store: NvmeStore) -> None:
        self.used_bytes = 0
        self.peak_bytes = 0
        self.refusal: str | None = None
        self._store = store
        self._free: dict[int, list[Record]] = {}  # by extent bytes
        self._num_records: dict[int, int] = {}  # the same, those that are out included
        self._refused_bytes: int | None = None  # extents of this size and more were refused

    def take(self, nbytes: int, name: str) -> Record | None:
        """A record for `nbytes`, rounded up to pages, that holds nothing; None: the disks are full.

        `name` stands for it in errors.
        """
        size = class_bytes(nbytes)
        free = self._free.get(size) or self._grow(size) or self._larger(size)
        if not free:
            return None
        record = free.pop()
        record.name = name
        record.nbytes = round_up_to_page(nbytes)
        self.used_bytes += record.extent_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return record

    def give_back(self, record: Record) -> None:
        """Return a record, and forget what it holds; no transfer of it may be in flight."""
        self._store.vacate(record)
        self._free[record.extent_bytes].append(record)
        self.used_bytes -= record.extent_bytes

    def _grow(self, size: int) -> list[Record] | None:
        """Allocate half as many again, so that there are few files; None: refused."""
        if self._refused_bytes is not None and size >= self._refused_bytes:
            return None
        known = self._num_records.get(size, 0)
        for count in sorted({max(known // 2, 1), 1}, reverse=True):
            try:
                records = self._store.reserve([("", size)] * count, spare=0)
            except (BudgetError, StorageError) as error:
                self.refusal = str(error)
                continue
            self._num_records[size] = known + count
            free = self._free.setdefault(size, [])
            free.extend(records)
            return free
        self._refused_bytes = size
        return None

    def _larger(self, size: int) -> list[Record] | None:
        fitting = (s for s, free in self._free.items() if free and size < s)
        least = min(fitting, default=None)
        return self._free[least] if least is not None and least <= _LARGEST_RATIO * size else None
