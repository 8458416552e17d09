"""Trace, cost model and plan (all pure), and the executor."""

from __future__ import annotations

from offload.schedule.executor import ComputePool
from offload.schedule.lookahead import Actions, LookaheadPlan, plan_lookahead
from offload.schedule.trace import (
    CLOSE,
    OPEN,
    Event,
    EventKind,
    Trace,
    TraceCursor,
    TraceRecorder,
)

__all__ = [
    "CLOSE",
    "OPEN",
    "Actions",
    "ComputePool",
    "Event",
    "EventKind",
    "LookaheadPlan",
    "Trace",
    "TraceCursor",
    "TraceRecorder",
    "plan_lookahead",
]
