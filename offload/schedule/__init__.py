"""Trace, cost model and plan (all pure), and the executor."""

from __future__ import annotations

from offload.schedule.cost import LaneSpeeds, bound_seconds, lane_seconds
from offload.schedule.executor import ComputePool
from offload.schedule.footprint import STATE_CLASSES, TIERS, Machine, Staging
from offload.schedule.forecast import Workload
from offload.schedule.lookahead import Actions, LookaheadPlan, plan_lookahead
from offload.schedule.placement import Placement, PlacementChoice, place
from offload.schedule.plan import Plan, layout_state, plan_buckets, plan_layouts
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
    "STATE_CLASSES",
    "TIERS",
    "Actions",
    "ComputePool",
    "Event",
    "EventKind",
    "LaneSpeeds",
    "LookaheadPlan",
    "Machine",
    "Placement",
    "PlacementChoice",
    "Plan",
    "Staging",
    "Trace",
    "TraceCursor",
    "TraceRecorder",
    "Workload",
    "bound_seconds",
    "lane_seconds",
    "layout_state",
    "place",
    "plan_buckets",
    "plan_layouts",
    "plan_lookahead",
]
