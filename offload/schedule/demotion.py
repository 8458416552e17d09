"""Which state leaves the host for NVMe first when host memory shrinks; pure.

[Note: Demotion order]
What costs a step the least time for each byte goes first: the bytes that it then reads and writes
more in a step, at the speeds of the disk (cost.py). Of an AdamW step in bf16, in passes over the
bytes:

    frozen weights      read in forward and in backward
    optimizer state     read and written by the update
    gradients           written and read by each backward; the update reads them
    trained weights     read in forward, in backward and by the update, which writes them

Of equals optimizer state goes first: its update is the easiest to hide behind the computation. The
buckets of a class go so that those which stay are spread evenly over the model, as at the start.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from offload.schedule.cost import LaneSpeeds, lane_seconds
from offload.schedule.forecast import step_traffic
from offload.schedule.placement import Home, spread_order
from offload.schedule.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from offload.schedule.footprint import BlockBytes

_LAST = ("optimizer", "gradients", "weights")


def demotion_order(
    planned: Plan, state_classes: Collection[str], *, accumulation_steps: int
) -> list[Home]:
    """The homes on the host of these state classes, the first to leave it first."""
    rank = {bucket: place for place, bucket in enumerate(spread_order(len(planned.buckets)))}
    keyed = []
    for bucket, layouts in zip(planned.buckets, planned.layouts, strict=True):
        sizes: BlockBytes = {name: layout.chunk_nbytes for name, layout in layouts.items()}
        for name, layout in layouts.items():
            home = Home(bucket.index, name)
            if name in state_classes and planned.tier(*home) == "host" and layout.nbytes:
                cost = _seconds_a_byte(sizes, name, bucket.trainable, accumulation_steps)
                keyed.append((cost, _LAST.index(name), -rank[bucket.index], home))
    return [home for *_, home in sorted(keyed)]


def _seconds_a_byte(
    sizes: BlockBytes, state_class: str, trainable: bool, accumulation_steps: int
) -> float:
    """How much longer the disk is busy in a step with this class of a bucket on it."""
    traffic = step_traffic(
        [sizes],
        {(0, name): "nvme" if name == state_class else "host" for name in sizes},
        host_addressable=True,
        accumulation_steps=accumulation_steps,
        forward_only=frozenset({0} if trainable and "gradients" not in sizes else ()),
    )
    lanes = {lane: traffic.passes[lane] + traffic.update[lane] for lane in traffic.passes}
    seconds = lane_seconds(lanes, LaneSpeeds())
    return round(max(seconds["nvme_read"], seconds["nvme_write"]) / sum(sizes[state_class]), 15)


def with_homes_on_nvme(planned: Plan, homes: Collection[Home]) -> Plan:
    """A plan that knows these homes on nvme, to plan anew from; its bytes are still the old."""
    moved: dict[tuple[int, str], str] = dict.fromkeys(homes, "nvme")
    tier_of = {**planned.placement.tier_of, **moved}
    return replace(planned, placement=replace(planned.placement, tier_of=tier_of))


def least_demotion(
    order: Sequence[Home], plan_without: Callable[[Sequence[Home]], Plan]
) -> tuple[Sequence[Home], Plan] | None:
    """The least first part of `order` without which the host suffices, and the plan then.

    `plan_without` plans without these homes on the host. Where the step can be overlapped with all
    of them on nvme, it is overlapped. None: all of them are not enough. The plan may be short of
    nvme.
    """
    everything = plan_without(order)
    if not _fits_host(everything):
        return None
    is_overlapped = everything.overlap.flow_bytes > 0

    def suffices(candidate: Plan) -> bool:
        return _fits_host(candidate) and (candidate.overlap.flow_bytes > 0 or not is_overlapped)

    # The first of them may need more staging than they free, so fewer need not suffice where more
    # do not either; what is found suffices in any case.
    best, low, high = everything, 0, len(order)
    while low < high:
        middle = (low + high) // 2
        candidate = plan_without(order[:middle])
        if suffices(candidate):
            best, high = candidate, middle
        else:
            low = middle + 1
    return order[:high], best


def _fits_host(planned: Plan) -> bool:
    return all(short.tier != "host" for short in planned.shortfalls)
