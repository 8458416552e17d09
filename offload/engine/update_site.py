"""Where each bucket is updated: planned, measured, chosen once, and the same for the whole run.

[Note: Update sites of a run]
    plan      device memory for chunks under way is off the budget before state is placed
    measure   before any weight arrives, on memory that is still empty: the link, kernel, device
    choose    `[placement] update` says the share, or `auto` finds the best for what was measured

Both sites give the same bits, and the choice changes in a run only when parameters are unfrozen. It
stands in the reports and in every checkpoint; a run that goes on from one keeps it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from offload.config import OffloadConfig
from offload.optim.chunk_update import ChunkUpdate, ChunkWork, KernelUpdate, StepSettings
from offload.optim.device_rules import device_rule, rows_bytes
from offload.optim.device_update import DeviceUpdate
from offload.optim.rules import UpdateRule
from offload.partition.blocks import BlockStore
from offload.partition.layout import Bucket, segments
from offload.partition.parameters import ParameterState
from offload.schedule.cost import LaneSpeeds
from offload.schedule.executor import ComputePool
from offload.schedule.footprint import Machine
from offload.schedule.plan import Plan
from offload.schedule.update_site import (
    MAX_SCRATCH_SHARE,
    SiteSpeeds,
    UpdateBytes,
    UpdateScratch,
    choose_on_device,
    first_on_device,
    update_bytes,
    update_scratch,
)
from offload.telemetry import UpdateReport

if TYPE_CHECKING:
    from offload.schedule.footprint import BlockBytes

_PASSES = 3
_SHARES = {"cpu": 0.0, "device": 1.0}
_ASKED = "placement.update says so"
# The rule takes at least this part of a chunk's time on the device, whatever the clocks say.
_LEAST_SHARE = 0.01


def plan_with_update(
    plan: Callable[[Machine], Plan],
    config: OffloadConfig,
    machine: Machine,
    rule: UpdateRule,
    known: Plan | None,
) -> Plan:
    """A plan that counts the device memory of updates on the device, where there can be any.

    `auto` does without them if they do not fit or would take much of the device. The bytes are
    `Plan.update_bytes`, and off `machine` like what others hold.

    Args:
        plan: plans for what a machine offers.
        config: reads `placement.update`.
        machine: budgets, these bytes included.
        rule: the update rule.
        known: the plan that this one extends.
    """
    if known is not None:
        return _counted(plan(_beside(machine, known.update_bytes)), known.update_bytes)
    planned = plan(machine)
    asked = config.placement.update
    if why_cpu(config, machine.host_addressable, rule) is not None:
        return planned
    taken, beside = 0, planned
    while (needed := scratch_of(beside).total) > taken:
        taken = needed
        if asked == "auto" and taken > MAX_SCRATCH_SHARE * machine.device_bytes:
            return planned
        beside = _counted(plan(_beside(machine, taken)), taken)
    return planned if asked == "auto" and not beside.fits else beside


def why_cpu(config: OffloadConfig, host_addressable: bool, rule: object) -> str | None:
    """Why the CPU updates everything, whatever is measured; None: nothing says so."""
    if config.placement.update in ("cpu", 0.0):
        return _ASKED
    if host_addressable:
        return "the device is host memory"
    if device_rule(rule) is None:
        return f"{type(rule).__name__} has no form for the device"
    return None


def _beside(machine: Machine, taken: int) -> Machine:
    return replace(
        machine,
        device_bytes=machine.device_bytes - taken,
        device_held_bytes=machine.device_held_bytes + taken,
    )


def _counted(planned: Plan, taken: int) -> Plan:
    shortfalls = tuple(
        replace(short, remedy=f"{short.remedy}, or set placement.update to 'cpu'")
        if taken and short.tier == "device"
        else short
        for short in planned.shortfalls
    )
    return replace(planned, update_bytes=taken, shortfalls=shortfalls)


def blocks_of(plan: Plan) -> list[BlockBytes]:
    """The chunk block bytes of each bucket, by state class."""
    return [{name: layout.chunk_nbytes for name, layout in ls.items()} for ls in plan.layouts]


def scratch_of(plan: Plan) -> UpdateScratch:
    """The device memory that updates of a plan's buckets take."""
    return update_scratch(plan.buckets, blocks_of(plan), rows_bytes)


@dataclass(slots=True, eq=False)
class UpdateSites:
    """The choice of a run; see [Note: Update sites of a run].

    Attributes:
        updater: what updates; None: the CPU does, all of it.
        share: of the trainable buckets, those that the device updates (0 to 1).
        reason: why it is that.
        is_asked: the configuration says the share.
    """

    updater: DeviceUpdate | None
    share: float
    reason: str
    is_asked: bool
    _scratch: UpdateScratch | None = None
    _buckets: list[UpdateBytes] = field(default_factory=list)

    def follow(self, plan: Plan) -> None:
        """Apply the share to a plan's buckets. One that the scratch has no room for is the CPU's.

        No step may be under way.
        """
        blocks = blocks_of(plan)
        self._buckets = update_bytes(plan.buckets, blocks, plan.placement.tier_of)
        if self.updater is None or self._scratch is None:
            return
        chosen = first_on_device(self._buckets, self.share)
        self.updater.on_device = frozenset(
            bucket
            for bucket in chosen
            if self._scratch.covers(update_scratch([plan.buckets[bucket]], blocks, rows_bytes))
        )

    def close(self) -> None:
        """Give the device memory of updates back."""
        if self.updater is not None:
            self.updater.close()

    def report(self) -> UpdateReport:
        """The choice for reports."""
        on_device = self.updater.on_device if self.updater is not None else ()
        num_cpu = len(self._buckets) - len(on_device)
        return UpdateReport(tuple(sorted(on_device)), num_cpu, self.reason)

    def to_dict(self) -> dict[str, Any]:
        """The choice for a checkpoint: plain values."""
        return {"share": self.share, "on_device": list(self.report().on_device)}

    def resume(self, saved: Mapping[str, Any] | None, plan: Plan) -> None:
        """Keep to the choice of the run that a checkpoint comes from, unless the config has one."""
        if saved is None or self.is_asked or self.updater is None:
            return
        self.share, self.reason = saved["share"], "the checkpoint's run had it so"
        self.follow(plan)


