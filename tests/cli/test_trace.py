"""`offload trace`: a recorded step in the Trace Event Format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from offload.cli.chrome_trace import rows, trace_events
from offload.cli.main import main
from offload.cli.recording import read_timelines, steps_to_record
from offload.errors import OffloadError
from offload.telemetry import JsonlWriter
from offload.timeline import TRACKS, Span, StepTimeline

# Of the Trace Event Format: what each kind of event has to have beside "ph".
REQUIRED = {
    "X": {"name", "cat", "pid", "tid", "ts", "dur", "args"},
    "i": {"name", "pid", "tid", "ts", "s"},
    "C": {"name", "pid", "ts", "args"},
    "M": {"name", "pid", "tid", "args"},
}


def check_format(trace: dict[str, Any]) -> None:
    """Check that a trace is one, and what viewers rely on."""
    assert trace["displayTimeUnit"] in {"ms", "ns"}
    last = 0.0
    ends: dict[tuple[int, int], float] = {}
    named = {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["name"] == "thread_name"}
    for event in trace["traceEvents"]:
        assert event.keys() >= REQUIRED[event["ph"]], event
        assert isinstance(event["pid"], int)
        if event["ph"] == "M":
            continue
        assert event["ts"] >= last, "in order of time"
        last = event["ts"]
        if event["ph"] == "X":
            thread = event["pid"], event["tid"]
            assert thread in named
            assert event["dur"] >= 0
            # What overlaps on one thread would have to nest. Times are rounded to 1 ns.
            assert event["ts"] >= ends.get(thread, 0.0) - 0.002
            ends[thread] = event["ts"] + event["dur"]
        elif event["ph"] == "i":
            assert event["s"] in {"g", "p", "t"}
        else:
            assert all(isinstance(value, int) for value in event["args"].values())


def timeline(step: int = 5) -> StepTimeline:
    spans = (
        Span("nvme_read", "weights of bucket 1", -0.001, 0.002, 4096, -0.002),
        Span("nvme_read", "weights of bucket 2", 0.001, 0.003, 4096, 0.0),
        Span("nvme_read", "weights of bucket 3", 0.002, 0.004, 4096, 0.0),
        Span("compute", "forward", 0.0, 0.005, 0, 0.0),
        Span("elsewhere", "what nobody knows", 0.005, 0.005, 0, 0.005),
    )
    occupancy = ((0.0, {"device": 5, "host": 7}), (0.001, {"device": 6, "host": 7}))
    return StepTimeline(step, 0.01, spans, ((0.0005, "weights of bucket 2"),), occupancy, 3)


def write_run(folder: Path, *steps: int) -> Path:
    with JsonlWriter(folder / "timeline.jsonl") as file:
        for step in steps:
            file.write(timeline(step).to_dict())
    return folder


def test_rows_do_not_overlap_and_are_few() -> None:
    dealt = rows(timeline().spans[:3])
    assert [[span.name[-1] for span in row] for row in dealt] == [["1", "3"], ["2"]]


def test_the_trace_has_the_format_and_all_that_was_recorded() -> None:
    trace = trace_events(timeline())
    check_format(trace)
    events = trace["traceEvents"]
    threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert set(TRACKS) <= set(threads.values())
    shown = [(threads[e["tid"]], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert shown == [
        ("nvme_read", "weights of bucket 1", 0.0, 3000.0),
        ("compute", "forward", 1000.0, 5000.0),
        ("nvme_read 2", "weights of bucket 2", 2000.0, 2000.0),
        ("nvme_read", "weights of bucket 3", 3000.0, 2000.0),
        ("elsewhere", "what nobody knows", 6000.0, 0.0),
    ]
    (fault,) = (event for event in events if event["ph"] == "i")
    assert (fault["name"], fault["ts"]) == ("fault: weights of bucket 2", 1500.0)
    assert threads[fault["tid"]] == "compute"
    counters = [(e["name"], e["ts"], e["args"]["bytes"]) for e in events if e["ph"] == "C"]
    assert counters[2:] == [
        ("device: bytes in use", 2000.0, 6),
        ("host: bytes in use", 2000.0, 7),
    ]
    assert trace["otherData"]["events_left_out"] == 3


def test_the_command_takes_the_last_step_or_the_one_asked_for(tmp_path: Path) -> None:
    run = write_run(tmp_path, 3, 7)
    result = CliRunner().invoke(main, ["trace", str(run)])
    assert result.exit_code == 0, result.output
    trace = json.loads((run / "trace-step-7.json").read_text())
    assert trace["otherData"]["step"] == 7
    out = tmp_path / "own.json"
    result = CliRunner().invoke(main, ["trace", str(run), "--step", "3", "-o", str(out)])
    assert str(out) in result.output
    assert json.loads(out.read_text())["otherData"]["step"] == 3


def test_what_was_not_recorded_or_cannot_be_written(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["trace", str(tmp_path)])
    assert (result.exit_code, "run.trace_steps" in result.output) == (2, True)
    run = write_run(tmp_path, 3)
    result = CliRunner().invoke(main, ["trace", str(run), "--step", "4"])
    assert (result.exit_code, "run.trace_steps = [4]" in result.output) == (2, True)
    nowhere = str(tmp_path / "no" / "folder.json")
    result = CliRunner().invoke(main, ["trace", str(run), "-o", nowhere])
    assert (result.exit_code, nowhere in result.output) == (2, True)
    (tmp_path / "timeline.jsonl").write_text("{}\n")
    with pytest.raises(OffloadError, match=r"timeline\.jsonl"):
        read_timelines(tmp_path)


def test_which_steps_are_recorded() -> None:
    assert steps_to_record("auto", 1, 200) == {5}
    assert steps_to_record("auto", 101, 200) == {105}
    assert steps_to_record("auto", 1, 2) == {2}
    assert steps_to_record((2, 9), 1, 200) == {2, 9}
    assert steps_to_record((), 1, 200) == frozenset()
