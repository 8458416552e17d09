"""Which bytes of an arena or of a file belong to whom: arithmetic without memory, files or locks.

[Note: extents]

extent          a fixed range of one backing file; it holds one version of one record
extent class    all extents of one size; a record only ever lives in extents of its class
current extent  where the last committed version of a record is
shadow extent   an extent of the class that is nobody's current one; the next version goes there,
                never over the current extent, so that a failed write costs nothing
retired extent  was current until a commit; free again when the last read of it has settled
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

PAGE_BYTES = 4096  # unit of leases and extents: page size, and the alignment O_DIRECT wants


def round_up_to_page(nbytes: int) -> int:
    """Return the least multiple of 4096 that is not below `nbytes`."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


class FreeRanges:
    """The free ranges of `[0, size)`; neighbours are merged on return. Not thread-safe.

    Invariant: ranges are disjoint, sorted, and no two touch.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._starts: list[int] = [0] if size else []
        self._ends: list[int] = [size] if size else []

    def take(self, nbytes: int) -> int | None:
        """Take the first range of `nbytes` > 0; return its start, or None if none is that long."""
        assert nbytes > 0
        for index, start in enumerate(self._starts):
            if self._ends[index] - start >= nbytes:
                return self._cut(index, nbytes)
        return None

    def take_best(self, nbytes: int) -> int | None:
        """As `take`, of the shortest range that is long enough: an exact one if there is any."""
        lengths = [e - s for s, e in zip(self._starts, self._ends, strict=True)]
        fitting = [(n, index) for index, n in enumerate(lengths) if n >= nbytes]
        if not fitting:
            return None
        return self._cut(min(fitting)[1], nbytes)

    def _cut(self, index: int, nbytes: int) -> int:
        start = self._starts[index]
        self._starts[index] = start + nbytes
        if self._starts[index] == self._ends[index]:
            del self._starts[index], self._ends[index]
        return start

    def put_back(self, start: int, nbytes: int) -> None:
        """Return `[start, start + nbytes)`, all of which must be taken."""
        end = start + nbytes
        index = bisect_left(self._starts, start)
        fits_left = index == 0 or self._ends[index - 1] <= start
        fits_right = index == len(self._starts) or end <= self._starts[index]
        if not (0 <= start < end <= self.size and fits_left and fits_right):
            raise AssertionError(f"range [{start}, {end}) returned twice or never taken")
        joins_left = index > 0 and self._ends[index - 1] == start
        joins_right = index < len(self._starts) and self._starts[index] == end
        if joins_left and joins_right:
            self._ends[index - 1] = self._ends.pop(index)
            del self._starts[index]
        elif joins_left:
            self._ends[index - 1] = end
        elif joins_right:
            self._starts[index] = start
        else:
            self._starts.insert(index, start)
            self._ends.insert(index, end)

    @property
    def largest(self) -> int:
        """The longest range that can be taken now."""
        return max((e - s for s, e in zip(self._starts, self._ends, strict=True)), default=0)

    def ranges(self) -> list[tuple[int, int]]:
        """The free ranges as (start, end), ascending."""
        return list(zip(self._starts, self._ends, strict=True))


@dataclass(frozen=True, slots=True)
class Extent:
    """`nbytes` at `offset` of backing file `file`; see [Note: extents]."""

    file: int
    offset: int
    nbytes: int


class ExtentPool:
    """The extents of one class that are nobody's current one. Not thread-safe.

    `home` is a path index: records stay on the path they were dealt to while it has a free extent,
    which keeps the striping even.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.num_extents = 0
        self._free: dict[int, deque[Extent]] = {}  # by path
        self._home: dict[Extent, int] = {}  # every extent of the class, and its path
        self._readers: dict[Extent, int] = {}
        self._retired: set[Extent] = set()
        self._is_free: set[Extent] = set()

    def add(self, extent: Extent, home: int) -> None:
        """Add a new, free extent that lies on path `home`."""
        assert extent.nbytes == self.nbytes
        assert extent not in self._home
        self._home[extent] = home
        self.num_extents += 1
        self._release(extent)

    def take(self, home: int | None) -> Extent | None:
        """Take a free extent, of path `home` if there is one; None if all are in use."""
        queue = None if home is None else self._free.get(home)
        if not queue:
            queue = max(self._free.values(), key=len, default=None)
        if not queue:
            return None
        extent = queue.popleft()
        self._is_free.remove(extent)
        return extent

    def put_back(self, extent: Extent) -> None:
        """Return an extent that is no longer current, or never became so.

        It is free at once, or when its last reader has left.
        """
        if self._readers.get(extent):
            assert extent not in self._retired
            self._retired.add(extent)
        else:
            self._release(extent)

    def remove(self, extent: Extent) -> None:
        """Forget an extent that has been taken: its bytes are not the class's any more."""
        assert extent not in self._is_free
        del self._home[extent]
        self.num_extents -= 1

    def begin_read(self, extent: Extent) -> None:
        """Count one reader of a current extent."""
        assert extent not in self._is_free
        self._readers[extent] = self._readers.get(extent, 0) + 1

    def end_read(self, extent: Extent) -> None:
        """Uncount one reader; the last one frees a retired extent."""
        num_readers = self._readers[extent] - 1
        if num_readers:
            self._readers[extent] = num_readers
            return
        del self._readers[extent]
        if extent in self._retired:
            self._retired.remove(extent)
            self._release(extent)

    @property
    def num_retired(self) -> int:
        """Extents that are free when their last reader has left."""
        return len(self._retired)

    @property
    def num_free(self) -> int:
        """Extents that `take` can return now."""
        return len(self._is_free)

    def _release(self, extent: Extent) -> None:
        if extent in self._is_free:
            raise AssertionError(f"{extent} returned twice")
        self._is_free.add(extent)
        self._free.setdefault(self._home[extent], deque()).append(extent)


