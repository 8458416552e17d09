"""Runs of the module: their traces, and what the plan of a known trace says next.

[Note: Runs]
A run is one forward of the module with the backward that follows, up to the step. Runs of one key
(training mode, grad mode) are expected to repeat their trace, so each key has a trace and a plan of
its own, and validation does not spoil training. The first run of a key is recorded; a run that
differs from the known trace replaces it when it ends.
"""

from __future__ import annotations

from collections.abc import Mapping

from offload.errors import DoesNotFitError
from offload.schedule.lookahead import Actions, LookaheadPlan, plan_lookahead
from offload.schedule.trace import OPEN, EventKind, Trace, TraceCursor, TraceRecorder

RunKey = tuple[object, ...]

NOTHING = Actions((), ())


class _KnownRun:
    """A recorded trace, its plan, and the cursor that follows it."""

    def __init__(self, trace: Trace, plan: LookaheadPlan | None) -> None:
        self.trace = trace
        self.plan = plan
        self.cursor = TraceCursor(trace)
        self.position = 0

    def start(self) -> Actions:
        """Begin to follow the trace from its start."""
        self.cursor.rewind()
        self.position = 0
        return NOTHING if self.plan is None else self.plan.start


class Runs:
    """The traces of one engine and where the present run is in its own. Not thread-safe: the pager
    calls it under its lock, and does what the returned actions say.
    """

    def __init__(self, *, capacity_bytes: int, lookahead_depth: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._lookahead_depth = lookahead_depth
        self._sizes: Mapping[int, int] = {}
        self._resident: frozenset[int] = frozenset()
        self._known: dict[RunKey, _KnownRun] = {}
        self._key: RunKey | None = None
        self._recorder: TraceRecorder | None = None

    def seal(self, sizes: Mapping[int, int], resident: frozenset[int]) -> None:
        """Take the device bytes of every bucket, and the buckets that never leave."""
        self._sizes = sizes
        self._resident = resident

    def resize(self, capacity_bytes: int) -> None:
        """Plan for another room from now on; what is known of traces is forgotten with its plans.

        No run is under way.
        """
        self._capacity_bytes = capacity_bytes
        self._known.clear()
        self._key = self._recorder = None

    def begin(self, key: RunKey) -> Actions | None:
        """A run starts; None: it is the one expected, and its start has been acted upon."""
        if self._key == key and self._recorder is None and key in self._known:
            self._recorder = TraceRecorder()
            return None
        self.end()
        self._key = key
        self._recorder = TraceRecorder()
        known = self._known.get(key)
        return NOTHING if known is None else known.start()

    def expect(self, key: RunKey) -> Actions:
        """A run of this key comes next."""
        self.end()
        known = self._known.get(key)
        if known is None:
            return NOTHING
        self._key = key
        return known.start()

    def end(self) -> None:
        """The run is over; a trace that differs from the known one replaces it."""
        recorder, self._recorder = self._recorder, None
        key, self._key = self._key, None
        if recorder is None or key is None:
            return
        trace = recorder.finish()
        known = self._known.get(key)
        if known is None or known.trace.events != trace.events:
            self._known[key] = _KnownRun(trace, self._plan(trace))

    def event(self, kind: EventKind, bucket: int) -> Actions:
        """A paged bucket opens or closes."""
        if self._recorder is not None:
            if kind is OPEN:
                self._recorder.open(bucket)
            else:
                self._recorder.close(bucket)
        known = self._followed()
        position = None if known is None else known.cursor.advance(kind, bucket)
        if known is None or position is None:
            return NOTHING
        known.position = position
        return NOTHING if known.plan is None else known.plan.actions[position]

    def next_use(self, bucket: int) -> int:
        """When the bucket is wanted next, as a rank: the larger, the later. 0 if nobody knows."""
        known = self._followed()
        if known is None or known.cursor.diverged:
            return 0
        return known.trace.next_open(known.position + 1, bucket)

    def _followed(self) -> _KnownRun | None:
        known = None if self._key is None else self._known.get(self._key)
        return known if known is not None and known.trace.events else None

    def _plan(self, trace: Trace) -> LookaheadPlan | None:
        try:
            return plan_lookahead(
                trace,
                self._sizes,
                capacity_bytes=self._capacity_bytes,
                resident=self._resident,
                depth=self._lookahead_depth,
            )
        except DoesNotFitError:
            return None  # windows overlap by more than there is room for: demand fetches serve them
