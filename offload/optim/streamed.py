"""The optimizer step, streamed through host staging chunk by chunk.

[Note: Streamed step]
For each chunk with a gradient: load weights, gradient and optimizer state, update, store. Up to
`depth` chunks are under way at once, so that reads run ahead of the update and writes behind it:

    read    c+2  c+3  c+4
    update  c+1  c+2  c+3
    write   c    c+1  c+2

A chunk commits alone (roll-forward). What has been updated is noted before its stores start, and a
store that fails keeps its buffer, so after an error `run` may be called again with the same
settings: it stores what is left to store, updates what is left to update, and applies nothing
twice. Parameters without a gradient are not touched, nor read where a whole chunk has none.

Chunks that are updated on the device are *started* there, and finished when others have been; the
CPU goes on with its own in between. Their staging counts as theirs until they are finished.

A chunk that is staged for another reason can be updated on that occasion (`update_staged`); `run`
then leaves it out.

`run` takes the chunks of one thread; others may be updated by another at the same time, which says
so by `note_updated` and `settle_bucket`.

A weight that becomes infinite does not stop the step, because state that is updated where it lives
cannot be taken back: the step ends, the same bits in every placement, and then it is an error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence

from offload.errors import NonFiniteError, OffloadError
from offload.optim.chunk_update import ChunkUpdate, ChunkWork, StepSettings
from offload.partition.blocks import BlockStore
from offload.partition.layout import UPDATED_CLASSES, Bucket, Chunk, Segment, segments
from offload.partition.parameters import ParameterState
from offload.schedule.update_site import NUM_SLOTS
from offload.telemetry import LaneMeter
from offload.tiers.uninterrupted import UninterruptedLock, let_signals_in, uninterrupted


class StreamedStep:
    """Applies an update to every chunk that has a gradient."""

    def __init__(
        self,
        *,
        buckets: Sequence[Bucket],
        parameters: Sequence[ParameterState],
        store: BlockStore,
        updater: ChunkUpdate,
        depth: int,
        meter: LaneMeter,
    ) -> None:
        self._buckets: list[Bucket] = []
        self._segments: dict[tuple[int, int], tuple[Segment, ...]] = {}
        self._parameters = parameters
        self._store = store
        self._updater = updater
        self._depth = depth
        self._meter = meter
        self._updated: set[tuple[int, int]] = set()
        self._settled: set[int] = set()  # buckets that the step is through with
        self._has_run = False  # the rest is left to others
        self._not_finite: ParameterState | None = None
        self._step = 0  # the number of the step under way
        self._lock = UninterruptedLock()  # of what has been updated and settled
        for bucket in buckets:
            if bucket.trainable:
                self.admit(bucket)

    def admit(self, bucket: Bucket) -> None:
        """A bucket is trainable from now on; no step is under way."""
        self._buckets = sorted([*self._buckets, bucket], key=lambda each: each.index)
        for chunk in bucket.chunks:
            self._segments[bucket.index, chunk.index] = segments(bucket, chunk)

    def segments(self, bucket: int, chunk: int) -> Sequence[Segment]:
        """The segments of a chunk of a trainable bucket."""
        return self._segments[bucket, chunk]

    def run(self, settings: StepSettings, *, later: Collection[int] = ()) -> None:
        """Take one step, or complete the one that an error interrupted, with its own settings.

        The buckets in `later` are left to others, who say `end_if_done` when they are through.

        Raises:
            StorageError: reading or writing state failed; call again to complete the step.
            NonFiniteError: the step has been taken, and a weight of the parameter it names
                is not finite.
        """
        self._store.retry_failed()
        waiting = deque(self._work(settings, later))
        under_way: deque[ChunkWork] = deque()
        started: deque[ChunkWork] = deque()
        try:
            while waiting or under_way or started:
                let_signals_in()
                with uninterrupted():
                    self._read_ahead(waiting, under_way, started)
                on_device = bool(under_way) and self._updater.runs_on_device(under_way[0].bucket)
                if not under_way or (on_device and len(started) == NUM_SLOTS):
                    self._finish(started[0], settings)
                    started.popleft()
                    continue
                work = under_way[0]
                for staged in work.staged.values():
                    staged.transfer.wait(self._store.deadline_seconds)
                if on_device:
                    with uninterrupted():
                        self._updater.start(work, settings)
                        started.append(under_way.popleft())
                else:
                    self._update(work, settings)
                    under_way.popleft()
            if not later:
                self._store.drain()
        except BaseException:
            for work in (*started, *under_way):
                self._store.late.release(list(work.staged.values()), self._store.deadline_seconds)
            raise
        for bucket in self._buckets:
            if bucket.index not in later:
                self.settle_bucket(bucket, settings)
        self._has_run = True
        self.end_if_done()

    def runs_on_device(self, bucket: Bucket) -> bool:
        """Whether a bucket is updated on an accelerator, beside the CPU."""
        return self._updater.runs_on_device(bucket)

    def settle_bucket(self, bucket: Bucket, settings: StepSettings) -> bool:
        """Whether the step is through with a bucket; if so, its parameters count it, once."""
        if bucket.index in self._settled:
            return True
        if any(self.has_work_left(bucket, chunk, settings) for chunk in bucket.chunks):
            return False
        with uninterrupted(), self._lock:
            if bucket.index in self._settled:
                return True
            for slot in bucket.slots:
                state = self._parameters[slot.param]
                if state.index in settings.hyper:
                    state.steps += 1
                    state.edited = False
            self._settled.add(bucket.index)
        return True

    def end_if_done(self) -> None:
        """Forget the step if it has run, and is through with every bucket.

        Raises:
            NonFiniteError: it is, and a weight of the parameter it names is not finite.
        """
        with self._lock:
            if not self._has_run or len(self._settled) < len(self._buckets):
                return
            self._has_run = False
            self._updated.clear()
            self._settled.clear()
            not_finite, self._not_finite = self._not_finite, None
            step, self._step = self._step, 0
        if not_finite is not None:
            raise NonFiniteError(
                f"step {step} made a weight of parameter {not_finite.name} infinite or "
                "NaN, although all gradients are finite",
                remedy="load the last checkpoint and lower the learning rate",
            )

    def has_work_left(self, bucket: Bucket, chunk: Chunk, settings: StepSettings) -> bool:
        """Whether the step has still something to update of a chunk."""
        key = bucket.index, chunk.index
        return key not in self._updated and any(
            segment.param in settings.hyper for segment in self._segments[key]
        )

    def work_left(self, bucket: Bucket, chunk: Chunk, settings: StepSettings) -> ChunkWork | None:
        """What the step has still to update of a chunk, nothing staged; None: nothing."""
        if not self.has_work_left(bucket, chunk, settings):
            return None
        every = self._segments[bucket.index, chunk.index]
        active = tuple(segment for segment in every if segment.param in settings.hyper)
        return ChunkWork(bucket, chunk.index, active, {})

    def compute(self, work: ChunkWork, settings: StepSettings) -> ParameterState | None:
        """Apply the step to a staged chunk; returns a parameter that is not finite afterwards."""
        nbytes = sum(staged.tensor.numel() for staged in work.staged.values())
        what = f"update of bucket {work.bucket.index}, chunk {work.chunk}"
        with self._meter.busy("cpu", nbytes, what=what):
            return self._updater.update(work, settings)

    def note_updated(
        self, work: ChunkWork, settings: StepSettings, not_finite: ParameterState | None
    ) -> None:
        """The chunk has what `compute` made of it, or will have when it has been stored."""
        with self._lock:
            self._not_finite = self._not_finite or not_finite
            self._step = settings.step
            self._updated.add((work.bucket.index, work.chunk))

    def update_staged(self, work: ChunkWork, settings: StepSettings) -> None:
        """Apply the step to a staged chunk that does not have it; the caller stores the chunk.

        Both together are to be `uninterrupted`.
        """
        self.note_updated(work, settings, self.compute(work, settings))

    def store_updated(self, work: ChunkWork) -> None:
        """Start to bring home what has been updated; all staging of the chunk is given away.

        Raises:
            StorageError: a write could not be started; the store keeps its buffer.
        """
        error: OffloadError | None = None
        for state_class in UPDATED_CLASSES:
            staged = work.staged.pop(state_class, None)
            if staged is None:
                continue
            try:
                block = self._store.block(work.bucket.index, state_class)
                self._store.start_store(block, work.chunk, staged)
            except OffloadError as failure:
                # The store keeps the buffer; the other class goes on.
                error = error or failure
        work.release()
        work.staged.clear()
        if error is not None:
            raise error

    def abandon(self) -> None:
        """Forget the step that an error interrupted: its state is about to be replaced."""
        self._updated.clear()
        self._settled.clear()
        self._has_run = False
        self._not_finite = None
        self._updater.abandon()

    def _work(self, settings: StepSettings, later: Collection[int]) -> Iterator[ChunkWork]:
        for bucket in self._buckets:
            if bucket.index in later:
                continue
            for chunk in bucket.chunks:
                work = self.work_left(bucket, chunk, settings)
                if work is not None:
                    yield work

    def _read_ahead(
        self,
        waiting: deque[ChunkWork],
        under_way: deque[ChunkWork],
        started: deque[ChunkWork],
    ) -> None:
        while waiting and len(under_way) + len(started) < self._depth:
            work = waiting[0]
            classes = self._updater.staged_classes(work.bucket)
            blocks = [self._store.block(work.bucket.index, name) for name in classes]
            # While there is something to update, writes end by themselves.
            is_idle = not (under_way or started)
            staged = self._store.start_loads(blocks, work.chunk, wait=is_idle)
            if staged is None and not is_idle:
                return
            if staged is None:
                raise self._store.no_staging(blocks, work.chunk)
            work.staged = dict(zip(classes, staged, strict=True))
            under_way.append(waiting.popleft())

    def _update(self, work: ChunkWork, settings: StepSettings) -> None:
        with uninterrupted():
            self.update_staged(work, settings)
            self.store_updated(work)

    def _finish(self, work: ChunkWork, settings: StepSettings) -> None:
        with uninterrupted():
            self.note_updated(work, settings, self._updater.finish(work))
            self.store_updated(work)
