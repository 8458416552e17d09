"""Chunks that are updated beside the computation: on their way, or held ahead of their step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload.errors import OffloadError
from offload.optim.chunk_update import ChunkWork, StepSettings
from offload.optim.complete_chunks import Key
from offload.partition.blocks import Block, BlockStore
from offload.partition.layout import UPDATED_CLASSES, Bucket, Segment
from offload.partition.parameters import ParameterState
from offload.partition.shadows import Shadows
from offload.partition.staging import Staged
from offload.schedule.footprint import OverlapRoom
from offload.telemetry import RetryLog
from offload.tiers.host import HostArena
from offload.tiers.host_share import HostShare
from offload.tiers.transfer import Transfer, Urgency

OWNER = "the overlapped optimizer step"


@dataclass(slots=True, eq=False)
class LoadingChunk:
    """A chunk on its way to staging, the settings it will be updated with, and whether to hold."""

    work: ChunkWork
    settings: StepSettings
    held: bool

    @property
    def key(self) -> Key:
        """Its bucket, and its number there."""
        return self.work.bucket.index, self.work.chunk

    @property
    def transfers(self) -> list[Transfer]:
        """Those that bring it."""
        return [staged.transfer for staged in self.work.staged.values()]

    def done(self) -> bool:
        """Whether all of it has come, or failed."""
        return all(transfer.done() for transfer in self.transfers)

    def expedite(self) -> None:
        """Somebody waits for it."""
        for transfer in self.transfers:
            transfer.expedite(Urgency.DEMAND)


class HeldChunks:
    """The held versions by chunk; see [Note: Shadows]. Not thread-safe: its user has a lock.

    Args:
        store: the state.
        retries: is told of what has failed; such a version is not good.

    Attributes:
        made: of each held chunk, the segments that were updated, and a parameter that is not
            finite in the held version.
        share: the host memory of what is on its way, and of held versions; None: no room.
    """

    def __init__(self, store: BlockStore, retries: RetryLog) -> None:
        self.made: dict[Key, tuple[tuple[Segment, ...], ParameterState | None]] = {}
        self._store = store
        self._shadows = Shadows(store, retries)
        self._retries = retries
        self.share: HostShare | None = None
        self._left_bytes = 0  # for held versions whose homes are in memory
        self._nbytes: dict[Key, int] = {}  # that each chunk takes of them

    def take_room(self, host: HostArena, room: OverlapRoom) -> None:
        """Take the room; the arena grows by it.

        Raises:
            BudgetError: the system maps no more.
        """
        assert self.share is None, "there is a room"
        self.share = HostShare(host, room.host_bytes, OWNER, apart=True)
        self._left_bytes = room.held_bytes

    def reserve(self, share: float) -> None:
        """See `Shadows.reserve`."""
        self._shadows.reserve(share)

    def give_back_room(self) -> None:
        """Give the room back, if there is one; nothing is held, loading or being written.

        Raises:
            OffloadError: a transfer that hangs has a part of it; it stays.
        """
        if self.share is not None:
            self._store.late.collect()
            self.share.close()
            self._shadows.give_back()
        self.share = None
        self._nbytes.clear()

    def admit(self, bucket: Bucket) -> None:
        """Chunks of this bucket may be held; its blocks are there."""
        for chunk in bucket.chunks:
            key = (bucket.index, chunk.index)
            self._nbytes[key] = sum(
                block.layout.chunk_nbytes[chunk.index]
                for block in self._blocks(key)
                if block.home != "nvme"
            )

    def has_room_for(self, key: Key) -> bool:
        """Whether the next version of a chunk has room in memory, as far as it needs some."""
        return self._nbytes[key] <= self._left_bytes

    def start_loads(self, key: Key, blocks: Sequence[Block]) -> list[Staged] | None:
        """See `Shadows.start_loads`. What it returns is for `hold`, or for `cancel`."""
        assert self.share is not None, "nothing is held without room"
        staged = self._shadows.start_loads(blocks, key[1], self.share.take)
        if staged is not None:
            self._left_bytes -= self._nbytes[key]
        return staged

    def cancel(self, key: Key, work: ChunkWork) -> None:
        """Undo `start_loads`: waits for what is in flight."""
        staged, work.staged = work.staged, {}
        self._left_bytes += self._nbytes[key]
        blocks = [self._store.block(key[0], state_class) for state_class in staged]
        self._shadows.cancel_loads(blocks, key[1], list(staged.values()))

    def hold(self, key: Key, work: ChunkWork, not_finite: ParameterState | None) -> None:
        """Hold what has been made of a chunk."""
        for block in self._blocks(key):
            try:
                self._shadows.hold(block, key[1], work.staged.pop(block.state_class))
            except OffloadError as error:
                self._retries.note(error)
        work.release()
        self.made[key] = (work.segments, not_finite)

    def is_good(self, key: Key) -> bool:
        """Whether the held version can be committed, as far as is known."""
        return all(self._shadows.is_good(block, key[1]) for block in self._blocks(key))

    def commit(self, key: Key) -> tuple[tuple[Segment, ...], ParameterState | None]:
        """Make the held version current; returns what `made` has said of it."""
        self._left_bytes += self._nbytes[key]
        made = self.made.pop(key)
        for block in self._blocks(key):
            try:
                self._shadows.commit(block, key[1])
            except OffloadError as error:  # the store keeps the buffer, and tries again
                self._retries.note(error)
        return made

    def drop(self, key: Key) -> None:
        """Forget the held version, after its writes."""
        self._left_bytes += self._nbytes[key]
        del self.made[key]
        for block in self._blocks(key):
            self._shadows.drop(block, key[1])

    def settle_ended(self) -> None:
        """See `Shadows.settle_ended`."""
        self._shadows.settle_ended()

    def oldest_write(self) -> Transfer | None:
        """See `Shadows.oldest_write`."""
        return self._shadows.oldest_write()

    def _blocks(self, key: Key) -> list[Block]:
        """What is updated of a bucket."""
        return [
            self._store.block(key[0], state_class)
            for state_class in self._store.classes(key[0])
            if state_class in UPDATED_CLASSES
        ]
