"""Copies under compute: what share of the copies of a step ran while kernels ran, from a trace.

The trace is that of torch.profiler, which asks the driver (CUPTI) when each kernel and each copy
ran: `ts` and `dur` in microseconds, `cat` "kernel" or "gpu_memcpy".
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

DIRECTIONS = {"h2d": "HtoD", "d2h": "DtoH"}

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times as disjoint intervals, ascending."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def covered(intervals: Sequence[Interval], by: Sequence[Interval]) -> float:
    """How long `intervals` run while `by` run; both disjoint and ascending."""
    total, first = 0.0, 0
    for start, end in intervals:
        while first < len(by) and by[first][1] <= start:
            first += 1
        for other_start, other_end in by[first:]:
            if other_start >= end:
                break
            total += min(end, other_end) - max(start, other_start)
    return total


def hidden_shares(events: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By direction: seconds of copies, and the share of them that runs under kernels.

    A direction without copies is left out. `events` are those of a Chrome trace.
    """
    timed = [event for event in events if event.get("ph") == "X"]
    kernels = union(_interval(event) for event in timed if event.get("cat") == "kernel")
    shares = {}
    for direction, name in DIRECTIONS.items():
        copies = union(
            _interval(event)
            for event in timed
            if event.get("cat") == "gpu_memcpy" and name in event["name"]
        )
        seconds = sum(end - start for start, end in copies) / 1e6
        if seconds:
            hidden = covered(copies, kernels) / 1e6
            shares[direction] = {"seconds": seconds, "hidden_share": hidden / seconds}
    return shares


def _interval(event: Mapping[str, Any]) -> Interval:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def profiled(run: Callable[[], None], *, on_gpu: bool) -> list[Mapping[str, Any]]:
    """The events of a trace of `run`."""
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, activity.CUDA] if on_gpu else [activity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[Mapping[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events
