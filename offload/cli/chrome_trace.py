"""A recorded step as Chrome trace JSON, which Perfetto and chrome://tracing open.

Source: "Trace Event Format", Google. Times are microseconds from the first event. Each lane is a
thread; where requests of one lane overlap, what does not nest goes to further threads of the lane.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from offload.cli.written import write_text
from offload.timeline import TRACKS, Span, StepTimeline

_PROCESS = 1
_THREADS_A_LANE = 100  # the most that are numbered without a gap between lanes


def rows(spans: Iterable[Span]) -> list[list[Span]]:
    """Deal spans to as few rows as it takes that those of one row do not overlap."""
    dealt: list[list[Span]] = []
    for span in sorted(spans, key=lambda each: (each.began, each.ended)):
        row = next((row for row in dealt if row[-1].ended <= span.began), None)
        if row is None:
            dealt.append([span])
        else:
            row.append(span)
    return dealt


def trace_events(timeline: StepTimeline) -> dict[str, Any]:
    """The trace of a step: spans by lane, faults as instants, the tiers' bytes as counters."""
    spans = timeline.spans
    times = [0.0, *(span.began for span in spans), *(at for at, _ in timeline.faults)]
    origin = min(times)
    events = [*_spans(spans, origin), *_faults(timeline, origin), *_counters(timeline, origin)]
    events.sort(key=lambda event: event["ts"])
    return {
        "traceEvents": [*_names(spans), *events],
        "displayTimeUnit": "ms",
        "otherData": {
            "step": timeline.step,
            "seconds": timeline.seconds,
            "events_left_out": timeline.num_dropped,
        },
    }


def write_trace(timeline: StepTimeline, path: Path) -> None:
    """Write the trace of a step to a file. Raises StorageError."""
    write_text(path, json.dumps(trace_events(timeline), separators=(",", ":")) + "\n")


def _lanes(spans: Sequence[Span]) -> list[str]:
    found = {span.lane for span in spans}
    return [*TRACKS, *sorted(found.difference(TRACKS))]


def _thread(lanes: Sequence[str], lane: str, row: int) -> int:
    return lanes.index(lane) * _THREADS_A_LANE + row + 1


def _names(spans: Sequence[Span]) -> Iterator[dict[str, Any]]:
    yield _metadata("process_name", 0, name="offload")
    lanes = _lanes(spans)
    for lane in lanes:
        for row in range(max(1, len(rows(span for span in spans if span.lane == lane)))):
            thread = _thread(lanes, lane, row)
            yield _metadata("thread_name", thread, name=f"{lane} {row + 1}" if row else lane)
            yield _metadata("thread_sort_index", thread, sort_index=thread)


def _metadata(kind: str, thread: int, **arguments: object) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": _PROCESS, "tid": thread, "ts": 0, "args": arguments}


def _spans(spans: Sequence[Span], origin: float) -> Iterator[dict[str, Any]]:
    lanes = _lanes(spans)
    for lane in lanes:
        for number, row in enumerate(rows(span for span in spans if span.lane == lane)):
            for span in row:
                seconds = span.ended - span.began
                arguments: dict[str, object] = {}
                if span.nbytes:
                    arguments["bytes"] = span.nbytes
                    arguments["queued_ms"] = round((span.began - span.queued) * 1e3, 3)
                yield {
                    "ph": "X",
                    "name": span.name or lane,
                    "cat": lane,
                    "pid": _PROCESS,
                    "tid": _thread(lanes, lane, number),
                    "ts": _microseconds(span.began - origin),
                    "dur": _microseconds(seconds),
                    "args": arguments,
                }


def _faults(timeline: StepTimeline, origin: float) -> Iterator[dict[str, Any]]:
    lanes = _lanes(timeline.spans)
    for at, name in timeline.faults:
        yield {
            "ph": "i",
            "s": "t",
            "name": f"fault: {name}",
            "cat": "fault",
            "pid": _PROCESS,
            "tid": _thread(lanes, "compute", 0),
            "ts": _microseconds(at - origin),
        }


def _counters(timeline: StepTimeline, origin: float) -> Iterator[dict[str, Any]]:
    for at, used in timeline.occupancy:
        for tier, nbytes in used.items():
            yield {
                "ph": "C",
                "name": f"{tier}: bytes in use",
                "pid": _PROCESS,
                "tid": 0,
                "ts": _microseconds(at - origin),
                "args": {"bytes": nbytes},
            }


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)
