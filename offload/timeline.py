"""When each lane did what, in a step that was asked for.

[Note: Timeline]
A timeline is off until a step is to be recorded; an event then costs the test of a flag. Of a
recorded step it keeps

    spans      what a lane did from when to when: a transfer from the moment its first block was
               given to the lane, an update of a chunk, a forward or backward, a wait for weights
    faults     when a touch found its weights absent, and whose
    occupancy  the bytes in use on each tier whenever a span was noted and they had changed

A transfer is noted by who waits for it, which may be after the step that it began in. So the
timeline of a step stays open until the end of the step after it, for what has begun before the
step's own end. Memory is bounded: beyond `MOST_EVENTS` events are only counted.

Times are those of time.perf_counter, which on Linux is CLOCK_MONOTONIC, as is the clock of the
native library. They are kept in seconds from the start of the step, so what was under way by then
begins before 0.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

MOST_EVENTS = 50_000
# In the order in which they are shown. "wait" is the time in which compute waits for weights.
TRACKS = ("compute", "wait", "cpu", "h2d", "d2h", "nvme_read", "nvme_write")
_LEAST_WAIT_SECONDS = 20e-6  # what is there takes less to find

Occupancy = Mapping[str, int]  # bytes in use, by tier


@dataclass(frozen=True, slots=True)
class Span:
    """One thing that a lane did, from `began` to `ended`; it had been asked for at `queued`."""

    lane: str
    name: str
    began: float
    ended: float
    nbytes: int
    queued: float


@dataclass(frozen=True, slots=True)
class StepTimeline:
    """What was recorded of one step; see [Note: Timeline]. Times in seconds from its start.

    Attributes:
        step: its number, from 1.
        seconds: how long it took.
        spans: in the order in which they were noted.
        faults: (time, name) of each.
        occupancy: (time, bytes in use by tier), in order of time.
        num_dropped: events that found no room.
    """

    step: int
    seconds: float
    spans: tuple[Span, ...]
    faults: tuple[tuple[float, str], ...]
    occupancy: tuple[tuple[float, Occupancy], ...]
    num_dropped: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "spans": [list(dataclasses.astuple(span)) for span in self.spans],
            "faults": [list(fault) for fault in self.faults],
            "occupancy": [[at, dict(used)] for at, used in self.occupancy],
            "num_dropped": self.num_dropped,
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Self:
        """Return what `to_dict` has turned into `entry`."""
        return cls(
            step=entry["step"],
            seconds=entry["seconds"],
            spans=tuple(Span(*span) for span in entry["spans"]),
            faults=tuple((at, name) for at, name in entry["faults"]),
            occupancy=tuple((at, dict(used)) for at, used in entry["occupancy"]),
            num_dropped=entry["num_dropped"],
        )


@dataclass(slots=True)
class _Recording:
    """A step under way, or one that has ended and may still get late spans; absolute times."""

    step: int
    began: float
    used: Callable[[], Occupancy]
    ended: float = math.inf
    spans: list[Span] = field(default_factory=list)
    faults: list[tuple[float, str]] = field(default_factory=list)
    occupancy: list[tuple[float, Occupancy]] = field(default_factory=list)
    num_dropped: int = 0

    def sample(self, now: float) -> None:
        used = self.used()
        if not self.occupancy or self.occupancy[-1][1] != used:
            self.occupancy.append((now, used))

    def finished(self) -> StepTimeline:
        return StepTimeline(
            self.step,
            self.ended - self.began,
            tuple(
                dataclasses.replace(
                    span,
                    began=span.began - self.began,
                    ended=span.ended - self.began,
                    queued=span.queued - self.began,
                )
                for span in self.spans
            ),
            tuple((at - self.began, name) for at, name in self.faults),
            tuple((at - self.began, used) for at, used in self.occupancy),
            self.num_dropped,
        )


class Timeline:
    """Records single steps of one engine; see [Note: Timeline]. Thread-safe.

    `is_on`: whether it takes events; whoever has to gather what it says of one asks first.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.is_on = False
        self.clock = clock
        self._lock = threading.Lock()
        self._recording: _Recording | None = None
        self._finished: StepTimeline | None = None

    def start(self, step: int, used: Callable[[], Occupancy]) -> None:
        """Record from now until the next `end_step`; what was recorded before is given up.

        Args:
            step: its number.
            used: the bytes in use on each tier, now.
        """
        with self._lock:
            now = self.clock()
            self._recording = _Recording(step, now, used)
            self._recording.sample(now)
            self._finished = None
            self.is_on = True

    def end_step(self) -> None:
        """A step has ended: the one that is recorded, or the one after it."""
        with self._lock:
            recording = self._recording
            if recording is None:
                return
            if recording.ended < math.inf:
                self._finish(recording)
            else:
                recording.ended = self.clock()
                recording.sample(recording.ended)

    def take(self, *, now: bool = False) -> StepTimeline | None:
        """The recorded step, once; None: there is none, or it may still get late spans.

        With `now` nobody waits for those any more.
        """
        with self._lock:
            recording = self._recording
            if now and recording is not None and recording.ended < math.inf:
                self._finish(recording)
            finished, self._finished = self._finished, None
            return finished

    def span(
        self,
        lane: str,
        name: str,
        began: float,
        ended: float,
        *,
        nbytes: int = 0,
        queued: float | None = None,
    ) -> None:
        """A lane was busy with something from `began` to `ended`."""
        if not self.is_on:
            return
        with self._lock:
            recording = self._recording
            if recording is None or began > recording.ended or ended < recording.began:
                return
            if len(recording.spans) >= MOST_EVENTS:
                recording.num_dropped += 1
                return
            asked = began if queued is None else min(queued, began)
            recording.spans.append(Span(lane, name, began, ended, nbytes, asked))
            if recording.ended == math.inf:
                recording.sample(self.clock())

    def fault(self, name: str) -> None:
        """A touch has found `name` absent."""
        if not self.is_on:
            return
        with self._lock:
            recording = self._recording
            if recording is None or recording.ended < math.inf:
                return
            if len(recording.faults) < MOST_EVENTS:
                recording.faults.append((self.clock(), name))
            else:
                recording.num_dropped += 1

    def waited(self, name: str, since: float) -> float:
        """Compute has waited for `name` since then; returns how long, in seconds."""
        now = self.clock()
        if now - since > _LEAST_WAIT_SECONDS:
            self.span("wait", name, since, now)
        return now - since

    def _finish(self, recording: _Recording) -> None:
        self._finished = recording.finished()
        self._recording = None
        self.is_on = False


NEVER = Timeline()
"""One that nobody starts: for parts that stand alone."""
