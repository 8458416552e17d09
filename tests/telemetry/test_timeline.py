"""Timelines: what of a step is kept, until when, and how much of it."""

from __future__ import annotations

import pytest

from offload import timeline as timelines
from offload.telemetry import LaneMeter
from offload.timeline import NEVER, Span, StepTimeline, Timeline


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def names(timeline: StepTimeline | None) -> list[str]:
    assert timeline is not None
    return [span.name for span in timeline.spans]


def test_times_count_from_the_start_of_the_step(clock: Clock) -> None:
    timeline = Timeline(clock)
    used = {"device": 5}
    timeline.start(7, lambda: dict(used))
    timeline.span("nvme_read", "early", 99.5, 100.5, nbytes=8, queued=99.0)
    clock.now, used["device"] = 101.0, 9
    timeline.fault("weights")
    timeline.span("cpu", "update", 100.5, 101.0)
    timeline.span("cpu", "the same occupancy", 100.5, 101.0)
    clock.now = 102.0
    timeline.end_step()
    assert timeline.take(now=True) == StepTimeline(
        7,
        2.0,
        (
            Span("nvme_read", "early", -0.5, 0.5, 8, -1.0),
            Span("cpu", "update", 0.5, 1.0, 0, 0.5),
            Span("cpu", "the same occupancy", 0.5, 1.0, 0, 0.5),
        ),
        ((1.0, "weights"),),
        ((0.0, {"device": 5}), (1.0, {"device": 9})),
    )


def test_what_began_in_the_step_may_be_noted_until_the_next_has_ended(clock: Clock) -> None:
    timeline = Timeline(clock)
    timeline.start(1, dict)
    timeline.span("h2d", "of the step before", 98.0, 99.0)
    clock.now = 102.0
    timeline.end_step()
    assert timeline.take() is None
    timeline.span("h2d", "late", 101.0, 103.0)
    timeline.span("h2d", "of the next step", 102.5, 103.0)
    timeline.fault("of the next step")
    assert timeline.is_on
    timeline.end_step()
    assert not timeline.is_on
    timeline.span("h2d", "too late", 101.0, 103.0)
    recorded = timeline.take()
    assert names(recorded) == ["late"]
    assert recorded is not None
    assert (recorded.seconds, recorded.faults) == (2.0, ())
    assert timeline.take(now=True) is None, "it is given out once"


def test_a_step_that_is_recorded_has_to_end(clock: Clock) -> None:
    timeline = Timeline(clock)
    timeline.start(1, dict)
    assert timeline.take(now=True) is None
    timeline.end_step()
    timeline.start(2, dict)
    timeline.end_step()
    recorded = timeline.take(now=True)
    assert recorded is not None
    assert recorded.step == 2


def test_memory_is_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timelines, "MOST_EVENTS", 3)
    timeline = Timeline(clock)
    used = {"host": 0}
    timeline.start(1, lambda: dict(used))
    for number in range(5):
        used["host"] += 1
        timeline.span("cpu", str(number), 100.0, 100.0)
        timeline.fault(str(number))
    timeline.end_step()
    recorded = timeline.take(now=True)
    assert recorded is not None
    assert (len(recorded.spans), len(recorded.faults), recorded.num_dropped) == (3, 3, 4)
    assert len(recorded.occupancy) <= 5


def test_off_it_keeps_nothing() -> None:
    for note in (
        lambda: NEVER.span("cpu", "x", 0.0, 1.0),
        lambda: NEVER.fault("x"),
        lambda: NEVER.end_step(),
    ):
        note()
    assert NEVER.take(now=True) is None
    assert not NEVER.is_on


def test_a_wait_is_a_span_when_there_was_something_to_wait_for(clock: Clock) -> None:
    timeline = Timeline(clock)
    timeline.start(1, dict)
    assert timeline.waited("weights", 100.0) == 0.0
    clock.now = 100.5
    assert timeline.waited("weights", 100.0) == 0.5
    timeline.end_step()
    recorded = timeline.take(now=True)
    assert recorded is not None
    assert [(span.lane, span.ended) for span in recorded.spans] == [("wait", 0.5)]


def test_a_meter_notes_what_it_has_counted(clock: Clock) -> None:
    timeline = Timeline(clock)
    meter = LaneMeter(clock=clock, timeline=timeline)
    timeline.start(1, dict)
    with meter.busy("cpu", 64, what="update"):
        clock.now = 101.0
    timeline.end_step()
    recorded = timeline.take(now=True)
    assert recorded is not None
    assert recorded.spans == (Span("cpu", "update", 0.0, 1.0, 64, 0.0),)


def test_it_survives_json(clock: Clock) -> None:
    timeline = Timeline(clock)
    timeline.start(3, lambda: {"device": 1, "host": 2})
    timeline.span("d2h", "gradient", 100.0, 100.25, nbytes=4)
    timeline.fault("weights of bucket 0")
    timeline.end_step()
    recorded = timeline.take(now=True)
    assert recorded is not None
    assert StepTimeline.from_dict(recorded.to_dict()) == recorded
