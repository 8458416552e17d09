"""What one optimizer step is predicted to take: bytes and seconds of each lane. Pure.

[Note: Forecast]
  passes   forward and backward: paged weights arrive, gradients leave, compute
  update   state on its way to the update and back, the rule itself
The lanes of a phase work at the same time, so it takes as long as its busiest lane; see
[Note: Cost model]. Where the optimizer step is overlapped the two are one phase. Where it is not,
they come one after the other, and their seconds add up.

Compute takes what was measured of the model's operations, else its FLOPs at the measured rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload.schedule.cost import LaneSpeeds, bound_seconds, compute_flops, lane_seconds
from offload.schedule.footprint import STATE_CLASSES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from offload.partition.layout import Bucket
    from offload.schedule.footprint import BlockBytes

_DAY_SECONDS = 86_400
_TERABYTE = 1e12


@dataclass(frozen=True, slots=True)
class Workload:
    """What one optimizer step computes; it changes the forecast only.

    Attributes:
        tokens: of one optimizer step, all micro-batches together; None leaves compute out.
        recompute: the forward pass is done twice (gradient checkpointing).
        compute_seconds: measured seconds of forward and backward over `tokens`; None: by FLOPs.
    """

    tokens: int | None = None
    recompute: bool = False
    compute_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """What one optimizer step is predicted to take; see [Note: Forecast].

    Attributes:
        step_seconds: of one optimizer step.
        bottleneck: the lane that is busy longest.
        lane_bytes: by lane, of the whole step; compute counts none.
        lane_seconds: the same in seconds.
        hiding_tokens: tokens a step with which compute takes as long as the lanes beside it; None
            without tokens to compute from.
        update_seconds: the part of `step_seconds` that comes after the passes; 0.0 if overlapped.
    """

    step_seconds: float
    bottleneck: str
    lane_bytes: Mapping[str, int] = field(default_factory=dict)
    lane_seconds: Mapping[str, float] = field(default_factory=dict)
    hiding_tokens: int | None = None
    update_seconds: float = 0.0

    @property
    def terabytes_a_day(self) -> float:
        """Written to nvme by a day of steps, in units of 1e12 bytes."""
        if self.step_seconds <= 0:
            return 0.0
        return self.lane_bytes["nvme_write"] * _DAY_SECONDS / self.step_seconds / _TERABYTE


@dataclass(frozen=True, slots=True)
class StepTraffic:
    """Bytes by lane of one optimizer step; `cpu` counts the state that the update touches, once."""

    passes: dict[str, int]
    update: dict[str, int]


def step_traffic(
    blocks: Sequence[BlockBytes],
    tier_of: Mapping[tuple[int, str], str],
    *,
    host_addressable: bool,
    accumulation_steps: int,
    forward_only: frozenset[int] = frozenset(),
    kept_share: float = 0.0,
) -> StepTraffic:
    """Counts what moves; paged weights are fetched once in each forward and each backward.

    `kept_share` of those fetches find their page: what is on the device when a pass ends is not
    fetched again by the next one of the same step, which begins where it ended. On a device that
    the cores reach, what comes from nvme is read into the page itself.

    The `forward_only` buckets are fetched once in each of two forward passes, drawn noise for in
    both, and updated and written home in the first.
    """
    passes = dict.fromkeys(("h2d", "d2h", "nvme_read", "nvme_write"), 0)
    update = dict.fromkeys((*passes, "cpu"), 0)
    for bucket, classes in enumerate(blocks):
        size = {state_class: sum(sizes) for state_class, sizes in classes.items()}
        weights_tier = tier_of[bucket, "weights"]
        fetched = round(2 * accumulation_steps * size["weights"] * (1 - kept_share))
        if weights_tier == "host" or (weights_tier == "nvme" and not host_addressable):
            passes["h2d"] += fetched
        if weights_tier == "nvme":
            passes["nvme_read"] += fetched
        if bucket in forward_only:
            passes["nvme_write"] += size["weights"] if weights_tier == "nvme" else 0
            update["cpu"] += 3 * size["weights"]
        if "gradients" not in size:
            continue
        gradient_tier = tier_of[bucket, "gradients"]
        if gradient_tier != "device" and not host_addressable:
            passes["d2h"] += accumulation_steps * size["weights"]
        if gradient_tier == "nvme":
            passes["nvme_write"] += accumulation_steps * size["gradients"]
            passes["nvme_read"] += (accumulation_steps - 1) * size["gradients"]
        update["cpu"] += size["optimizer"] + size["weights"] + size["gradients"]
        for state_class in STATE_CLASSES:
            tier = tier_of[bucket, state_class]
            # Gradients are read by the update, the other two are read and written.
            if tier == "nvme":
                update["nvme_read"] += size[state_class]
                update["nvme_write"] += size[state_class] if state_class != "gradients" else 0
            elif tier == "device" and not host_addressable:
                update["d2h"] += size[state_class]
                update["h2d"] += size[state_class] if state_class != "gradients" else 0
    return StepTraffic(passes, update)


@dataclass(frozen=True, slots=True)
class StepKind:
    """How a step is taken.

    Attributes:
        host_addressable: the cores reach the device; then compute and update share them.
        accumulation_steps: micro-batches of a step.
        forward_only: buckets that are trained without gradients.
        resident_bytes: device room for paged weights.
        is_overlapped: the update runs beside the passes.
    """

    host_addressable: bool
    accumulation_steps: int = 1
    forward_only: frozenset[int] = frozenset()
    resident_bytes: int = 0
    is_overlapped: bool = False


def forecast_step(
    buckets: Sequence[Bucket],
    blocks: Sequence[BlockBytes],
    tier_of: Mapping[tuple[int, str], str],
    kind: StepKind,
    *,
    speeds: LaneSpeeds,
    workload: Workload,
) -> Forecast:
    """Predicts one optimizer step of a placement.

    Args:
        buckets: all of them.
        blocks: the chunk block bytes of each bucket, by state class.
        tier_of: home tier by (bucket, state class).
        kind: how the step is taken.
        speeds: measured lane speeds, or conservative ones.
        workload: what a step computes.
    """
    shared_cores = kind.host_addressable
    traffic = step_traffic(
        blocks,
        tier_of,
        host_addressable=kind.host_addressable,
        accumulation_steps=kind.accumulation_steps,
        forward_only=kind.forward_only,
        kept_share=_kept_share(blocks, tier_of, kind),
    )
    compute_seconds = _compute_seconds(buckets, kind.forward_only, speeds, workload)
    if kind.is_overlapped and shared_cores:
        traffic.update["nvme_read"] -= _found_in_page_bytes(blocks, tier_of)
    total = {lane: traffic.passes.get(lane, 0) + traffic.update[lane] for lane in traffic.update}
    if kind.is_overlapped:
        passes, update = total, dict.fromkeys(total, 0)
    else:
        passes, update = traffic.passes, traffic.update
    passes_seconds, _ = bound_seconds(passes, speeds, compute_seconds, shared_cores=shared_cores)
    update_seconds, _ = bound_seconds(update, speeds, shared_cores=shared_cores)
    in_passes = lane_seconds(passes, speeds, compute_seconds=compute_seconds)
    in_update = lane_seconds(update, speeds)
    busy = {lane: in_passes[lane] + in_update[lane] for lane in in_passes}
    hiding_tokens = None
    if workload.tokens and compute_seconds > 0:
        beside = dict(in_passes, compute=0.0)
        on_cores = beside.pop("cpu") if shared_cores else 0.0
        longest = max(max(beside.values()) - on_cores, 0.0)
        hiding_tokens = math.ceil(workload.tokens * longest / compute_seconds)
    return Forecast(
        step_seconds=passes_seconds + update_seconds,
        bottleneck=max(busy, key=busy.__getitem__),
        lane_bytes=total,
        lane_seconds=busy,
        hiding_tokens=hiding_tokens,
        update_seconds=update_seconds,
    )


def _found_in_page_bytes(
    blocks: Sequence[BlockBytes], tier_of: Mapping[tuple[int, str], str]
) -> int:
    """Of the weights on nvme, those that the overlapped update takes from the page of backward."""
    return sum(
        sum(classes["weights"])
        for bucket, classes in enumerate(blocks)
        if "gradients" in classes and tier_of[bucket, "weights"] == "nvme"
    )


def _kept_share(
    blocks: Sequence[BlockBytes], tier_of: Mapping[tuple[int, str], str], kind: StepKind
) -> float:
    """The share of a step's fetches that find their page on the device."""
    paged_bytes = sum(
        sum(classes["weights"])
        for bucket, classes in enumerate(blocks)
        if tier_of[bucket, "weights"] != "device"
    )
    if not paged_bytes:
        return 0.0
    num_passes = 2 * kind.accumulation_steps
    return (1 - 1 / num_passes) * min(kind.resident_bytes / paged_bytes, 1.0)


def _compute_seconds(
    buckets: Sequence[Bucket],
    forward_only: frozenset[int],
    speeds: LaneSpeeds,
    workload: Workload,
) -> float:
    if workload.compute_seconds is not None:
        return workload.compute_seconds
    # Two forward passes cost what forward and backward of frozen parameters do.
    numel = {True: 0, False: 0}
    for each in buckets:
        numel[each.trainable and each.index not in forward_only] += sum(s.numel for s in each.slots)
    flops = compute_flops(
        tokens=workload.tokens or 0,
        trainable_numel=numel[True],
        frozen_numel=numel[False],
        recompute=workload.recompute,
    )
    return flops / speeds.flops