class RoundRobin:
    """Deals the extents of each class to paths in turn; classes start on different paths.

    Dealing per class keeps the bytes of a path even when the sizes alternate.
    """

    def __init__(self, num_paths: int) -> None:
        self.num_paths = num_paths
        self._next: dict[int, int] = {}  # by extent bytes
        self._num_records: Counter[int] = Counter()  # by extent bytes; so are the shadows
        self._num_shadows: Counter[int] = Counter()

    def copy(self) -> RoundRobin:
        """Return one that goes on from here by itself."""
        other = RoundRobin(self.num_paths)
        other._next = dict(self._next)
        other._num_records = self._num_records.copy()
        other._num_shadows = self._num_shadows.copy()
        return other

    def deal(self, extent_bytes: int) -> int:
        """Return the path of the next extent of a class."""
        home = self._next.get(extent_bytes, len(self._next)) % self.num_paths
        self._next[extent_bytes] = home + 1
        return home

    def deal_shadows(
        self,
        record_extent_bytes: Iterable[int],
        *,
        spare: int,
        held: Mapping[int, int] = MappingProxyType({}),
    ) -> list[tuple[int, int]]:
        """Return (path, bytes) of the shadow extents that records of these extent sizes add.

        They are `spare` a class, the writes in flight, but never more than one a record. Those
        dealt for earlier records of a class count. `held` are those for held writes beside them, by
        extent bytes.
        """
        dealt = []
        new = Counter(record_extent_bytes)
        for extent_bytes in {**new, **held}:
            num_new = new[extent_bytes]
            self._num_records[extent_bytes] += num_new
            wanted = min(spare, self._num_records[extent_bytes])
            missing = max(0, wanted - self._num_shadows[extent_bytes])
            self._num_shadows[extent_bytes] += missing
            missing += held.get(extent_bytes, 0)
            dealt += [(self.deal(extent_bytes), extent_bytes) for _ in range(missing)]
        return dealt