def open_update(
    config: OffloadConfig,
    plan: Plan,
    parameters: Sequence[ParameterState],
    store: BlockStore,
    rule: UpdateRule,
    pool: ComputePool,
) -> tuple[ChunkUpdate, UpdateSites]:
    """What updates the chunks by a rule, and where; nothing may be in its home yet.

    Raises:
        BudgetError: the device has less room than the plan says.
    """
    kernel = KernelUpdate(parameters, store, rule, pool)
    asked = config.placement.update
    ops = device_rule(rule)
    if not plan.update_bytes or ops is None:
        return kernel, all_on_cpu(config, plan, store.device.host_addressable, rule)
    scratch = scratch_of(plan)
    updater = DeviceUpdate(parameters, store, ops, kernel, scratch)
    if asked == "auto":
        buckets = update_bytes(plan.buckets, blocks_of(plan), plan.placement.tier_of)
        speeds = measure_speeds(updater, kernel, store, plan)
        share = len(choose_on_device(buckets, speeds)) / max(len(buckets), 1)
        reason = (
            f"measured, in GB/s: CPU {speeds.cpu / 1e9:.3g}, device {speeds.device / 1e9:.3g}, "
            f"h2d {speeds.h2d / 1e9:.3g}, d2h {speeds.d2h / 1e9:.3g}"
        )
    else:
        share = _SHARES[asked] if isinstance(asked, str) else asked
        reason = _ASKED
    sites = UpdateSites(updater, share, reason, asked != "auto", scratch)
    sites.follow(plan)
    return updater, sites


def all_on_cpu(
    config: OffloadConfig, plan: Plan, host_addressable: bool, rule: object
) -> UpdateSites:
    """The choice where the device updates nothing."""
    reason = why_cpu(config, host_addressable, rule) or "the device has no room beside the state"
    sites = UpdateSites(None, 0.0, reason, is_asked=True)
    sites.follow(plan)
    return sites


def measure_speeds(
    updater: DeviceUpdate, kernel: KernelUpdate, store: BlockStore, plan: Plan
) -> SiteSpeeds:
    """What link, CPU and device show with the largest chunk; the best of a few passes.

    The chunk's homes in memory are written to.

    Raises:
        BudgetError: the host has no staging for the chunk.
    """
    default = LaneSpeeds()
    trained = [b for b in plan.buckets if "gradients" in plan.layouts[b.index] and b.numel]
    if not trained:
        return SiteSpeeds(default.h2d, default.d2h, default.cpu, default.cpu)
    bucket = max(trained, key=lambda each: each.chunks[0].numel)
    settings = StepSettings({slot.param: {} for slot in bucket.slots}, 1.0, 1)
    best: dict[str, float] = {}
    with _empty_chunk(bucket, store) as work:
        nbytes = sum(staged.tensor.numel() for staged in work.staged.values())
        for _ in range(1 + _PASSES):
            started = time.perf_counter()
            kernel.update(work, settings)
            seconds = {"cpu": time.perf_counter() - started}
            lanes = store.device.lanes()
            started = time.perf_counter()
            updater.start(work, settings)
            updater.finish(work)
            wall = time.perf_counter() - started
            moved = {"cpu": nbytes, "device": nbytes}
            for lane, (total, busy) in store.device.lanes().items():
                moved[lane], seconds[lane] = total - lanes[lane][0], busy - lanes[lane][1]
            # One chunk goes there, is updated and comes back, one after the other.
            seconds["device"] = max(wall - seconds["h2d"] - seconds["d2h"], _LEAST_SHARE * wall)
            for lane, busy in seconds.items():
                if busy > 0:
                    best[lane] = max(best.get(lane, 0.0), moved[lane] / busy)
    return SiteSpeeds(
        best.get("h2d", default.h2d), best.get("d2h", default.d2h), best["cpu"], best["device"]
    )


@contextlib.contextmanager
def _empty_chunk(bucket: Bucket, store: BlockStore) -> Iterator[ChunkWork]:
    """The first chunk of a bucket, all of it staged, and none of it written home."""
    classes = store.classes(bucket.index)
    blocks = [store.block(bucket.index, name) for name in classes]
    for block in blocks:
        if block.home == "device":
            store.on_device(block, 0).zero_()  # fresh memory may hold what slows a CPU down
    held = store.start_loads(blocks, 0)
    if held is None:
        raise store.no_staging(blocks, 0)
    try:
        for staged in held:
            staged.transfer.wait(store.deadline_seconds)
        active = segments(bucket, bucket.chunks[0])
        yield ChunkWork(bucket, 0, active, dict(zip(classes, held, strict=True)))
    finally:
        store.late.release(held, store.deadline_seconds)
