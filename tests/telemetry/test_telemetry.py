"""Lane meter on a virtual clock, step reports, and the JSONL log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.telemetry import (
    JsonlWriter,
    LaneMeter,
    LaneReport,
    RetryLog,
    RetryReport,
    StepReport,
    TierReport,
    UpdateReport,
    lanes_between,
    note_speeds,
    read_jsonl,
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_overlapping_operations_count_their_common_time_once() -> None:
    clock = Clock()
    meter = LaneMeter(clock)
    first, second = meter.busy("cpu", 10), meter.busy("cpu", 5)
    first.__enter__()
    clock.now = 2.0
    second.__enter__()
    clock.now = 3.0
    first.__exit__(None, None, None)
    clock.now = 7.0
    second.__exit__(None, None, None)
    clock.now = 9.0
    assert meter.snapshot() == {"cpu": LaneReport(15, 7.0)}


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), min_size=1, max_size=12),
)
def test_busy_time_is_the_length_of_the_union(spans: list[tuple[int, int]]) -> None:
    clock = Clock()
    meter = LaneMeter(clock)
    contexts = [meter.busy("cpu", 1) for _ in spans]
    for moment in range(80):
        clock.now = float(moment)
        for context, (start, length) in zip(contexts, spans, strict=True):
            if moment == start:
                context.__enter__()
            if moment == start + length:
                context.__exit__(None, None, None)
    covered = {second for start, length in spans for second in range(start, start + length)}
    assert meter.snapshot()["cpu"] == LaneReport(len(spans), float(len(covered)))


def test_an_open_span_counts_until_now() -> None:
    clock = Clock()
    meter = LaneMeter(clock)
    with meter.busy("h2d", 8):
        clock.now = 1.5
        assert meter.snapshot()["h2d"] == LaneReport(0, 1.5)
    assert meter.snapshot()["h2d"] == LaneReport(8, 1.5)


def test_a_failed_operation_moves_no_bytes_and_ends_its_span() -> None:
    clock = Clock()
    meter = LaneMeter(clock)
    with pytest.raises(OSError, match="gone"), meter.busy("nvme_read", 8):
        clock.now = 1.0
        raise OSError("gone")
    clock.now = 5.0
    assert meter.snapshot()["nvme_read"] == LaneReport(0, 1.0)


def test_difference_of_snapshots() -> None:
    meter = LaneMeter(Clock())
    meter.add("d2h", 100, 1.0)
    earlier = meter.snapshot()
    meter.add("d2h", 50, 0.5)
    meter.add("cpu", 7, 0.25)
    assert lanes_between(earlier, meter.snapshot()) == {
        "d2h": LaneReport(50, 0.5),
        "cpu": LaneReport(7, 0.25),
    }


def report(measured_seconds: float = 4.0) -> StepReport:
    return StepReport(
        step=3,
        tiers={"host": TierReport(budget_bytes=10, used_bytes=4, peak_bytes=8)},
        lanes={"h2d": LaneReport(5, 1.0), "cpu": LaneReport(6, 2.0)},
        bound_seconds=3.0,
        measured_seconds=measured_seconds,
        faults=1,
        update=UpdateReport((2, 5), 3, "placement.update says so"),
        critical="h2d",
    )


def test_the_best_speed_that_a_lane_has_shown() -> None:
    best: dict[str, float] = {}
    for moved, seconds in ((10, 2.0), (30, 2.0), (20, 2.0), (0, 1.0), (99, 0.0)):
        note_speeds(best, {"cpu": LaneReport(moved, seconds), "compute": LaneReport(0, 1.0)})
    assert best == {"cpu": 15.0}


def test_step_report_derives_efficiency_and_bottleneck() -> None:
    assert report().efficiency == 0.75
    assert report().bottleneck == "cpu"
    assert report(measured_seconds=0.0).efficiency == 0.0


def test_a_lane_is_idle_where_nothing_is_in_flight_on_it() -> None:
    assert report().idle_shares == {"h2d": 0.75, "cpu": 0.5}
    assert report(measured_seconds=1.0).idle_shares == {"h2d": 0.0, "cpu": 0.0}
    assert report(measured_seconds=0.0).idle_shares == {}


def test_step_report_is_json() -> None:
    entry = json.loads(json.dumps(report().to_dict()))
    assert entry["tiers"]["host"]["peak_bytes"] == 8
    assert entry["update"]["on_device"] == [2, 5]
    assert entry["lanes"]["cpu"] == {"bytes": 6, "busy_seconds": 2.0}
    assert (entry["efficiency"], entry["bottleneck"], entry["faults"]) == (0.75, "cpu", 1)
    assert (entry["critical"], entry["idle_shares"]["cpu"]) == ("h2d", 0.5)
    assert StepReport.from_dict(entry) == report()


def test_a_line_is_in_the_file_when_write_returns(tmp_path: Path) -> None:
    path = tmp_path / "run" / "log.jsonl"
    with JsonlWriter(path) as log:
        log.write({"step": 1})
        assert read_jsonl(path) == [{"step": 1}]
    with JsonlWriter(path) as log:
        log.write({"step": 2})
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_a_partial_last_line_is_left_out_and_then_removed(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step":1}\n{"st')
    assert read_jsonl(path) == [{"step": 1}]
    with JsonlWriter(path) as log:
        log.write({"step": 2})
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_errors_are_counted_and_the_first_one_is_warned_of_once() -> None:
    log = RetryLog()
    log.warn_once()
    assert log.report() == RetryReport()
    log.note(OSError("one"))
    before = log.report()
    with pytest.warns(RuntimeWarning, match="is made again: one"):
        log.warn_once()
    assert log.report() - before == RetryReport(), "no message without an error"
    log.note(OSError("two"))
    log.note(OSError("three"))
    log.warn_once()
    assert log.report() - before == RetryReport(2, "three")
