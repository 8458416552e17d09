"""The optimizer step beside the computation: ahead of its time in backward, late in forward.

[Note: Overlapped step]
    backward   the gradients of a chunk have all arrived: it is updated as if the step came, with
               the settings expected of it, and the result is *held* (shadows.py). That assumes
               that gradients are finite, are not clipped, and do not change any more.
    step       norm and finite check say what the step applies. Where that is what was expected the
               held version is committed, else it is dropped. The rest is *pending*: its settings
               are frozen, its gradients stay at home.
    forward    pending chunks are updated front to back while the forward runs. Whoever touches a
               bucket with a pending update (a fetch, a gradient, a read of its state) applies it
               first.

So the step is exact whatever was assumed: F + B + optimizer becomes max(F + B, optimizer). After a
step in which an assumption was wrong nothing is held for a few steps; everything is pending then.

An error while something is held drops it, and the step makes it again. An error in a pending update
is found again, and raised, by whoever needs the bucket; nothing is applied twice.

Nobody waits here but `apply` and `settle`: `advance` does what can be done without, and is called
often while the module runs. Sources: GreedySnake (2512.17570), LoHan (2403.06504), SuperOffload.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from offload.errors import NonFiniteError, OffloadError
from offload.optim.chunk_update import ChunkWork, StepSettings
from offload.optim.streamed import StreamedStep
from offload.optim.uninterrupted import uninterrupted
from offload.partition.blocks import Block, BlockStore, Staged, release_all
from offload.partition.layout import UPDATED_CLASSES, Bucket, Segment, segments
from offload.partition.parameters import ParameterState
from offload.partition.shadows import Shadows
from offload.schedule.footprint import OverlapRoom
from offload.tiers.host import HostArena
from offload.tiers.host_share import HostShare
from offload.tiers.transfer import Urgency

OWNER = "the overlapped optimizer step"
_READ_AHEAD = 3  # chunks; what is written takes the rest of the flow
# Steps in which nothing is held after one in which an assumption was wrong.
_PAUSE_STEPS = 4

Key = tuple[int, int]


@dataclass(slots=True, eq=False)
class _Loading:
    """A chunk on its way to staging, the settings it will be updated with, and whether to hold."""

    work: ChunkWork
    settings: StepSettings
    held: bool

    @property
    def key(self) -> Key:
        return self.work.bucket.index, self.work.chunk

    def done(self) -> bool:
        return all(staged.transfer.done() for staged in self.work.staged.values())


class OverlappedStep:
    """Updates chunks while backward and forward run; see [Note: Overlapped step]. Thread-safe.

    Args:
        streamed: what has been updated in the step, and what is left.
        buckets: all of them.
        parameters: by index.
        store: the state.
        host: lends the room.
        room: what may be taken; without flow nothing is overlapped, and every method does nothing.

    Attributes:
        seconds: spent here since the start, waits included.
        committed: chunks whose held version was committed since the start.
        dropped: chunks whose held version was dropped since the start.
    """

    def __init__(
        self,
        streamed: StreamedStep,
        buckets: Sequence[Bucket],
        parameters: Sequence[ParameterState],
        store: BlockStore,
        host: HostArena,
        room: OverlapRoom,
    ) -> None:
        self.seconds = 0.0
        self.committed = self.dropped = 0
        self._streamed = streamed
        self._parameters = parameters
        self._store = store
        self._host = host
        self._held_room = 0
        self._share: HostShare | None = None
        self._shadows = Shadows(store)
        self._lock = threading.RLock()
        self._trainable: list[Bucket] = []
        self._buckets: dict[int, Bucket] = {}
        self._segments: dict[Key, tuple[Segment, ...]] = {}
        self._loading: OrderedDict[Key, _Loading] = OrderedDict()
        # Of the backward under way:
        self._expected: StepSettings | None = None
        self._arrivals: Counter[int] = Counter()  # of gradients, by parameter
        self._expected_arrivals = 1
        self._complete: deque[Key] = deque()
        self._made: dict[Key, tuple[tuple[Segment, ...], ParameterState | None]] = {}
        self._held_bytes = 0  # of homes in memory
        self._pause_steps = 0
        # Of the step that has been taken:
        self._settings: StepSettings | None = None
        self._pending: dict[int, None] = {}
        self._troubled: set[Key] = set()  # for `apply` to try again
        self._failure: NonFiniteError | None = None
        for bucket in buckets:
            if bucket.trainable:
                self.admit(bucket)
        self.take_room(room)

    def take_room(self, room: OverlapRoom) -> None:
        """Overlap the steps in this room from here on, if it has a flow; there is no other.

        Raises:
            BudgetError: the system maps no more; nothing is overlapped.
            StorageError: see `NvmeStore.reserve`; nothing that lives on NVMe is held.
        """
        if room.flow_bytes:
            self._share = HostShare(self._host, room.host_bytes, OWNER, apart=True)
            self._held_room = room.held_bytes
            for bucket in self._trainable:
                self._overlap(bucket)
            self._shadows.reserve(room.held_share)

    def give_back(self) -> None:
        """Give the room back; until `take_room` nothing is overlapped.

        Nobody reads what is on its way home.

        Raises:
            StorageError: as `settle`, or something could not be written home; the room stays.
            OffloadError: a transfer that hangs has a part of the room, which stays.
        """
        self.settle()
        with self._timed():
            self._store.retry_failed()
            if self._share is not None:
                self._share.close()
                self._shadows.give_back()
            self._share = None
            self._buckets.clear()
            self._segments.clear()

    def admit(self, bucket: Bucket) -> None:
        """A bucket is trainable, and its blocks are there."""
        self._trainable.append(bucket)
        if self._share is not None:
            self._overlap(bucket)

    def _overlap(self, bucket: Bucket) -> None:
        blocks = self._blocks(bucket)
        if self._store.device.host_addressable and all(map(self._store.in_place, blocks)):
            return  # there is nothing to wait for
        self._buckets[bucket.index] = bucket
        for chunk in bucket.chunks:
            self._segments[bucket.index, chunk.index] = segments(bucket, chunk)

    # -- backward ----------------------------------------------------------------------------------

    def expect(self, settings: StepSettings | None, *, arrivals: int = 1) -> None:
        """A backward begins; a step that will probably apply this follows it. None: perhaps.

        Every gradient will come home so many times before it is the step's.
        """
        with self._timed():
            if self._expected is not None:
                self._distrust()  # of one backward before the step
                self._drop_all()
            self._expected = None if self._pause_steps else settings
            self._arrivals.clear()
            self._expected_arrivals = arrivals

    def arrived(self, state: ParameterState) -> None:
        """A gradient has come home. Raises nothing."""
        with self._timed():
            if self._expected is None:
                pass
            elif self._arrivals[state.index] == self._expected_arrivals:
                self._distrust()
                self._drop_all()
                self._expected = None
            else:
                self._note_arrival(state, self._expected)
        self.advance()

    def drop(self) -> None:
        """Gradients are forgotten, or the step is skipped: what was assumed of it is void."""
        with self._timed():
            if self._made:
                self._distrust()
            self._drop_all()
            self._expected = None

    # -- step --------------------------------------------------------------------------------------

    def take(self, settings: StepSettings) -> Sequence[int]:
        """The step applies this: commit what was held for it. The buckets that are left to it.

        Raises:
            OffloadError: of what the step before has left pending; call again.
        """
        with self._timed():
            if self._settings is settings:
                return tuple(self._pending)
            self._apply_all()
            self._pause_steps = max(0, self._pause_steps - 1)
            self._commit(settings)
            self._settings = settings
            self._pending = {
                index: None
                for index, bucket in sorted(self._buckets.items())
                if not self._streamed.runs_on_device(bucket)
                and not self._streamed.settle_bucket(bucket, settings)
            }
            if not self._pending:
                self._settings = None
        self.advance()
        with self._lock:
            return tuple(self._pending)

    def is_pending(self, bucket: int) -> bool:
        """Whether the newest state of a bucket is still to be made."""
        return bucket in self._pending

    def apply(self, bucket: int) -> None:
        """Make the pending update of a bucket, if there is one.

        Raises:
            StorageError: its state could not be read or written; call again.
        """
        if bucket in self._pending:
            with self._timed():
                self._apply(bucket)

    def settle(self) -> None:
        """State is about to be read or written: homes are what the last step says, nothing is held.

        Raises:
            StorageError: as `apply`.
            NonFiniteError: see `raise_failure`.
        """
        with self._timed():
            self.drop()
            self._apply_all()
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raises, once, NonFiniteError of a step that made a weight infinite or NaN."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def advance(self) -> None:
        """Do what can be done without waiting. Raises nothing."""
        if not (self._loading or self._pending or self._complete):
            return
        if not self._lock.acquire(blocking=False):
            return  # another thread does
        try:
            with self._timed():
                self._advance()
        finally:
            self._lock.release()

    def abandon(self) -> None:
        """All state is about to be replaced: forget what is pending, held, or on its way."""
        with self._timed():
            self._drop_all()
            for loading in self._loading.values():
                self._cancel(loading)
            self._loading.clear()
            self._expected = self._settings = self._failure = None
            self._pending.clear()
            self._troubled.clear()

    # -- inside ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        with self._lock:
            started, before = time.perf_counter(), self.seconds
            try:
                yield
            finally:
                self.seconds = before + time.perf_counter() - started

    def _advance(self) -> None:
        with contextlib.suppress(OffloadError):  # the store keeps the buffer, and tries again
            self._store.settle_ended()
        self._shadows.settle_ended()
        while self._loading and next(iter(self._loading.values())).done():
            self._end_oldest()
        while len(self._loading) < _READ_AHEAD:
            key = self._next()
            if key is None:
                return
            try:
                started = self._start(key)
            except OffloadError:
                self._troubled.add(key)
                continue
            if not started:
                return
            if self._complete and self._complete[0] == key:
                self._complete.popleft()

    def _note_arrival(self, state: ParameterState, expected: StepSettings) -> None:
        bucket = self._buckets.get(state.bucket)
        if bucket is None or self._streamed.runs_on_device(bucket):
            return
        self._arrivals[state.index] += 1
        for chunk in bucket.chunks:
            key = (state.bucket, chunk.index)
            due = {s.param for s in self._segments[key]} & expected.hyper.keys()
            if state.index in due and all(
                self._arrivals[param] == self._expected_arrivals for param in due
            ):
                self._complete.append(key)

    def _next(self) -> Key | None:
        """The chunk to start with next: what is late comes before what is early."""
        for index in self._pending:
            for chunk in self._buckets[index].chunks:
                key = (index, chunk.index)
                if key not in self._loading and key not in self._troubled and self._is_left(key):
                    return key
        if self._settings is None and self._expected is not None and self._complete:
            return self._complete[0]
        return None

    def _is_left(self, key: Key) -> bool:
        """Whether the step that has been taken has still to update a chunk."""
        bucket, settings = self._buckets[key[0]], self._settings
        return settings is not None and (
            self._streamed.work_left(bucket, bucket.chunks[key[1]], settings) is not None
        )

    def _start(self, key: Key, *, in_arena: bool = False) -> bool:
        """Start to bring a chunk to staging; False, and nothing started: there is no room."""
        settings = self._settings or self._expected
        assert settings is not None
        held = self._settings is None
        bucket = self._buckets[key[0]]
        work = self._streamed.work_left(bucket, bucket.chunks[key[1]], settings)
        assert work is not None, "a chunk that is not due"
        blocks = self._blocks(bucket)
        lend = self._share.take if self._share is not None else None
        assert lend is not None, "nothing is overlapped"
        held_bytes = self._memory_bytes(key) if held else 0
        if held:
            if self._held_bytes + held_bytes > self._held_room:
                return False
            staged = self._shadows.start_loads(blocks, key[1], lend)
        else:
            staged = self._store.start_loads(
                blocks, key[1], wait=in_arena, lend=None if in_arena else lend
            )
        if staged is None:
            return False
        self._held_bytes += held_bytes
        work.staged = {block.state_class: s for block, s in zip(blocks, staged, strict=True)}
        self._loading[key] = _Loading(work, settings, held)
        return True

    def _end_oldest(self) -> None:
        """Update the chunk that has been loading longest; a failed load leaves it as it was."""
        key, loading = next(iter(self._loading.items()))
        try:
            for staged in loading.work.staged.values():
                staged.transfer.wait(self._store.deadline_seconds)
        except OffloadError:
            del self._loading[key]
            self._cancel(loading)
            self._troubled.add(key)
            return
        with uninterrupted():
            del self._loading[key]
            not_finite = self._streamed.compute(loading.work, loading.settings)
            if loading.held:
                self._hold(loading, not_finite)
                return
            self._streamed.note_updated(loading.work, loading.settings, not_finite)
            self._store_home(loading.work)
            self._settle_bucket(key[0])

    def _hold(self, loading: _Loading, not_finite: ParameterState | None) -> None:
        work, key = loading.work, loading.key
        for state_class in UPDATED_CLASSES:
            staged = work.staged.pop(state_class, None)
            if staged is not None:
                with contextlib.suppress(OffloadError):  # then it is not committed
                    self._shadows.hold(self._block(key, state_class), key[1], staged)
        work.release()
        self._made[key] = (work.segments, not_finite)
        if self._settings is loading.settings:  # the step has been taken meanwhile
            if self._is_good(key):
                self._commit_made(key, loading.settings)
            else:
                self._drop_made(key)
            self._settle_bucket(key[0])

    def _store_home(self, work: ChunkWork) -> None:
        for state_class in UPDATED_CLASSES:
            staged = work.staged.pop(state_class, None)
            if staged is None:
                continue
            block = self._store.block(work.bucket.index, state_class)
            with contextlib.suppress(OffloadError):  # the store keeps the buffer, and tries again
                self._store.start_store(block, work.chunk, staged)
                if block.home == "device":
                    self._store.settle(block, work.chunk)
        work.release()

    def _settle_bucket(self, index: int) -> None:
        if (
            self._settings is not None
            and index in self._pending
            and self._streamed.settle_bucket(self._buckets[index], self._settings)
        ):
            del self._pending[index]
            self._finish_if_done()

    def _finish_if_done(self) -> None:
        if self._pending or self._settings is None:
            return
        self._settings = None
        try:
            self._streamed.end_if_done()
        except NonFiniteError as error:
            self._failure = error

    def _apply(self, index: int) -> None:
        self._store.retry_failed()
        self._troubled.clear()
        bucket = self._buckets[index]
        for chunk in bucket.chunks:
            key = (index, chunk.index)
            while self._is_left(key):
                if key in self._loading:
                    self._hurry(key)
                    self._advance()
                    if key in self._loading:
                        self._loading.move_to_end(key, last=False)
                        self._end_oldest()
                elif not self._start(key):
                    self._make_room(key)
                if key in self._troubled:
                    self._troubled.discard(key)
                    self._raise_trouble(bucket, key[1])

    def _hurry(self, key: Key) -> None:
        """Somebody waits for this chunk."""
        for staged in self._loading[key].work.staged.values():
            staged.transfer.expedite(Urgency.DEMAND)

    def _make_room(self, key: Key) -> None:
        """Wait for something that gives staging back; without it, stage the chunk in the arena."""
        if self._loading:
            self._end_oldest()
        elif not self._store.settle_one() and not self._start(key, in_arena=True):
            raise self._store.no_staging(self._blocks(self._buckets[key[0]]), key[1])

    def _raise_trouble(self, bucket: Bucket, chunk: int) -> None:
        """Load the chunk again, for its error; a second try may as well succeed."""
        for block in self._blocks(bucket):
            staged = self._store.load(block, chunk)
            staged.release()

    def _apply_all(self) -> None:
        while self._pending:
            self._apply(next(iter(self._pending)))

    def _commit(self, settings: StepSettings) -> None:
        """Commit what is as this step wants it, drop the rest."""
        wrong = False
        for key, loading in list(self._loading.items()):
            if self._is_as_expected(key, loading.work.segments, settings):
                loading.settings = settings
            else:
                del self._loading[key]
                self._cancel(loading)
                wrong = True
        for key, (made, _) in list(self._made.items()):
            if self._is_good(key) and self._is_as_expected(key, made, settings):
                self._commit_made(key, settings)
            else:
                self._drop_made(key)
                wrong = True
        if wrong:
            self._distrust()
        self._complete.clear()
        self._arrivals.clear()
        self._expected = None
        self._troubled.clear()

    def _is_as_expected(self, key: Key, made: Sequence[Segment], settings: StepSettings) -> bool:
        expected = self._expected
        if expected is None or expected.gradient_scale != settings.gradient_scale:
            return False
        due = [s for s in self._segments[key] if s.param in settings.hyper]
        return list(made) == due and all(
            settings.hyper[s.param] == expected.hyper[s.param]
            and not self._parameters[s.param].edited
            for s in due
        )

    def _updated_blocks(self, key: Key) -> list[Block]:
        blocks = self._blocks(self._buckets[key[0]])
        return [block for block in blocks if block.state_class in UPDATED_CLASSES]

    def _is_good(self, key: Key) -> bool:
        return all(self._shadows.is_good(block, key[1]) for block in self._updated_blocks(key))

    def _commit_made(self, key: Key, settings: StepSettings) -> None:
        made, not_finite = self._made.pop(key)
        bucket = self._buckets[key[0]]
        self._held_bytes -= self._memory_bytes(key)
        with uninterrupted():
            for block in self._updated_blocks(key):
                self._shadows.commit(block, key[1])
            work = ChunkWork(bucket, key[1], made, {})
            self._streamed.note_updated(work, settings, not_finite)
        self.committed += 1

    def _drop_made(self, key: Key) -> None:
        del self._made[key]
        self._held_bytes -= self._memory_bytes(key)
        for block in self._updated_blocks(key):
            self._shadows.drop(block, key[1])
        self.dropped += 1

    def _drop_all(self) -> None:
        for key, loading in list(self._loading.items()):
            if loading.held and loading.settings is not self._settings:
                del self._loading[key]
                self._cancel(loading)
        for key in list(self._made):
            self._drop_made(key)
        self._complete.clear()
        self._arrivals.clear()

    def _cancel(self, loading: _Loading) -> None:
        work = loading.work
        blocks = [self._block(loading.key, state_class) for state_class in work.staged]
        held: list[Staged] = list(work.staged.values())
        work.staged = {}
        if loading.held:
            self._held_bytes -= self._memory_bytes(loading.key)
            self._shadows.cancel_loads(blocks, work.chunk, held)
        else:
            release_all(held, self._store.deadline_seconds)

    def _distrust(self) -> None:
        self._pause_steps = _PAUSE_STEPS

    def _memory_bytes(self, key: Key) -> int:
        """Bytes of held versions whose homes are in memory."""
        return sum(
            block.layout.chunk_nbytes[key[1]]
            for block in self._updated_blocks(key)
            if block.home != "nvme"
        )

    def _blocks(self, bucket: Bucket) -> list[Block]:
        return [
            self._store.block(bucket.index, state_class)
            for state_class in self._store.classes(bucket.index)
        ]

    def _block(self, key: Key, state_class: str) -> Block:
        return self._store.block(key[0], state_class)
