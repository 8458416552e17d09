"""The NVMe tier: records in preallocated extents of files, never overwritten in place.

A write goes to a shadow extent ([Note: extents]). Until it settles, and if it fails, reads return
the last committed version; when it settles well the record's current extent flips to the one just
written ([Note: records]). A pinned version stays as it is beside the later ones ([Note: pins]).
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from offload.errors import (
    BudgetError,
    DeadlineError,
    EngineStateError,
    StorageError,
)
from offload.tiers.backing_files import BackingFiles
from offload.tiers.extents import Extent, ExtentPool, RoundRobin, round_up_to_page
from offload.tiers.pins import Pin
from offload.tiers.records import (
    Record,
    buffer_address,
    checksum_error,
    named_error,
)
from offload.tiers.store_transfer import Operation, StoreTransfer
from offload.tiers.transfer import (
    DEFAULT_DEADLINE_SECONDS,
    AsyncIo,
    Transfer,
    Urgency,
    wait_all,
)
from offload.tiers.uninterrupted import UninterruptedLock
from offload.timeline import NEVER

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    import torch

__all__ = ["NvmeStore", "Record"]


class NvmeStore:
    """Records on one or several paths. Thread-safe, except that a record has one user at a time.

    `capacity_bytes` bounds what all backing files take; None = what is free when the store is made.
    The I/O engine is the caller's and is closed after the store.

    Raises:
        StorageError: a path does not exist, or is not usable.
    """

    tier = "nvme"

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        io: AsyncIo,
        *,
        capacity_bytes: int | None = None,
        deadline_seconds: float = DEFAULT_DEADLINE_SECONDS,
        checksum: bool = True,
    ) -> None:
        if not paths:
            raise ValueError("an NVMe store needs at least one path")
        self._io = io
        self._deadline_seconds = deadline_seconds
        self._checksum = checksum
        self._pid = os.getpid()
        self._lock = UninterruptedLock()
        self._closed = False
        self._files = BackingFiles(paths, io, deadline_seconds)
        # Runs at exit too; does nothing in a forked child.
        self._finalizer = weakref.finalize(self, self._files.close)
        self._reserving = UninterruptedLock()  # one `reserve` at a time; taken before `_lock`
        self._dealer = RoundRobin(len(paths))
        self._pools: dict[int, ExtentPool] = {}  # by extent bytes
        self._in_flight: dict[int, dict[Transfer, None]] = {}  # by extent bytes, oldest first
        self._num_holdable: Counter[int] = Counter()  # by extent bytes: shadows left to take
        self._num_beside_pins: Counter[int] = Counter()  # the same: extents for later versions
        self._pins: Counter[Extent] = Counter()
        self._unpinned = self._lock.condition()
        self._num_unpinning = 0  # who will unpin something soon
        self.used_bytes = 0
        self.peak_bytes = self.step_peak_bytes = 0
        self.timeline = NEVER
        self.capacity_bytes = self._files.bytes_free() if capacity_bytes is None else capacity_bytes

    def bytes_free(self) -> int:
        """Bytes that `reserve` could still allocate, within the capacity and on the disks."""
        return max(0, min(self.capacity_bytes - self.used_bytes, self._files.bytes_free()))

    def reserve(
        self,
        sizes: Sequence[tuple[str, int]],
        *,
        spare: int,
        held: Mapping[int, int] = MappingProxyType({}),
    ) -> list[Record]:
        """Allocate extents on the disks for records of (name, nbytes), and shadow extents.

        Each class of one extent size gets `min(spare, its records)` shadow extents; `spare` is the
        number of writes in flight, or 0 for records that are vacated before they are written again.
        `held` are shadow extents for held writes beside those, by the bytes of the records. The
        records of a class are dealt round-robin over the paths. After an error nothing is
        allocated.

        Raises:
            BudgetError: more than the capacity.
            DiskFullError: more than a disk has room for.
            StorageError: a path refuses files.
        """
        with self._reserving:
            self._check_open()
            dealer = self._dealer.copy()
            records = [self._deal(name, nbytes, dealer) for name, nbytes in sizes]
            extents = [(record.home, record.extent_bytes) for record in records]
            held = {round_up_to_page(nbytes): count for nbytes, count in held.items()}
            extents += dealer.deal_shadows(
                (record.extent_bytes for record in records), spare=spare, held=held
            )
            self._allocate(extents, dealer, held)
        return records

    def _allocate(
        self, extents: list[tuple[int, int]], dealer: RoundRobin, held: Mapping[int, int]
    ) -> None:
        """Take the extents, (path, bytes) each, from the disks; all or none."""
        needed: Counter[int] = Counter()  # path -> bytes
        for home, nbytes in extents:
            needed[home] += nbytes
        self._check_room(needed)
        files = self._files.create(needed)
        with self._lock:
            self._add_extents(extents, files)
            self._num_holdable.update(held)
            self._dealer = dealer
            self.used_bytes += needed.total()
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
            self.step_peak_bytes = max(self.step_peak_bytes, self.used_bytes)

    def reserve_held(self, held: Mapping[int, int]) -> None:
        """Allocate what is missing of these shadow extents for held writes; none is taken.

        Raises:
            BudgetError, DiskFullError, StorageError: as `reserve`.
        """
        with self._lock:
            missing = {
                nbytes: count - self._num_holdable[round_up_to_page(nbytes)]
                for nbytes, count in held.items()
            }
        missing = {nbytes: count for nbytes, count in missing.items() if count > 0}
        if missing:
            self.reserve([], spare=0, held=missing)

    def reserve_beside_pins(self, counts: Mapping[int, int]) -> None:
        """Allocate what is missing of these extents for the versions after pinned ones.

        `counts` are extents by the bytes of the records: one for each pin of a record that will be
        written again. Without them such a write allocates its extent when it comes to it.

        Raises:
            BudgetError, DiskFullError, StorageError: as `reserve`.
        """
        wanted: Counter[int] = Counter()
        for nbytes, count in counts.items():
            wanted[round_up_to_page(nbytes)] += count
        with self._reserving:
            self._check_open()
            dealer = self._dealer.copy()
            extents = [
                (dealer.deal(nbytes), nbytes)
                for nbytes, count in wanted.items()
                for _ in range(count - self._num_beside_pins[nbytes])
            ]
            if not extents:
                return
            self._allocate(extents, dealer, {})
            self._num_beside_pins |= wanted

    def give_back_held(self) -> None:
        """Give the shadow extents for held writes back to the disks; none is taken.

        Where a file system cannot give up a part of a file, they stay.
        """
        with self._reserving:
            with self._lock:
                self._check_open()
                taken = [
                    extent
                    for nbytes, count in self._num_holdable.items()
                    for _ in range(count)
                    if (extent := self._pools[nbytes].take(None)) is not None
                ]
            given = set()
            for extent in taken:
                with contextlib.suppress(OSError):
                    self._files.give_back(extent)
                    given.add(extent)
            with self._lock:
                for extent in taken:
                    pool = self._pools[extent.nbytes]
                    if extent in given:
                        pool.remove(extent)
                        self._num_holdable[extent.nbytes] -= 1
                        self.used_bytes -= extent.nbytes
                    else:
                        pool.put_back(extent)

    def start_read(
        self, record: Record, tensor: torch.Tensor, *, urgency: int = Urgency.BULK
    ) -> Transfer:
        """Start to read the last committed version into `tensor`; see [Note: urgency].

        `tensor` is uint8, 1-D, on the host, of `record.nbytes` or `record.extent_bytes`; the first
        `record.nbytes` are filled. `wait()` raises ChecksumError if they are not what was written;
        the contents must not be used before it has returned.

        Raises:
            EngineStateError: the record was never written, or the store is closed.
            StorageError: the request cannot be started.
        """
        address = buffer_address(record, tensor)
        with self._lock:
            self._check_open()
            extent = record.current
            if extent is None:
                raise EngineStateError(
                    f"read of {record.name} in {record.path}, which was never written",
                    expected="a write that has settled",
                )
            transfer = self._start(
                record, "read", extent, record.generation, tensor, address, urgency
            )
            transfer.expected = record.checksum
            self._pools[extent.nbytes].begin_read(extent)
        return transfer

    def take_shadow(self, record: Record) -> bool:
        """Take an extent for a held write of `record`; False: there is none, or it is written."""
        with self._lock:
            self._check_open()
            assert record.shadow is None, f"{record!r} has a shadow"
            num_holdable = self._num_holdable[record.extent_bytes]
            if record.pending is not None or not num_holdable:
                return False
            record.shadow = self._pools[record.extent_bytes].take(record.home)
            self._num_holdable[record.extent_bytes] -= record.shadow is not None
            return record.shadow is not None

    def start_held_write(self, record: Record, tensor: torch.Tensor) -> Transfer | None:
        """Start to write `tensor` to the shadow taken before; what is current stays so.

        When it has settled well, `commit` makes it current, or `drop_shadow` forgets it. None: the
        record is being written otherwise, so that this would not be its next version.

        Raises:
            EngineStateError: the store is closed.
            StorageError: the request cannot be started; the shadow is kept.
        """
        address = buffer_address(record, tensor)
        with self._lock:
            self._check_open()
            assert record.shadow is not None, f"{record!r} has no shadow"
            if record.pending is not None:
                return None
            generation, shadow = record.generation + 1, record.shadow
            transfer = self._start(
                record, "write", shadow, generation, tensor, address, Urgency.BULK
            )
            transfer.held = True
            record.pending = transfer
            return transfer

    def commit(self, record: Record) -> None:
        """Make the shadow current, at once or when its write, which is in flight, settles well."""
        with self._lock:
            pending = record.pending
            if isinstance(pending, StoreTransfer):
                assert pending.held
                pending.held = False
                record.shadow = None
            else:
                shadow, record.shadow = record.shadow, None
                assert shadow is not None, f"{record!r} has no shadow"
                self._flip(record, shadow, record.shadow_checksum)
            self._num_holdable[record.extent_bytes] += 1

    def drop_shadow(self, record: Record) -> None:
        """Forget the shadow; no held write of the record may be in flight."""
        with self._lock:
            pending = record.pending
            held = isinstance(pending, StoreTransfer) and pending.held
            assert not held, f"{record!r} is being written"
            shadow, record.shadow = record.shadow, None
            assert shadow is not None, f"{record!r} has no shadow"
            self._pools[record.extent_bytes].put_back(shadow)
            self._num_holdable[record.extent_bytes] += 1

    def start_write(
        self, record: Record, tensor: torch.Tensor, *, urgency: int = Urgency.BULK
    ) -> Transfer:
        """Start to write `tensor` as the next version; `wait()` commits it.

        `tensor` as in `start_read`; it must not change before the transfer has settled. If that
        fails the record keeps its version. This call waits for an earlier write of the record, and
        while no extent of the class is free for the class's oldest transfer; if pins have all of
        them, for the end of `unpinning`, or it allocates one more.

        Raises:
            BudgetError, DiskFullError: there is no room for one more extent.
            DeadlineError: it waited too long; nothing was started.
            EngineStateError: no shadow extent was reserved, or the store is closed.
            StorageError: the request cannot be started.
        """
        address = buffer_address(record, tensor)
        limit = time.monotonic() + self._deadline_seconds
        while True:
            with self._lock:
                self._check_open()
                pool = self._pools[record.extent_bytes]
                blocker = record.pending
                if blocker is None and (extent := pool.take(record.home)) is not None:
                    try:
                        record.pending = self._start(
                            record,
                            "write",
                            extent,
                            record.generation + 1,
                            tensor,
                            address,
                            urgency,
                        )
                    except BaseException:
                        pool.put_back(extent)
                        raise
                    return record.pending
                if blocker is None:
                    blocker = next(iter(self._in_flight[record.extent_bytes]), None)
                pins_have_all = blocker is None and pool.num_retired > 0
                if pins_have_all and self._num_unpinning and time.monotonic() < limit:
                    self._unpinned.wait(limit - time.monotonic())
                    continue
            if pins_have_all:
                # Half as many again as there are, so that there are few files.
                count = self._num_beside_pins[record.extent_bytes] + (pool.num_retired + 1) // 2
                self.reserve_beside_pins({record.extent_bytes: count})
            else:
                self._wait_for(blocker, record, limit)

    def device_of(self, record: Record) -> int | None:
        """`st_dev` of the disk that has the record in a file that can get a name; None: it cannot.

        Of one that was never written, the disk that it was dealt to.
        """
        with self._lock:
            if record.current is not None:
                return self._files[record.current.file].device
        path = self._files.paths[record.home]
        return path.device if path.can_link else None

    def pin(self, record: Record) -> Pin | None:
        """Keep the current version as it is until `unpin`; None: there is none."""
        with self._lock:
            self._check_open()
            extent = record.current
            if extent is None:
                return None
            self._pools[extent.nbytes].begin_read(extent)
            self._pins[extent] += 1
            seed = self._files.seed(extent, record.generation)
            file = self._files[extent.file]
            return Pin(record, extent, record.generation, seed, record.checksum, file)

    def unpin(self, pin: Pin) -> None:
        """Undo `pin`, once; does nothing on a closed store."""
        with self._lock:
            if self._closed:
                return
            self._pins[pin.extent] -= 1
            self._pools[pin.extent.nbytes].end_read(pin.extent)
            self._unpinned.notify_all()

    @contextlib.contextmanager
    def unpinning(self) -> Iterator[None]:
        """For a block that ends soon and unpins something: writes wait for that."""
        with self._lock:
            self._num_unpinning += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_unpinning -= 1
                self._unpinned.notify_all()

    def start_read_pinned(self, pin: Pin, tensor: torch.Tensor) -> Transfer:
        """`start_read` of a pinned version; it has to stay pinned until the transfer settles."""
        address = buffer_address(pin.record, tensor)
        with self._lock:
            self._check_open()
            transfer = self._start(
                pin.record, "read", pin.extent, pin.generation, tensor, address, Urgency.BULK
            )
            transfer.expected = pin.checksum
            self._pools[pin.extent.nbytes].begin_read(pin.extent)
        return transfer

    def vacate(self, record: Record) -> None:
        """Forget what a record holds: its extent is free for others of its class.

        No transfer of the record may be in flight.
        """
        with self._lock:
            assert record.pending is None, f"{record!r} is being written"
            extent, record.current = record.current, None
            if extent is not None:
                self._pools[extent.nbytes].put_back(extent)

    def close(self) -> None:
        """Settle what is in flight, then give all files up. A second call does nothing.

        In a forked child it does nothing at all: the files are the parent's.

        Raises:
            StorageError: a transfer that nobody had waited for failed; the store is closed.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            in_flight = [transfer for each in self._in_flight.values() for transfer in each]
        try:
            wait_all(in_flight)
        finally:
            try:
                self._files.trim(extent for extent, count in self._pins.items() if count)
            finally:
                self._finalizer()

    def finish(
        self, transfer: StoreTransfer, checksum: int, failure: StorageError | None
    ) -> StorageError | None:
        """Take over the outcome of a transfer, once; called by the transfer. Returns its error."""
        record, extent = transfer.record, transfer.extent
        with self._lock:
            pool = self._pools[extent.nbytes]
            del self._in_flight[extent.nbytes][transfer]
            if transfer.operation == "read":
                pool.end_read(extent)
            else:
                record.pending = None
                if transfer.held:
                    record.shadow_checksum = checksum
                elif failure is None:
                    self._flip(record, extent, checksum)
                else:
                    pool.put_back(extent)
        path = self._files[extent.file].io.path
        if failure is not None:
            return named_error(failure, record, transfer.operation, extent, path)
        if transfer.operation == "read" and checksum != transfer.expected:
            return checksum_error(record, path, extent, found=checksum, expected=transfer.expected)
        return None

    def _flip(self, record: Record, extent: Extent, checksum: int) -> None:
        """Make `extent` the record's current one, under the lock."""
        retired, record.current = record.current, extent
        record.checksum = checksum
        record.generation += 1
        if retired is not None:
            self._pools[extent.nbytes].put_back(retired)

    def _start(
        self,
        record: Record,
        operation: Operation,
        extent: Extent,
        generation: int,
        tensor: torch.Tensor,
        address: int,
        urgency: int,
    ) -> StoreTransfer:
        """Queue one request, under the lock.

        Queueing does not block, and the extent, the request and the list of what is in flight must
        change together.
        """
        file = self._files[extent.file].io
        seed = None
        if self._checksum:
            seed = self._files.seed(extent, generation)
        start = self._io.start_read if operation == "read" else self._io.start_write
        try:
            ticket = start(
                file, extent.offset, address, record.nbytes, checksum_seed=seed, urgency=urgency
            )
        except StorageError as error:
            raise named_error(error, record, operation, extent, file.path) from error
        transfer = StoreTransfer(
            ticket, self, record, operation, extent, tensor, self._deadline_seconds, urgency
        )
        self._in_flight[extent.nbytes][transfer] = None
        return transfer

    def _wait_for(self, blocker: Transfer | None, record: Record, limit: float) -> None:
        """Settle `blocker`, so that `record` may get an extent; its error is for its owner."""
        if blocker is None:
            raise EngineStateError(
                f"no shadow extent for a write of {record.name}: none of "
                f"{record.extent_bytes} bytes is free or in flight",
                remedy="reserve with spare >= 1",
            )
        try:
            blocker.wait(max(0.0, limit - time.monotonic()))
        except DeadlineError as error:
            raise DeadlineError(
                operation="write",
                path=record.path,
                nbytes=record.nbytes,
                what=record.name,
                detail=f"not started, because in {self._deadline_seconds:g} s no extent became "
                f"free: {error}",
                remedy="look whether the disk hangs, or raise io.deadline_seconds",
            ) from error
        except StorageError:
            pass

    def _deal(self, name: str, nbytes: int, dealer: RoundRobin) -> Record:
        record = Record(name, nbytes)
        record.home = dealer.deal(record.extent_bytes)
        record.path = self._files.paths[record.home].path
        return record

    def _check_room(self, needed: Counter[int]) -> None:
        """Refuse before anything is allocated, which would fill the disk for everybody else."""
        if needed.total() > self.capacity_bytes - self.used_bytes:
            raise BudgetError(
                tier=self.tier,
                requested_bytes=needed.total(),
                free_bytes=self.capacity_bytes - self.used_bytes,
                budget_bytes=self.capacity_bytes,
                owner="the extents of records and their shadows",
                remedy="raise tiers.nvme.capacity, or place less state on nvme",
            )
        self._files.check_room(needed)

    def _add_extents(self, extents: list[tuple[int, int]], files: Mapping[int, int]) -> None:
        """Lay the extents out in the new files (path -> index), one after the other."""
        offsets: Counter[int] = Counter()  # by path
        for home, nbytes in extents:
            pool = self._pools.setdefault(nbytes, ExtentPool(nbytes))
            self._in_flight.setdefault(nbytes, {})
            pool.add(Extent(files[home], offsets[home], nbytes), home)
            offsets[home] += nbytes

    def _check_open(self) -> None:
        if self._closed:
            raise EngineStateError("the NVMe store is closed", remedy="make a new one")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
