"""Next versions of chunks, made before it is known whether they count.

[Note: Shadows]
A chunk can be updated while its home stays as it is. What has been made of it is *held*:

    home                held                               commit
    nvme                in a shadow extent of its record   the record's current extent flips
    host, device (CPU)  in staging, a copy of the home     copied to the home
    device (GPU)        in staging                         h2d copy

`drop` forgets it, and the home says what it has always said. Reads of the home are legal at any
time, and return the current version.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from offload.errors import DeadlineError, OffloadError, StorageError
from offload.partition.blocks import Block, BlockStore
from offload.partition.layout import UPDATED_CLASSES, num_held
from offload.partition.staging import ZEROED_LANE, Lend, Staged
from offload.telemetry import RetryLog
from offload.tiers.nvme import NvmeStore
from offload.tiers.transfer import CompletedTransfer, Transfer

Key = tuple[int, str, int]


@dataclass(slots=True, eq=False)
class _Held:
    """A held version; on nvme `staged` is there until the write, `transfer`, has settled."""

    staged: Staged | None
    transfer: Transfer | None = None
    failed: bool = False


class Shadows:
    """The held versions of an engine's chunks. Not thread-safe: its user has a lock.

    `retries` is told of writes that failed: whoever drops the version makes it again.
    """

    def __init__(self, store: BlockStore, retries: RetryLog | None = None) -> None:
        self._store = store
        self._retries = retries or RetryLog()
        self._held: dict[Key, _Held] = {}

    def reserve(self, share: float) -> None:
        """Allocate shadow extents for that share of all weights and optimizer state on NVMe.

        Raises:
            StorageError: see `NvmeStore.reserve`.
        """
        blocks = self._store.blocks()
        trainable = {block.bucket.index for block in blocks if block.state_class == "gradients"}
        chunk_nbytes = [
            nbytes
            for block in blocks
            if block.bucket.index in trainable and self._has_extent(block)
            for nbytes in block.layout.chunk_nbytes
        ]
        if chunk_nbytes:
            self._nvme.reserve_held(num_held(chunk_nbytes, share))

    def give_back(self) -> None:
        """Give the shadow extents back, as far as the file systems can; nothing is held."""
        assert not self._held, "versions are held"
        if self._store.nvme is not None:
            self._store.nvme.give_back_held()

    def start_loads(self, blocks: Sequence[Block], chunk: int, lend: Lend) -> list[Staged] | None:
        """Start to bring a chunk of several blocks to staging in which it can be updated.

        All of them, or None and nothing is held: there is no staging, or no room for what would be
        held, or the chunk is being written. What a step only reads may be the home itself. What
        memory has, a page on the device or a gradient on its way home, is not read from the disk:
        an edit of the page that its home has not seen voids what is held anyway.
        """
        copied = [b for b in blocks if self._is_copied(b, chunk)]
        loaded = [b for b in blocks if b not in copied]
        taken: list[Block] = []
        staged: dict[str, Staged] = {}
        try:
            for block in filter(self._has_extent, blocks):
                record = block.records[chunk]
                # A version whose write was late when it was dropped has its extent till it ends.
                if record.shadow is not None or not self._nvme.take_shadow(record):
                    break
                taken.append(block)
            else:
                self._lease_copies(copied, chunk, lend, staged)
                started = None
                if len(staged) == len(copied):  # nothing is read in vain
                    started = self._store.start_loads(loaded, chunk, wait=False, lend=lend)
                if started is not None:
                    names = (block.state_class for block in loaded)
                    staged.update(zip(names, started, strict=True))
                    for block in copied:
                        self._store.start_copy(block, chunk, staged[block.state_class])
                    return [staged[block.state_class] for block in blocks]
        except OffloadError:
            self._undo(taken, list(staged.values()), chunk)
            raise
        self._undo(taken, list(staged.values()), chunk)
        return None

    def _lease_copies(
        self, blocks: Sequence[Block], chunk: int, lend: Lend, staged: dict[str, Staged]
    ) -> None:
        """Lease staging for what is copied, as far as there is some."""
        for block in blocks:
            nbytes = block.layout.chunk_nbytes[chunk]
            lease = lend(nbytes)
            if lease is None:
                return
            tensor = lease.tensor[:nbytes]
            staged[block.state_class] = Staged(tensor, CompletedTransfer(ZEROED_LANE), lease)

    def cancel_loads(self, blocks: Sequence[Block], chunk: int, loaded: Sequence[Staged]) -> None:
        """Undo `start_loads`, whose chunk is not held: waits for what is in flight."""
        self._undo([b for b in blocks if self._has_extent(b)], loaded, chunk)

    def hold(self, block: Block, chunk: int, staged: Staged) -> None:
        """Hold what has been made of a chunk that `start_loads` has brought; `staged` is ours.

        If its home is being written for another reason, it can only be dropped.

        Raises:
            StorageError: the write could not be started; the chunk can only be dropped.
        """
        held = _Held(staged)
        self._held[self._key(block, chunk)] = held
        if self._has_extent(block):
            held.failed = True
            held.transfer = self._nvme.start_held_write(block.records[chunk], staged.tensor)
            held.failed = held.transfer is None

    def settle_ended(self) -> None:
        """Give back the staging of writes that have ended; waits for none, and raises nothing."""
        for held in self._held.values():
            if held.transfer is not None and held.transfer.done():
                self._settle(held)

    def oldest_write(self) -> Transfer | None:
        """A write that staging waits for; None: there is none in flight."""
        writes = (held.transfer for held in self._held.values())
        return next((transfer for transfer in writes if transfer is not None), None)

    def is_good(self, block: Block, chunk: int) -> bool:
        """Whether the held version can be committed, as far as is known."""
        held = self._held.get(self._key(block, chunk))
        return held is not None and not held.failed

    def commit(self, block: Block, chunk: int) -> None:
        """Make the held version current; a write that is in flight is the store's from here on.

        Raises:
            StorageError: the copy to a home on a GPU failed; the store keeps the buffer.
        """
        held = self._held.pop(self._key(block, chunk))
        assert not held.failed, "a version that could not be written"
        if self._has_extent(block):
            self._nvme.commit(block.records[chunk])
            write = None
            if held.transfer is not None and held.staged is not None:
                write = held.transfer, held.staged
            self._store.adopt_write(block, chunk, write)
            return
        assert held.staged is not None
        if self._store.in_place(block):
            self._store.home(block, chunk).copy_(held.staged.tensor)
            held.staged.release()
        else:
            self._store.start_store(block, chunk, held.staged)
            self._store.settle(block, chunk)

    def drop(self, block: Block, chunk: int) -> None:
        """Forget the held version, if there is one, after its write.

        A write that is late keeps its buffer and its extent until it ends.
        """
        held = self._held.pop(self._key(block, chunk), None)
        if held is None:
            return
        self._settle(held)
        if held.transfer is None:
            self._forget(block, chunk, held)
        else:
            self._store.late.keep([held.transfer], partial(self._forget, block, chunk, held))

    def _forget(self, block: Block, chunk: int, held: _Held) -> None:
        """The write of a dropped version has ended: give back what it had."""
        if held.staged is not None:
            held.staged.release()
        if self._has_extent(block):
            self._nvme.drop_shadow(block.records[chunk])

    def _settle(self, held: _Held) -> None:
        """Wait for a write; one that is late keeps its transfer."""
        if held.transfer is None:
            return
        try:
            held.transfer.wait(self._store.deadline_seconds)
        except DeadlineError as error:
            if not held.failed:
                self._retries.note(error)
            held.failed = True
            return
        except StorageError as error:
            self._retries.note(error)
            held.failed = True
        held.transfer = None
        if held.staged is not None:
            held.staged.release()
            held.staged = None

    def _undo(self, taken: Sequence[Block], loaded: Sequence[Staged], chunk: int) -> None:
        self._store.late.release(loaded, self._store.deadline_seconds)
        for block in taken:
            with contextlib.suppress(StorageError):
                self._nvme.drop_shadow(block.records[chunk])

    def _is_copied(self, block: Block, chunk: int) -> bool:
        """Whether the CPU reaches the chunk in memory where it must not be changed."""
        is_home = self._store.in_place(block) and not self._is_updated(block)
        return self._store.is_near(block, chunk) and not is_home

    @staticmethod
    def _is_updated(block: Block) -> bool:
        return block.state_class in UPDATED_CLASSES

    def _has_extent(self, block: Block) -> bool:
        return block.home == "nvme" and self._is_updated(block)

    @property
    def _nvme(self) -> NvmeStore:
        assert self._store.nvme is not None, "a block on nvme comes with a store"
        return self._store.nvme

    @staticmethod
    def _key(block: Block, chunk: int) -> Key:
        return block.bucket.index, block.state_class, chunk
