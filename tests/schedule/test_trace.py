from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.schedule.trace import CLOSE, OPEN, Event, Trace, TraceCursor, TraceRecorder

events = st.builds(Event, st.sampled_from([OPEN, CLOSE]), st.integers(0, 4))
traces = st.lists(events, max_size=20).map(lambda found: Trace(tuple(found)))


def sequential(*buckets: int) -> Trace:
    return Trace(tuple(Event(kind, b) for b in buckets for kind in (OPEN, CLOSE)))


@given(trace=traces, bucket=st.integers(0, 5), data=st.data())
def test_next_open_is_the_first_in_the_repeated_trace(
    trace: Trace, bucket: int, data: st.DataObject
) -> None:
    position = data.draw(st.integers(0, len(trace)))
    answer = trace.next_open(position, bucket)
    repeated = trace.events * 2
    hits = [p for p in range(position, len(repeated)) if repeated[p] == Event(OPEN, bucket)]
    assert answer == (hits[0] if hits else 2 * len(trace))
    assert (bucket in trace.buckets) == (Event(OPEN, bucket) in trace.events)


def test_recorder_keeps_the_order_and_closes_what_is_left() -> None:
    recorder = TraceRecorder()
    recorder.open(3)
    recorder.open(1)
    recorder.open(3)
    recorder.close(3)
    trace = recorder.finish()
    assert [f"{kind.value} {bucket}" for kind, bucket in trace.events] == [
        "open 3",
        "open 1",
        "open 3",
        "close 3",
        "close 3",
        "close 1",
    ]
    assert recorder.finish().events == (), "the recorder starts afresh"


def test_a_close_without_an_open_is_a_defect() -> None:
    with pytest.raises(AssertionError, match="bucket 2"):
        TraceRecorder().close(2)


@given(trace=traces.filter(len))
def test_the_cursor_follows_its_own_trace_for_ever(trace: Trace) -> None:
    cursor = TraceCursor(trace)
    positions = [cursor.advance(*event) for event in trace.events * 2]
    assert positions == [*range(len(trace)), *range(len(trace))]
    assert cursor.divergences == 0


def test_a_skipped_bucket_resyncs_at_the_first_event_that_is_unique() -> None:
    cursor = TraceCursor(sequential(0, 1, 2))
    assert [cursor.advance(*e) for e in sequential(0, 2, 0).events] == [0, 1, 4, 5, 0, 1]
    assert cursor.divergences == 1


def test_where_the_events_fit_twice_the_cursor_waits_until_one_place_is_left() -> None:
    trace = sequential(0, 1, 2, 3, 3, 2, 1, 0)
    cursor = TraceCursor(trace)
    # Bucket 1 is skipped in forward: 2 then 3 is forward (4..7), and not backward.
    answers = [cursor.advance(*e) for e in sequential(0, 2, 3, 3, 2).events]
    assert answers == [0, 1, None, None, 6, 7, 8, 9, 10, 11]
    assert not cursor.diverged


def test_unknown_events_leave_the_position_unknown_until_the_trace_is_met_again() -> None:
    cursor = TraceCursor(sequential(0, 1, 2))
    answers = [cursor.advance(*e) for e in sequential(0, 7, 1).events]
    assert answers == [0, 1, None, None, 2, 3]
    assert cursor.divergences == 1


def test_rewind_expects_the_first_event() -> None:
    cursor = TraceCursor(sequential(0, 1, 0))
    cursor.advance(OPEN, 9)
    assert cursor.diverged
    cursor.rewind()
    assert not cursor.diverged
    assert cursor.advance(OPEN, 0) == 0


@given(trace=traces, lived=st.lists(events, max_size=30))
def test_every_answer_is_a_position_of_that_event(trace: Trace, lived: list[Event]) -> None:
    cursor = TraceCursor(trace)
    for event in lived:
        position = cursor.advance(*event)
        assert cursor.diverged == (position is None)
        if position is not None:
            assert trace.events[position] == event
        if trace.positions(event) and len(trace.positions(event)) == 1:
            assert position is not None, "a unique event always tells the position"
