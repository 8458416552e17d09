"""The blocks of state at their home tiers, and the staging through which the CPU reaches them.

[Note: Block]
A *block* is the state of one class of one bucket. It lives at its home tier as the chunk blocks of
its `ClassLayout`, one after the other: in one device or host lease, or as one NVMe record a chunk.

`BlockStore.start_load` gives a chunk to the CPU as a `Staged` buffer, `start_store` takes it back:

    home          start_load                        start_store
    host          the home's own memory, at once    nothing to move
    device (CPU)  the home's own memory, at once    nothing to move
    device (GPU)  host lease, d2h copy              h2d copy; the device itself: `on_device`
    nvme          host lease, nvme read             nvme write to a shadow extent

A stored buffer belongs to its write until the write has settled; the store keeps it till then, and
keeps it after a failed write too, so that the write can be repeated: nothing that was computed is
lost. A chunk that is being written is read again only after its write has settled.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from offload.errors import BudgetError, DeadlineError, OffloadError
from offload.partition.captured import Captured
from offload.partition.late import LateTransfers
from offload.partition.layout import (
    UPDATED_CLASSES,
    BlockLayout,
    Bucket,
    chunk_contents,
    num_held,
)
from offload.partition.staging import ZEROED_LANE, Lend, Staged, StagingLease
from offload.tiers.device import DeviceLease, DeviceTier
from offload.tiers.host import HostArena, HostLease
from offload.tiers.nvme import NvmeStore, Record
from offload.tiers.pins import Pin
from offload.tiers.transfer import CompletedTransfer, Transfer, Urgency
from offload.tiers.uninterrupted import UninterruptedLock


@dataclass(slots=True, eq=False)
class Block:
    """The state of one class of one bucket at its home: exactly one of the three homes is set."""

    bucket: Bucket
    state_class: str
    layout: BlockLayout
    home: str
    host_lease: HostLease | None = None
    device_lease: DeviceLease | None = None
    records: Sequence[Record] = field(default=())

    @property
    def name(self) -> str:
        """For messages: state class and bucket."""
        return f"{self.state_class} of bucket {self.bucket.index}"


class BlockStore:
    """Every block of an engine, the staging leases, and the writes that have not settled yet.

    Thread-safe: gradients come home from the threads of backward while pages come in. `names` are
    those of the parameters, for errors; `late` has the memory of transfers that nobody waits for.
    """

    def __init__(
        self,
        *,
        host: HostArena,
        device: DeviceTier,
        nvme: NvmeStore | None,
        deadline_seconds: float,
        names: Sequence[str] = (),
    ) -> None:
        self._names = names
        self.host = host
        self.device = device
        self.nvme = nvme
        self.deadline_seconds = deadline_seconds
        self.late = LateTransfers()
        self._blocks: dict[tuple[int, str], Block] = {}
        self._classes: dict[int, list[str]] = {}
        self._writing: OrderedDict[tuple[int, str, int], tuple[Transfer, Staged]] = OrderedDict()
        self._failed: dict[tuple[int, str, int], Staged] = {}
        self._void: set[tuple[int, str, int]] = set()  # on NVMe, and not to be read any more
        self._copies: dict[int, DeviceLease] = {}  # of weights, by bucket
        # Set, unless a snapshot still needs homes as they are: see [Note: Snapshot].
        self.captured: threading.Event = Captured()
        self.captured.set()
        # Of the maps of writes and copies, and of `_void`.
        self._lock = UninterruptedLock(reentrant=True)

    def add(self, bucket: Bucket, state_class: str, layout: BlockLayout, home: str) -> None:
        """Take the memory of a block at a tier in memory, or note that `reserve_records` will.

        A class without state (fp32 SGD keeps none) has no block.

        Raises:
            BudgetError: the home tier has no room.
        """
        if not layout.nbytes:
            return
        block = Block(bucket, state_class, layout, home)
        if home == "host":
            block.host_lease = self.host.lease(layout.nbytes, block.name)
        elif home == "device":
            block.device_lease = self.device.lease(layout.nbytes, block.name)
        self._blocks[bucket.index, state_class] = block
        self._classes.setdefault(bucket.index, []).append(state_class)

    def remove(self, bucket: int, state_class: str) -> None:
        """Undo `add` of a block that nothing has used; what NVMe has reserved is not given back."""
        block = self._blocks.pop((bucket, state_class))
        self._classes[bucket].remove(state_class)
        for lease in (block.host_lease, block.device_lease):
            if lease is not None:
                lease.release()

    def reserve_records(self, *, spare: int, held_share: float = 0.0) -> None:
        """Allocate the files of every new block whose home is NVMe; `spare` shadow extents a size.

        `held_share`: of which share of weights and optimizer state a next version can be held.

        Raises:
            StorageError: see `NvmeStore.reserve`.
        """
        blocks = [b for b in self._blocks.values() if b.home == "nvme" and not b.records]
        if not blocks:
            return
        assert self.nvme is not None, "a plan with state on nvme comes with a store"
        sizes = [size for block in blocks for size in self.record_sizes(block)]
        updated = [b for b in blocks if b.bucket.trainable and b.state_class in UPDATED_CLASSES]
        held = num_held(
            (nbytes for block in updated for nbytes in block.layout.chunk_nbytes), held_share
        )
        records = iter(self.nvme.reserve(sizes, spare=spare, held=held))
        for block in blocks:
            block.records = [next(records) for _ in block.layout.chunk_nbytes]

    def record_sizes(self, block: Block) -> list[tuple[str, int]]:
        """Name and bytes of the record of each chunk of a block, for a home on nvme."""
        inside = chunk_contents(block.bucket, self._names)
        named = [f"{block.name}, chunk {chunk}{of}" for chunk, of in enumerate(inside)]
        return list(zip(named, block.layout.chunk_nbytes, strict=True))

    def move_to_nvme(self, block: Block, records: Sequence[Record]) -> None:
        """The home of a block is these records from here on; its host lease has been released."""
        with self._lock:
            assert block.home == "host"
            block.home, block.host_lease, block.records = "nvme", None, records

    def block(self, bucket: int, state_class: str) -> Block:
        """The block of `state_class` of bucket number `bucket`."""
        return self._blocks[bucket, state_class]

    def classes(self, bucket: int) -> Sequence[str]:
        """The state classes of which a bucket has a block."""
        return self._classes[bucket]

    def blocks(self) -> Sequence[Block]:
        """Every block, in the order in which they were added."""
        return tuple(self._blocks.values())

    def in_place(self, block: Block) -> bool:
        """Whether the CPU reaches the block at its home, without staging."""
        return block.home == "host" or (block.home == "device" and self.device.host_addressable)

    def home(self, block: Block, chunk: int) -> torch.Tensor:
        """The bytes of a chunk at its home in memory: uint8, 1-D."""
        lease = block.host_lease or block.device_lease
        assert lease is not None, "only a home in memory has bytes to point at"
        return _part(lease, block, chunk)

    def on_device(self, block: Block, chunk: int) -> torch.Tensor:
        """A chunk whose home is the device, where it is: uint8, 1-D, for work on the device.

        Raises:
            StorageError: an earlier write of this very chunk failed, or fails again.
        """
        assert block.home == "device"
        with self._lock:
            self._settle(block, chunk)
            return self.home(block, chunk)

    def stage(
        self, block: Block, chunk: int, *, wait: bool = True, lend: Lend | None = None
    ) -> Staged | None:
        """A buffer for the whole chunk whose old content is not wanted; None: there is no staging.

        A home that the CPU reaches is that buffer itself. With `wait`, writes under way are waited
        for if that frees staging; without it there is none either while this chunk is written.
        `lend` gives the staging; by default it comes from the arena.
        """
        with self._lock:
            if self.in_place(block):
                tensor = self.home(block, chunk)
                return Staged(tensor, CompletedTransfer(ZEROED_LANE), None)
            if not wait and self._is_in_flight(block, chunk):
                return None
            self._settle(block, chunk)
            nbytes = block.layout.chunk_nbytes[chunk]
            lease: StagingLease | None
            if lend is None:
                lease = self._staging(nbytes, block.name, wait=wait)
            else:
                lease = lend(nbytes)
            if lease is None:
                return None
            return Staged(lease.tensor[:nbytes], CompletedTransfer(ZEROED_LANE), lease)

    def start_read(
        self,
        block: Block,
        chunk: int,
        *,
        wait: bool = True,
        urgency: int = Urgency.BULK,
        into: torch.Tensor | None = None,
    ) -> Staged | None:
        """`start_load` for somebody who only reads: what is on its way home is read on its way.

        `into`: where the reader wants the chunk in the end, in memory that the CPU reaches. From
        nvme it is read there without staging: the `tensor` of the result is `into`.
        """
        with self._lock:
            written = self._writing.get(self._key(block, chunk))
            if written is not None:
                return written[1].shared()
            if into is None or block.home != "nvme":
                return self.start_load(block, chunk, wait=wait, urgency=urgency)
            self._settle(block, chunk)
            staged = Staged(into, CompletedTransfer(ZEROED_LANE), None)
            self._begin_load(block, chunk, staged, urgency)
            return staged

    def is_near(self, block: Block, chunk: int) -> bool:
        """Whether memory that the CPU reaches has the chunk: its home, a page, or a write of it."""
        with self._lock:
            return self._nearest(block, chunk) is not None

    def pin(self, block: Block, chunk: int) -> Pin | None:
        """Pin the current version of a chunk whose home is nvme; None: it reads as zeros."""
        assert self.nvme is not None
        with self._lock:
            is_void = self._key(block, chunk) in self._void
            return None if is_void else self.nvme.pin(block.records[chunk])

    def start_copy(self, block: Block, chunk: int, staged: Staged) -> None:
        """Start to bring the home's chunk into a buffer of its own from where it is nearest.

        For a block whose page, if it is on the device, is as new as its home or newer.

        Raises:
            OffloadError: nothing has it any more but the disk, and the read cannot be started.
        """
        if self.in_place(block):
            staged.tensor.copy_(self.home(block, chunk))  # holds up nobody else
            return
        with self._lock:
            source = self._nearest(block, chunk)
            if source is None:
                self._settle(block, chunk)
                self._begin_load(block, chunk, staged, Urgency.BULK)
            else:
                staged.tensor.copy_(source)

    def offer_copy(self, block: Block, lease: DeviceLease) -> None:
        """A page of the block is on the device, until `withdraw_copy`."""
        if self.device.host_addressable:
            with self._lock:
                self._copies[block.bucket.index] = lease

    def withdraw_copy(self, block: Block) -> None:
        """The page is about to leave the device."""
        with self._lock:
            self._copies.pop(block.bucket.index, None)

    def _nearest(self, block: Block, chunk: int) -> torch.Tensor | None:
        if self.in_place(block):
            return self.home(block, chunk)
        key = self._key(block, chunk)
        if key in self._failed:
            return None  # it is written again first
        if (written := self._writing.get(key)) is not None:
            # So is a version that is not home yet, should its write fail, before there is a next.
            return None if block.state_class in UPDATED_CLASSES else written[1].tensor
        lease = self._copies.get(block.bucket.index) if block.state_class == "weights" else None
        return None if lease is None else _part(lease, block, chunk)

    def start_load(
        self,
        block: Block,
        chunk: int,
        *,
        wait: bool = True,
        urgency: int = Urgency.BULK,
        lend: Lend | None = None,
    ) -> Staged | None:
        """Start to bring a chunk to where the CPU reaches it; None: there is no staging.

        A record that was never written reads as zeros. Wait for `Staged.transfer` before use.
        A write of the chunk that is under way is made as urgent as the load, `urgency`.

        Raises:
            OffloadError: an earlier write of this very chunk failed.
        """
        loaded = self.start_loads([block], chunk, wait=wait, urgency=urgency, lend=lend)
        return None if loaded is None else loaded[0]

    def start_loads(
        self,
        blocks: Sequence[Block],
        chunk: int,
        *,
        wait: bool = True,
        urgency: int = Urgency.BULK,
        lend: Lend | None = None,
    ) -> list[Staged] | None:
        """`start_load` of one chunk of several blocks: all of them, or None and nothing is held."""
        with self._lock:
            held = self._stage_all(blocks, chunk, wait, urgency, lend)
            if held is None and wait:
                # Every write has settled by now, but what was leased while they went on stood
                # between the pieces that they have given back.
                held = self._stage_all(blocks, chunk, wait, urgency, lend)
            if held is None:
                return None
            try:
                for block, staged in zip(blocks, held, strict=True):
                    self._begin_load(block, chunk, staged, urgency)
            except OffloadError:
                self.late.release(held, self.deadline_seconds)
                raise
            return held

    def _stage_all(
        self,
        blocks: Sequence[Block],
        chunk: int,
        wait: bool,
        urgency: int,
        lend: Lend | None,
    ) -> list[Staged] | None:
        held: list[Staged] = []
        try:
            for block in blocks:
                if (writing := self._writing.get(self._key(block, chunk))) is not None:
                    writing[0].expedite(urgency)
                staged = self.stage(block, chunk, wait=wait, lend=lend)
                if staged is None:
                    self.late.release(held)
                    return None
                held.append(staged)
        except OffloadError:
            self.late.release(held)
            raise
        return held

    def _begin_load(self, block: Block, chunk: int, staged: Staged, urgency: int) -> None:
        if self.in_place(block):
            return
        if block.home == "device":
            home = self.home(block, chunk)
            staged.transfer = self.device.start_copy_out(staged.tensor, home, block.name)
            staged.transfer.expedite(urgency)
        elif block.records[chunk].generation == 0 or self._key(block, chunk) in self._void:
            staged.tensor.zero_()
        else:
            assert self.nvme is not None
            record = block.records[chunk]
            staged.transfer = self.nvme.start_read(record, staged.tensor, urgency=urgency)

    def start_store(self, block: Block, chunk: int, staged: Staged) -> None:
        """Start to bring a chunk home; the store owns `staged` from here on.

        Raises:
            OffloadError: the write could not be started; the buffer is kept for `retry_failed`.
        """
        with self._lock:
            if self.in_place(block):
                return
            key = self._key(block, chunk)
            self._void.discard(key)
            try:
                if block.home == "device":
                    home = self.home(block, chunk)
                    transfer = self.device.start_copy_in(home, staged.tensor, block.name)
                else:
                    assert self.nvme is not None
                    transfer = self.nvme.start_write(block.records[chunk], staged.tensor)
            except OffloadError:
                self._failed[key] = staged
                raise
            self._writing[key] = (transfer, staged)

    def load(self, block: Block, chunk: int) -> Staged:
        """Bring a chunk to the CPU and wait for it.

        Raises:
            BudgetError: the host budget has no room for the chunk.
            StorageError: the read failed; no memory is kept.
        """
        staged = self.start_load(block, chunk)
        if staged is None:
            raise self.no_staging([block], chunk)
        try:
            staged.transfer.wait(self.deadline_seconds)
        except OffloadError:
            self.late.release([staged])
            raise
        return staged

    def stage_or_raise(self, block: Block, chunk: int) -> Staged:
        """`stage`, or BudgetError when the host budget has no room for the chunk."""
        if block.state_class in UPDATED_CLASSES:
            self.captured.wait()
        staged = self.stage(block, chunk)
        if staged is None:
            raise self.no_staging([block], chunk)
        return staged

    def settle_one(self) -> bool:
        """Wait for the oldest write that has not settled; False when there is none.

        Raises:
            StorageError: it failed; its buffer is kept for `retry_failed`.
        """
        with self._lock:
            if not self._writing:
                return False
            self._finish(next(iter(self._writing)))
            return True

    def settle_ended(self) -> None:
        """Settle the oldest writes as far as they have ended; waits for none.

        Raises:
            StorageError: one failed; its buffer is kept for `retry_failed`.
        """
        self.late.collect()
        with self._lock:
            while self._writing:
                key, (transfer, _) = next(iter(self._writing.items()))
                if not transfer.done():
                    return
                self._finish(key)

    def drain(self) -> None:
        """Wait for every write; raises the first error after all have settled.

        Raises:
            StorageError: a write failed; the buffers are kept for `retry_failed`.
        """
        with self._lock:
            first: OffloadError | None = None
            while self._writing:
                try:
                    self.settle_one()
                except DeadlineError:
                    raise
                except OffloadError as error:
                    first = first or error
            if first is not None:
                raise first

    def retry_failed(self) -> None:
        """Write again what an earlier write failed to bring home, if there is any, and wait.

        Raises:
            StorageError: it failed again; everything is still kept.
        """
        with self._lock:
            if not self._failed:
                return
            for key in list(self._failed):
                bucket, state_class, chunk = key
                self.start_store(self._blocks[bucket, state_class], chunk, self._failed.pop(key))
            self.drain()

    def void(self) -> None:
        """Give up what could not be written; on NVMe every chunk reads as zeros until it is stored.

        For state that is about to be replaced: nothing of the old one is read, damaged or not.

        Raises:
            DeadlineError: a write is still in flight; call again.
        """
        with self._lock:
            try:
                self.drain()
            except DeadlineError:
                raise
            except OffloadError:
                pass  # what has failed is given up here
            for staged in self._failed.values():
                staged.release()
            self._failed.clear()
            self._void = {
                self._key(block, chunk)
                for block in self._blocks.values()
                for chunk in range(len(block.records))
            }

    @staticmethod
    def _key(block: Block, chunk: int) -> tuple[int, str, int]:
        return block.bucket.index, block.state_class, chunk

    def adopt_write(self, block: Block, chunk: int, write: tuple[Transfer, Staged] | None) -> None:
        """Own a write to the chunk's home, as if by `start_store`; None: it has ended well."""
        with self._lock:
            self._void.discard(self._key(block, chunk))
            if write is not None:
                self._writing[self._key(block, chunk)] = write

    def settle(self, block: Block, chunk: int) -> None:
        """Wait for the write of a chunk, if one is in flight; nobody else is held up.

        Raises:
            StorageError: it failed, also when it was repeated; its buffer is kept.
        """
        with self._lock:
            written = self._writing.get(self._key(block, chunk))
        if written is not None:
            with contextlib.suppress(OffloadError):  # found again below
                written[0].wait(self.deadline_seconds)
        with self._lock:
            self._settle(block, chunk)

    def has_settled(self, block: Block) -> bool:
        """Whether no write to the block's home is in flight or has failed."""
        key = block.bucket.index, block.state_class
        with self._lock:
            return all(each[:2] != key for each in (*self._writing, *self._failed))

    def oldest_write(self) -> Transfer | None:
        """The write that has been in flight longest; None: there is none."""
        with self._lock:
            return next((transfer for transfer, _ in self._writing.values()), None)

    def _is_in_flight(self, block: Block, chunk: int) -> bool:
        written = self._writing.get(self._key(block, chunk))
        return written is not None and not written[0].done()

    def _settle(self, block: Block, chunk: int) -> None:
        key = self._key(block, chunk)
        if key in self._writing:
            self._finish(key)
        if key in self._failed:
            self.retry_failed()

    def _finish(self, key: tuple[int, str, int]) -> None:
        transfer, staged = self._writing[key]
        try:
            transfer.wait(self.deadline_seconds)
        except DeadlineError:
            raise  # still in flight
        except OffloadError:
            del self._writing[key]
            self._failed[key] = staged
            raise
        del self._writing[key]
        staged.release()

    def _staging(self, nbytes: int, owner: str, *, wait: bool) -> HostLease | None:
        self.settle_ended()
        lease = self.host.try_lease(nbytes, owner)
        while lease is None and wait:
            if not self.settle_one():
                if self._failed:
                    self.retry_failed()  # what could not be written holds staging
                elif not self.host.wait_for_visitors():
                    return None
            lease = self.host.try_lease(nbytes, owner)
        return lease

    def no_staging(self, blocks: Sequence[Block], chunk: int) -> BudgetError:
        """The error that says which chunk finds no staging in the host budget."""
        return BudgetError(
            tier="host",
            requested_bytes=sum(
                block.layout.chunk_nbytes[chunk] for block in blocks if not self.in_place(block)
            ),
            free_bytes=self.host.budget_bytes - self.host.used_bytes,
            budget_bytes=self.host.budget_bytes,
            owner=f"staging for {' and '.join(block.name for block in blocks)}",
        )


def _part(lease: HostLease | DeviceLease, block: Block, chunk: int) -> torch.Tensor:
    start = block.layout.chunk_offset_bytes[chunk]
    return lease.tensor[start : start + block.layout.chunk_nbytes[chunk]]
