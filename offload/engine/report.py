"""Measures a step: bytes and busy time of lanes, memory of tiers, and the bound they set."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from offload.schedule.cost import bound_of_step
from offload.telemetry import (
    ActivationReport,
    LaneReport,
    RetryReport,
    ShrinkReport,
    StepReport,
    TierReport,
    lanes_between,
    note_speeds,
)

if TYPE_CHECKING:
    from offload.engine.build import Parts
    from offload.tiers.device import DeviceTier
    from offload.tiers.host import HostArena
    from offload.tiers.nvme import NvmeStore
    from offload.timeline import StepTimeline


class StepMeter:
    """What has happened since the end of the step before.

    A lane's speed is the best it has shown in this run; the bound is that of the cost model.

    The mixed speed of NVMe is that of a step: the bytes of both directions over the longer of their
    busy times. It is the achieved one where the shorter lies within the longer, and more, never
    less, where both stick out; the sum of the lanes' best speeds would take no notice that they
    share the disk.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._meter = parts.meter
        self._best: dict[str, float] = {}
        self._started = time.perf_counter()
        self._lanes = self._now()
        self._faults = 0
        self._activations = ActivationReport()
        self._retries = RetryReport()
        self._shrinks = ShrinkReport()
        self._last: StepReport | None = None
        self._is_computing = False

    @contextlib.contextmanager
    def computing(self, what: str) -> Iterator[None]:
        """Count a block as compute, less the time in which touches waited for transfers.

        `what` it computes, for the timeline, where the waits are spans of their own.

        A block inside another is part of it, also in a thread that the outer one waits for.
        """
        if self._is_computing:
            yield
            return
        self._is_computing = True
        started, stalled = time.perf_counter(), self._stall_seconds()
        try:
            yield
        finally:
            self._is_computing = False
            waited = self._stall_seconds() - stalled
            ended = time.perf_counter()
            self._meter.add("compute", 0, max(ended - started - waited, 0.0))
            self._meter.timeline.span("compute", what, started, ended)

    def end_step(self) -> None:
        """The step has ended: keep its report."""
        now = time.perf_counter()
        self._parts.updates.retries.warn_once()
        lanes = lanes_between(self._lanes, self._now())
        note_speeds(self._best, lanes)
        self._note_mixed(lanes)
        bound, critical = bound_of_step(
            lanes, self._best, shared_cores=self._parts.device.host_addressable
        )
        self._last = StepReport(
            step=0,
            tiers=self._tiers(),
            lanes=lanes,
            bound_seconds=bound,
            measured_seconds=now - self._started,
            faults=self._parts.pager.faults - self._faults,
            activations=self._activations_now() - self._activations,
            update=self._parts.sites.report(),
            critical=critical,
            retries=self._parts.updates.retries.report() - self._retries,
            shrinks=self._parts.shrinks - self._shrinks,
        )
        self._started = now
        self._activations = self._activations_now()
        self._lanes = self._now()
        self._faults = self._parts.pager.faults
        self._retries = self._parts.updates.retries.report()
        self._shrinks = self._parts.shrinks
        self._meter.timeline.end_step()
        for tier in self._tiers_of_parts().values():
            tier.step_peak_bytes = tier.used_bytes

    def record(self, step: int) -> None:
        """Record the timeline of what happens from now on, until the end of step `step`."""
        tiers = self._tiers_of_parts()
        self._meter.timeline.start(
            step, lambda: {name: tier.used_bytes for name, tier in tiers.items()}
        )

    def recorded(self, *, now: bool) -> StepTimeline | None:
        """See `Timeline.take`."""
        return self._meter.timeline.take(now=now)

    def report(self, step: int) -> StepReport:
        """The report of the last step; of an empty one before the first."""
        last = self._last
        if last is None:
            return StepReport(0, self._tiers(), {}, 0.0, 0.0, 0, update=self._parts.sites.report())
        tiers = {
            name: dataclasses.replace(tier, step_peak_bytes=last.tiers[name].step_peak_bytes)
            for name, tier in self._tiers().items()
        }
        return dataclasses.replace(last, step=step, tiers=tiers)

    def _stall_seconds(self) -> float:
        activations = self._parts.activations
        saved = 0.0 if activations is None else activations.stall_seconds
        return self._parts.pager.stall_seconds + saved + self._parts.updates.seconds

    def _activations_now(self) -> ActivationReport:
        activations = self._parts.activations
        return ActivationReport() if activations is None else activations.report()

    def _note_mixed(self, lanes: dict[str, LaneReport]) -> None:
        both = [lanes[name] for name in ("nvme_read", "nvme_write") if name in lanes]
        busy_seconds = max((lane.busy_seconds for lane in both), default=0.0)
        if len(both) == 2 and all(lane.bytes for lane in both) and busy_seconds > 0:
            speed = sum(lane.bytes for lane in both) / busy_seconds
            self._best["nvme_mixed"] = max(self._best.get("nvme_mixed", 0.0), speed)

    def _now(self) -> dict[str, LaneReport]:
        lanes = self._meter.snapshot()
        found = dict(self._parts.io.lanes())
        found.update(self._parts.device.lanes())
        for name, (nbytes, busy_seconds) in found.items():
            lanes[name] = LaneReport(nbytes, busy_seconds)
        return lanes

    def _tiers(self) -> dict[str, TierReport]:
        parts = self._parts
        # The arena is only as large as the plan needs; this is what it might have been.
        budgets = {"device": parts.device.budget_bytes, "host": parts.plan.budget_bytes["host"]}
        if parts.nvme is not None:
            budgets["nvme"] = parts.nvme.capacity_bytes
        return {
            name: TierReport(budgets[name], tier.used_bytes, tier.peak_bytes, tier.step_peak_bytes)
            for name, tier in self._tiers_of_parts().items()
        }

    def _tiers_of_parts(self) -> dict[str, DeviceTier | HostArena | NvmeStore]:
        parts = self._parts
        found: dict[str, DeviceTier | HostArena | NvmeStore] = {
            "device": parts.device,
            "host": parts.host,
        }
        if parts.nvme is not None:
            found["nvme"] = parts.nvme
        return found
