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
is found again, and raised, by whoever needs the bucket; nothing is applied twice. Errors
that nobody is told of are counted in `retries`.

Nobody waits here but `apply`, `take` and `settle`: the rest does what can be done without. Sources:
GreedySnake (2512.17570), LoHan (2403.06504), SuperOffload.
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence

from offload.errors import EngineStateError, NonFiniteError, OffloadError
from offload.optim.chunk_update import ChunkWork, StepSettings
from offload.optim.complete_chunks import CompleteChunks, Key
from offload.optim.held import HeldChunks, LoadingChunk
from offload.optim.streamed import StreamedStep
from offload.optim.turns import Turns
from offload.partition.blocks import Block, BlockStore
from offload.partition.layout import UPDATED_CLASSES, Bucket, Segment
from offload.partition.parameters import ParameterState
from offload.schedule.executor import Pump
from offload.schedule.footprint import OverlapRoom
from offload.telemetry import RetryLog
from offload.tiers.host import HostArena
from offload.tiers.transfer import Transfer
from offload.tiers.uninterrupted import let_signals_in, uninterrupted

_READ_AHEAD = 4  # chunks; what is written takes the rest of the flow
# Steps in which nothing is held after one in which an assumption was wrong.
_PAUSE_STEPS = 4


class OverlappedStep:
    """Updates chunks while backward and forward run; see [Note: Overlapped step]. Thread-safe.

    In a forked child nothing is updated: the state is the parent's.

    Args:
        streamed: what has been updated in the step, and what is left.
        buckets: all of them.
        parameters: by index.
        store: the state.
        host: lends the room.
        room: what may be taken; without flow nothing is overlapped, and every method does nothing.

    Attributes:
        committed: chunks whose held version was committed since the start.
        dropped: chunks whose held version was dropped since the start.
        retries: I/O errors that nobody was told of, the step's and others'.
    """

    def __init__(
        self,
        streamed: StreamedStep,
        buckets: Sequence[Bucket],
        parameters: Sequence[ParameterState],
        store: BlockStore,
        host: HostArena,
        room: OverlapRoom,
        retries: RetryLog | None = None,
    ) -> None:
        self.committed = self.dropped = 0
        self.retries = retries or RetryLog()
        self._streamed, self._parameters = streamed, parameters
        self._store = store
        self._host = host
        self._pid = os.getpid()
        self._turns = Turns(store.device)
        self._pump: Pump | None = None
        if self._turns.has_pump:
            self._pump = Pump(self._turn, name="offload-updates", what="an overlapped update")
        self._trainable: list[Bucket] = []
        self._buckets: dict[int, Bucket] = {}
        self._loading: OrderedDict[Key, LoadingChunk] = OrderedDict()
        # Of the backward under way:
        self._expected: StepSettings | None = None
        self._told: deque[ParameterState] = deque()  # gradients nobody has looked at yet
        self._complete = CompleteChunks(streamed.segments)
        self._held = HeldChunks(store, self.retries)
        self._pause_steps = 0
        # Of the step that has been taken:
        self._settings: StepSettings | None = None
        self._pending: dict[int, None] = {}
        self._troubled: set[Key] = set()  # for `apply` to try again
        self._failures: deque[NonFiniteError] = deque()
        for bucket in buckets:
            if bucket.trainable:
                self.admit(bucket)
        self.take_room(room)

    @property
    def seconds(self) -> float:
        """Spent here since the start by others than the pump, waits included."""
        return self._turns.seconds

    def take_room(self, room: OverlapRoom) -> None:
        """Overlap the steps in this room from here on, if it has a flow; there is no other.

        Raises:
            BudgetError: the system maps no more; nothing is overlapped.
            StorageError: see `NvmeStore.reserve`; nothing that lives on NVMe is held.
        """
        if room.flow_bytes:
            self._held.take_room(self._host, room)
            for bucket in self._trainable:
                self._overlap(bucket)
            self._held.reserve(room.held_share)

    def give_back(self) -> None:
        """Give the room back; until `take_room` nothing is overlapped.

        Nobody reads what is on its way home.

        Raises:
            StorageError: as `settle`, or something could not be written home; the room stays.
            OffloadError: a transfer that hangs has a part of the room, which stays.
        """
        self.settle()
        with self._entered():
            self._store.retry_failed()
            self._store.drain()
            self._held.give_back_room()
            self._buckets.clear()

    def admit(self, bucket: Bucket) -> None:
        """A bucket is trainable, and its blocks are there."""
        self._trainable.append(bucket)
        if self._held.share is not None:
            self._overlap(bucket)

    def _overlap(self, bucket: Bucket) -> None:
        blocks = self._blocks(bucket)
        if self._store.device.host_addressable and all(map(self._store.in_place, blocks)):
            return  # there is nothing to wait for
        self._buckets[bucket.index] = bucket
        self._held.admit(bucket)

    # -- backward ----------------------------------------------------------------------------------

    def expect(self, settings: StepSettings | None, *, arrivals: int = 1) -> None:
        """A backward begins; a step that will probably apply this follows it. None: perhaps.

        Every gradient will come home so many times before it is the step's.
        """
        with self._entered(marks=True):
            if self._expected is not None:
                self._pause_steps = _PAUSE_STEPS  # of one backward before the step
                self._drop_all()
            self._expected = None if self._pause_steps else settings
            self._complete.expect(() if settings is None else settings.hyper.keys(), arrivals)

    def arrived(self, state: ParameterState) -> None:
        """A gradient has come home. Raises nothing."""
        if not self._buckets:
            return
        self._told.append(state)
        if self._pump is None:
            with self._entered():
                self._advance()
        elif self._expected is not None:
            self._pump.notify()

    def drop(self) -> None:
        """Gradients are forgotten, or the step is skipped: what was assumed of it is void."""
        with self._entered():
            self._drop()

    # -- step --------------------------------------------------------------------------------------

    def take(self, settings: StepSettings) -> Sequence[int]:
        """The step applies this: commit what was held for it. The buckets that are left to it.

        Raises:
            OffloadError: of what the step before has left pending; call again.
        """
        self.retries.warn_once()
        with self._entered(marks=True):
            self._check_pump()
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
                and not (self._is_home(bucket) and self._streamed.settle_bucket(bucket, settings))
            }
            if not self._pending:
                self._settings = None
            if self._pump is None:
                self._advance()
            return tuple(self._pending)

    def is_pending(self, bucket: int) -> bool:
        """Whether the newest state of a bucket is still to be made."""
        return bucket in self._pending

    def apply(self, bucket: int) -> None:
        """Make the pending update of a bucket, if there is one.

        Raises:
            StorageError: its state could not be read or written; call again.
            EngineStateError: this is a forked child.
        """
        if bucket in self._pending:
            with self._entered():
                self._check_pump()
                if bucket in self._pending:  # no other thread was faster
                    self._apply(bucket)

    def settle(self) -> None:
        """State is about to be read or written: homes are what the last step says, nothing is held.

        Raises:
            StorageError: as `apply`.
            NonFiniteError: see `raise_failure`.
        """
        self.retries.warn_once()
        with self._entered():
            self._check_pump()
            self._drop()
            self._apply_all()
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raises what has come to light since the step was taken.

        Raises:
            NonFiniteError: the step made a weight infinite or NaN; raised once.
            OffloadError: the pump has failed; raised until `abandon`.
        """
        self._check_pump()
        if self._failures:
            raise self._failures.popleft()

    def advance(self) -> None:
        """Do what can be done without waiting; a pump does it without being told."""
        if self._pump is not None or not (self._loading or self._pending or self._complete):
            return
        with self._turns.if_free() as has_turn:  # else another thread does
            if has_turn:
                self._advance()

    def abandon(self) -> None:
        """All state is about to be replaced: forget what is pending, held, or on its way."""
        if self._pid != os.getpid():
            return
        with self._entered():
            self._drop_all()
            for loading in self._loading.values():
                self._cancel(loading)
            self._loading.clear()
            self._expected = self._settings = None
            self._failures.clear()
            self._pending.clear()
            self._troubled.clear()
            if self._pump is not None:
                self._pump.forget_error()

    def close(self) -> None:
        """`abandon`, and end the pump. Does nothing in a forked child."""
        try:
            self.abandon()
        finally:
            if self._pump is not None:
                self._pump.close()

    # -- inside ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _entered(self, *, marks: bool = False) -> Iterator[None]:
        """A turn of a thread that is not the pump (see `Turns.caller`), which goes on after it."""
        with self._turns.caller(marks=marks):
            self._hear()
            yield
        if self._pump is not None and (self._loading or self._pending or self._complete):
            self._pump.notify()

    def _turn(self) -> Sequence[Transfer]:
        """One turn of the pump: at most one update. What to wait for before the next."""
        assert self._pump is not None, "a turn of the pump"
        with self._turns.pump():
            try:
                self._hear()
                return self._advance(most=1)
            except BaseException as error:  # noqa: BLE001 - `_check_pump` raises it
                self._pump.fail(error)
                return ()

    def _check_pump(self) -> None:
        if self._pump is not None:
            self._pump.raise_error()

    def _hear(self) -> None:
        """Look at the gradients that have come home."""
        while self._told:
            state = self._told.popleft()
            if self._expected is None:
                continue
            if self._complete.is_one_too_many(state):
                self._pause_steps = _PAUSE_STEPS
                self._drop_all()
                self._expected = None
                continue
            bucket = self._buckets.get(state.bucket)
            if bucket is not None and not self._streamed.runs_on_device(bucket):
                self._complete.note(state, bucket)

    def _advance(self, most: int | None = None) -> Sequence[Transfer]:
        """Do what can be done without waiting; what to wait for, to do more.

        At most so many updates are made.
        """
        try:
            self._store.settle_ended()
        except OffloadError as error:  # the store keeps the buffer, and tries again
            self.retries.note(error)
        self._held.settle_ended()
        num_ended = 0
        while num_ended != most and self._loading and next(iter(self._loading.values())).done():
            self._end_oldest()
            num_ended += 1
        has_room = self._start_more()
        if self._loading:
            oldest = next(iter(self._loading.values()))
            return oldest.transfers
        writes = () if has_room else (self._held.oldest_write(), self._store.oldest_write())
        return [write for write in writes if write is not None][:1]

    def _start_more(self) -> bool:
        """Read ahead; False: there is more to read, and no room for it."""
        while len(self._loading) < _READ_AHEAD:
            key = self._next()
            if key is None:
                return True
            try:
                if not self._start(key):
                    return False
            except OffloadError as error:
                self.retries.note(error)
                self._troubled.add(key)
            self._complete.discard(key)
        return True

    def _next(self) -> Key | None:
        """The chunk to start with next: what is late comes before what is early."""
        for index in self._pending:
            for chunk in self._buckets[index].chunks:
                key = (index, chunk.index)
                if key not in self._loading and key not in self._troubled and self._is_left(key):
                    return key
        if self._settings is None and self._expected is not None:
            # What finds no room in memory is late. Extents are as many as there is state, or of no
            # use for long: who finds none keeps the others waiting.
            return next(filter(self._held.has_room_for, self._complete), None)
        return None

    def _is_left(self, key: Key) -> bool:
        """Whether the step that has been taken has still to update a chunk."""
        bucket, settings = self._buckets[key[0]], self._settings
        return settings is not None and self._streamed.has_work_left(
            bucket, bucket.chunks[key[1]], settings
        )

    def _start(self, key: Key, *, in_arena: bool = False) -> bool:
        """Start to bring a chunk to staging; False, and nothing started: there is no room."""
        settings = self._settings or self._expected
        assert settings is not None
        bucket, held = self._buckets[key[0]], self._settings is None
        work = self._streamed.work_left(bucket, bucket.chunks[key[1]], settings)
        assert work is not None, "a chunk that is not due"
        blocks = self._blocks(bucket)
        assert self._held.share is not None, "nothing is overlapped"
        lend = self._held.share.take
        if held:
            staged = self._held.start_loads(key, blocks)
        else:
            staged = self._store.start_loads(
                blocks, key[1], wait=in_arena, lend=None if in_arena else lend
            )
        if staged is None:
            return False
        work.staged = {block.state_class: s for block, s in zip(blocks, staged, strict=True)}
        self._loading[key] = LoadingChunk(work, settings, held)
        return True

    def _end_oldest(self) -> None:
        """Update the chunk that has been loading longest; a failed load leaves it as it was."""
        key, loading = next(iter(self._loading.items()))
        try:
            for transfer in loading.transfers:
                transfer.wait(self._store.deadline_seconds)
        except OffloadError as error:
            self.retries.note(error)
            del self._loading[key]
            self._cancel(loading)
            self._troubled.add(key)
            return
        with uninterrupted():
            del self._loading[key]
            try:
                not_finite = self._streamed.compute(loading.work, loading.settings)
            except BaseException:
                self._cancel(loading)
                raise
            if loading.held:
                self._hold(loading, not_finite)
                return
            self._streamed.note_updated(loading.work, loading.settings, not_finite)
            self._store_home(loading.work)
            self._settle_bucket(key[0])

    def _hold(self, loading: LoadingChunk, not_finite: ParameterState | None) -> None:
        key = loading.key
        self._held.hold(key, loading.work, not_finite)
        if self._settings is loading.settings:  # the step has been taken meanwhile
            if self._held.is_good(key):
                self._commit_made(key, loading.settings)
            else:
                self._drop_made(key)
            self._settle_bucket(key[0])

    def _store_home(self, work: ChunkWork) -> None:
        blocks = [self._store.block(work.bucket.index, name) for name in work.staged]
        try:
            self._streamed.store_updated(work)
            for block in blocks:
                if block.home == "device":
                    self._store.settle(block, work.chunk)
        except OffloadError as error:  # the store keeps the buffer, and tries again
            self.retries.note(error)

    def _settle_bucket(self, index: int) -> None:
        if (
            self._settings is not None
            and index in self._pending
            and self._is_home(self._buckets[index])
            and self._streamed.settle_bucket(self._buckets[index], self._settings)
        ):
            del self._pending[index]
            self._finish_if_done()

    def _is_home(self, bucket: Bucket) -> bool:
        """Whether all writes to homes that are used where they are, on the device, have ended well.

        Others are read through the store, which repeats what has failed before.
        """
        return all(map(self._store.has_settled, self._updated_on_device(bucket)))

    def _updated_on_device(self, bucket: Bucket) -> list[Block]:
        updated = (b for b in self._blocks(bucket) if b.state_class in UPDATED_CLASSES)
        return [block for block in updated if block.home == "device"]

    def _finish_if_done(self) -> None:
        if self._pending or self._settings is None:
            return
        self._settings = None
        try:
            self._streamed.end_if_done()
        except NonFiniteError as error:
            self._failures.append(error)

    def _apply(self, index: int) -> None:
        if self._pid != os.getpid():
            raise EngineStateError(
                f"the newest weights of bucket {index} are still to be made, which a forked child "
                "cannot do",
                remedy="call engine.state_dict() before the fork",
            )
        self._store.retry_failed()
        self._troubled.clear()
        bucket = self._buckets[index]
        for chunk in bucket.chunks:
            key = (index, chunk.index)
            while self._is_left(key):
                let_signals_in()
                if key in self._loading:
                    self._loading[key].expedite()
                    self._advance(None if self._pump is None else 0)
                    if key in self._loading:
                        self._loading.move_to_end(key, last=False)
                        self._end_oldest()
                elif not self._start(key):
                    self._make_room(key)
                if key in self._troubled:
                    self._troubled.discard(key)
                    self._raise_trouble(bucket, key[1])
            for block in self._updated_on_device(bucket):
                self._store.settle(block, chunk.index)
        self._settle_bucket(index)

    def _make_room(self, key: Key) -> None:
        """Wait for something that gives staging back; without it, stage the chunk in the arena."""
        if self._loading:
            self._end_oldest()
        elif not self._store.settle_one() and not self._start(key, in_arena=True):
            raise self._store.no_staging(self._blocks(self._buckets[key[0]]), key[1])

    def _raise_trouble(self, bucket: Bucket, chunk: int) -> None:
        """Load the chunk again, for its error; a second try may as well succeed."""
        for block in self._blocks(bucket):
            self._store.load(block, chunk).release()

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
        for key, (made, _) in list(self._held.made.items()):
            if self._held.is_good(key) and self._is_as_expected(key, made, settings):
                self._commit_made(key, settings)
            else:
                self._drop_made(key)
                wrong = True
        if wrong:
            self._pause_steps = _PAUSE_STEPS
        self._complete.clear()
        self._expected = None
        self._troubled.clear()

    def _is_as_expected(self, key: Key, made: Sequence[Segment], settings: StepSettings) -> bool:
        expected = self._expected
        if expected is None or expected.gradient_scale != settings.gradient_scale:
            return False
        due = [s for s in self._streamed.segments(*key) if s.param in settings.hyper]
        return list(made) == due and all(
            settings.hyper[s.param] == expected.hyper[s.param]
            and not self._parameters[s.param].edited
            for s in due
        )

    def _commit_made(self, key: Key, settings: StepSettings) -> None:
        with uninterrupted():
            made, not_finite = self._held.commit(key)
            work = ChunkWork(self._buckets[key[0]], key[1], made, {})
            self._streamed.note_updated(work, settings, not_finite)
        self.committed += 1

    def _drop_made(self, key: Key) -> None:
        self._held.drop(key)
        self.dropped += 1

    def _drop(self) -> None:
        if self._held.made:
            self._pause_steps = _PAUSE_STEPS
        self._drop_all()
        self._expected = None

    def _drop_all(self) -> None:
        for key, loading in list(self._loading.items()):
            if loading.held and loading.settings is not self._settings:
                del self._loading[key]
                self._cancel(loading)
        for key in list(self._held.made):
            self._drop_made(key)
        self._complete.clear()

    def _cancel(self, loading: LoadingChunk) -> None:
        if loading.held:
            self._held.cancel(loading.key, loading.work)
            return
        staged, loading.work.staged = loading.work.staged, {}
        self._store.late.release(list(staged.values()), self._store.deadline_seconds)

    def _blocks(self, bucket: Bucket) -> list[Block]:
        return [self._store.block(bucket.index, c) for c in self._store.classes(bucket.index)]
