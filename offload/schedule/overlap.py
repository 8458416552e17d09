"""The room that the overlapped optimizer step takes, beside what a plan has to have; pure.

[Note: Overlap room]
  flow    host memory for chunks on their way to an update or from it, of which some are read, one
          is updated and some are written. Taken off the host budget before the rest is placed.
  held    next versions that are not current yet: on the host for homes in memory, from what the
          budget has left; on nvme as shadow extents, from half of what is free there.
Where the budgets have no room for that the step is taken between backward and forward, as ever.
Where updates find everything on the host there is no flow, and nothing is held: all are late.
State that is added to a plan later comes first: the room is then what is left beside it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from offload.partition.layout import (
    BLOCK_ALIGNMENT_BYTES,
    UPDATED_CLASSES,
    num_held,
    round_up,
)
from offload.schedule.footprint import NO_OVERLAP, OverlapRoom

if TYPE_CHECKING:
    from collections.abc import Iterator

    from offload.schedule.footprint import Machine
    from offload.schedule.plan import Plan

# Chunks in the flow: fewer than the least cannot overlap, more than the most gain nothing.
_LEAST_CHUNKS, _MOST_CHUNKS = 2, 6
_MOST_FLOW_SHARE = 1 / 2  # of the host budget
# The flow beside an accelerator whose updates find everything on the host: nothing is on its way.
_FLOW_IN_PLACE_BYTES = BLOCK_ALIGNMENT_BYTES
_MOST_HELD_SHARE = 1 / 2  # of what is free on nvme


def flow_bytes(planned: Plan, machine: Machine, most_bytes: int | None = None) -> int:
    """Host bytes that the flow wants, of `most_bytes`; by default of its share of the budget.

    0: nothing is overlapped, or there is room for less than the least.
    """
    overlapped = list(_overlapped(planned, machine))
    largest = max(
        (
            sum(
                round_up(sizes[chunk], BLOCK_ALIGNMENT_BYTES)
                for state_class, sizes in chunks.items()
                if machine.is_staged(planned.tier(bucket, state_class))
            )
            for bucket, chunks in overlapped
            for chunk in range(len(chunks["gradients"]))
        ),
        default=0,
    )
    room_bytes = int(machine.host_bytes * _MOST_FLOW_SHARE)
    if most_bytes is not None:
        room_bytes = min(room_bytes, most_bytes)
    if not largest:
        return _FLOW_IN_PLACE_BYTES if overlapped and room_bytes >= _FLOW_IN_PLACE_BYTES else 0
    chunks = min(room_bytes // largest, _MOST_CHUNKS)
    return chunks * largest if chunks >= _LEAST_CHUNKS else 0


def overlap_room(planned: Plan, machine: Machine, flow: int) -> OverlapRoom:
    """The room of a plan beside which `flow` bytes of the host are free."""
    updated = [
        (planned.tier(bucket, state_class), nbytes)
        for bucket, chunks in _overlapped(planned, machine)
        for state_class in UPDATED_CLASSES
        for nbytes in chunks.get(state_class, ())
        if nbytes
    ]
    on_nvme = [nbytes for tier, nbytes in updated if tier == "nvme"]
    in_memory = sum(nbytes for tier, nbytes in updated if tier != "nvme")
    left = machine.host_bytes - flow - planned.need_bytes["host"]
    if flow == _FLOW_IN_PLACE_BYTES:
        left = 0  # else a second copy of all state would be held
    held = min(max(left, 0), in_memory) // BLOCK_ALIGNMENT_BYTES * BLOCK_ALIGNMENT_BYTES
    free = planned.budget_bytes["nvme"] - planned.need_bytes["nvme"]
    share = min(1.0, max(free, 0) * _MOST_HELD_SHARE / sum(on_nvme)) if on_nvme else 0.0
    extents = num_held(on_nvme, share)
    return OverlapRoom(flow, held, share, sum(size * count for size, count in extents.items()))


def room_left(planned: Plan, machine: Machine) -> OverlapRoom:
    """The room that a plan leaves which was made without regard to any."""
    left = max(machine.host_bytes - planned.need_bytes["host"], 0)
    flow = flow_bytes(planned, machine, left)
    return overlap_room(planned, machine, flow) if flow else NO_OVERLAP


def with_overlap(planned: Plan, room: OverlapRoom, machine: Machine) -> Plan:
    """Count the room: the plan, which was made beside it, needs none of it, and takes all."""
    peak = planned.peak_bytes
    return replace(
        planned,
        overlap=room,
        peak_bytes={
            **peak,
            "host": peak["host"] + room.host_bytes,
            "nvme": peak["nvme"] + room.held_nvme_bytes,
        },
        budget_bytes={
            **planned.budget_bytes,
            "host": machine.budget_bytes("host"),
            "nvme": machine.budget_bytes("nvme"),
        },
    )


def _overlapped(
    planned: Plan, machine: Machine
) -> Iterator[tuple[int, dict[str, tuple[int, ...]]]]:
    """The trainable buckets that have something to wait for, and their chunk bytes by class."""
    for bucket, layouts in enumerate(planned.layouts):
        if "gradients" not in layouts:
            continue
        tiers = {planned.tier(bucket, state_class) for state_class in layouts}
        if not machine.host_addressable or "nvme" in tiers:
            yield bucket, {name: tuple(layout.chunk_nbytes) for name, layout in layouts.items()}
