"""The trace: the ordered uses of buckets in one step, recorded, and followed in the next.

[Note: Trace]
  event      a bucket opens (its parameters may be touched from here) or closes. Opens nest: a
             bucket is open until as many closes as opens have passed.
  trace      the events of one step. A step repeats: after the last event comes the first again.
  position   the index of an event in its trace.

A trace is kept for each (train or eval, grad mode, call structure). It decides what is fetched
early and what is dropped first, never whether a touch is legal: a wrong trace costs time only.
"""

from __future__ import annotations

from bisect import bisect_left
from enum import Enum
from typing import NamedTuple


class EventKind(Enum):
    """What happens to a bucket."""

    OPEN = "open"
    CLOSE = "close"


OPEN = EventKind.OPEN
CLOSE = EventKind.CLOSE


class Event(NamedTuple):
    """One use of a bucket begins or ends."""

    kind: EventKind
    bucket: int


class Trace:
    """The events of one step, immutable.

    Attributes:
        events: in the order in which they happened.
    """

    __slots__ = ("_opens", "_positions", "events")

    def __init__(self, events: tuple[Event, ...]) -> None:
        self.events = events
        self._positions: dict[Event, list[int]] = {}
        for position, event in enumerate(events):
            self._positions.setdefault(event, []).append(position)
        self._opens = {
            event.bucket: found for event, found in self._positions.items() if event.kind is OPEN
        }

    def __len__(self) -> int:
        return len(self.events)

    @property
    def buckets(self) -> frozenset[int]:
        """The buckets that are opened somewhere in the trace."""
        return frozenset(self._opens)

    def positions(self, event: Event) -> tuple[int, ...]:
        """Every position of an equal event, ascending."""
        return tuple(self._positions.get(event, ()))

    def next_open(self, position: int, bucket: int) -> int:
        """The first position not before `position` where `bucket` opens.

        `position` is from 0 to `len(trace)`. The step repeats: a bucket with no further open in
        this step answers `len(trace)` + its first open, one that never opens `2 * len(trace)`.
        The larger the answer, the better the victim.
        """
        opens = self._opens.get(bucket)
        if opens is None:
            return 2 * len(self.events)
        at = bisect_left(opens, position)
        return opens[at] if at < len(opens) else len(self.events) + opens[0]


class TraceRecorder:
    """Records the events of one step."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._open_counts: dict[int, int] = {}

    def open(self, bucket: int) -> None:
        """Records that `bucket` opens; it may be open already."""
        self._events.append(Event(OPEN, bucket))
        self._open_counts[bucket] = self._open_counts.get(bucket, 0) + 1

    def close(self, bucket: int) -> None:
        """Records that `bucket`, which is open, closes."""
        count = self._open_counts.get(bucket, 0)
        assert count > 0, f"bucket {bucket} closes without an open"
        self._events.append(Event(CLOSE, bucket))
        if count == 1:
            del self._open_counts[bucket]
        else:
            self._open_counts[bucket] = count - 1

    def finish(self) -> Trace:
        """Returns the trace; what is still open closes at its end. The recorder starts afresh."""
        for bucket, count in self._open_counts.items():
            self._events.extend([Event(CLOSE, bucket)] * count)
        trace = Trace(tuple(self._events))
        self._events = []
        self._open_counts = {}
        return trace


class TraceCursor:
    """Follows a trace while the step it describes happens again.

    While the events agree, `advance` answers the position of each. At the first that differs the
    cursor has diverged: it keeps every position that the events since then could be at, and follows
    the trace again as soon as exactly one is left. After the last event the first one is expected.

    Attributes:
        divergences: how many times the events left the trace.
    """

    def __init__(self, trace: Trace) -> None:
        self.divergences = 0
        self._trace = trace
        self._expected = 0
        # Positions that fit the events since the divergence; None while the events agree.
        self._candidates: tuple[int, ...] | None = None

    @property
    def diverged(self) -> bool:
        """Whether the position is unknown."""
        return self._candidates is not None

    def rewind(self) -> None:
        """A new step begins: the first event is expected next."""
        self._expected = 0
        self._candidates = None

    def advance(self, kind: EventKind, bucket: int) -> int | None:
        """Takes the next event; answers its position, or None while that is not certain."""
        event = Event(kind, bucket)
        events = self._trace.events
        if self._candidates is None:
            if self._expected < len(events) and events[self._expected] == event:
                return self._settle(self._expected)
            self.divergences += 1
            self._candidates = ()
        following = tuple(
            position + 1
            for position in self._candidates
            if position + 1 < len(events) and events[position + 1] == event
        )
        self._candidates = following or self._trace.positions(event)
        if len(self._candidates) == 1:
            return self._settle(self._candidates[0])
        return None

    def _settle(self, position: int) -> int:
        self._candidates = None
        self._expected = (position + 1) % len(self._trace.events)
        return position
